"""The writer of an audit log: rows in, hashed, sealed and on disk.

    journal = Journal.open(keys / "audit", signer, party=folder.identity.uri, clock=time.time_ns)
    journal.append(Refused(stage="tls", code="SS-3205", address="10.0.0.7:51842"))

When :meth:`Journal.append` returns, the row and everything before it is on disk, under a head that was signed and synced.
With ``durable=False`` it has been handed to the operating system, row and head: the death of the process loses nothing; a
loss of power may lose it, and the next start says so in a row of its own. :meth:`Journal.sync` makes up for it.

A disk that does not take a row raises, for this row and for every later one until it does; whoever serves must stop serving
then. Nothing is dropped in silence: an unfinished line of a process that died is taken out, and a row ``torn`` tells its
length and digest; a log that was edited or cut is refused at opening (what remains possible: securesplit/journal/seal.py).
"""

from __future__ import annotations

import base64
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from securesplit.errors import CheckFailed
from securesplit.journal.disk import Files
from securesplit.journal.events import Began, Continued, Ended, Event, SignedHead, Torn
from securesplit.journal.faults import unwritable
from securesplit.journal.resume import Found, find_end
from securesplit.journal.row import encode_row, genesis
from securesplit.journal.seal import Head, HeadFile, Signer, statement

__all__ = ["Journal"]

_EVERY = 256
_FILE_BYTES = 8 << 20


class Journal:
    """One party's open log. Threads may share it; another process is refused.

    Made by :meth:`open`.

    Attributes:
        id: the log's name, 16 bytes.
        certificate: leaf of the key that signs, DER.
    """

    def __init__(
        self, files: Files, heads: HeadFile, signer: Signer, clock: Callable[[], int], party: str, *, every: int
    ) -> None:
        self._files = files
        self._heads = heads
        self._signer = signer
        self._clock = clock
        self._party = party
        self._every = every
        # Writing holds the first. Waiting for the disk holds the second alone, so that an event loop's rows need not wait.
        self._lock, self._syncing = threading.RLock(), threading.Lock()
        self._synced = 0
        self._broken = False
        self._closed = False
        self._since = 0
        self._index = 0
        self._hash = b""
        self._last: Head | None = None
        self.id = b""
        self.certificate = signer.certificate

    @classmethod
    def open(
        cls,
        path: Path,
        signer: Signer,
        *,
        party: str,
        clock: Callable[[], int],
        every: int = _EVERY,
        file_bytes: int = _FILE_BYTES,
    ) -> Journal:
        """Begin a log, or go on with the one that is there.

        Args:
            path: the log's folder; made with mode 0700 when absent.
            signer: the party's key.
            party: the party's identity, ``spiffe://...``.
            clock: nanoseconds since 1970.
            every: rows between two signed heads inside the log.
            file_bytes: a file that is larger than this is followed by the next.

        Raises:
            CheckFailed: SS-1580, SS-1581, SS-1582 when the log that is there was altered, cut, or is not this party's;
                SS-1585 when it cannot be written.
            InputError: SS-1586 when another process has it.
        """
        files = Files.open(path, file_bytes=file_bytes)
        heads: HeadFile | None = None
        try:
            found = find_end(path, party, signer)
            heads = HeadFile(path / "head")
            journal = cls(files, heads, signer, clock, party, every=every)
            journal._start(found)
        except OSError as error:
            _abandon(files, heads)
            raise unwritable(type(error).__name__) from None
        except BaseException:
            _abandon(files, heads)
            raise
        return journal

    def append(self, event: Event, *, durable: bool = True) -> None:
        """Write one row.

        Args:
            event: what happened.
            durable: wait for the disk. Without it this takes some microseconds and may be called on an event loop.

        Raises:
            CheckFailed: SS-1585; what the row tells of must not happen then.
        """
        with self._lock:
            self._write(event)
            if self._since >= self._every:
                self._sign_inside()
        if durable:
            self._flush()

    def sync(self) -> None:
        """Wait until everything that was written is on disk; others may write meanwhile. Does nothing when it is.

        Raises:
            CheckFailed: SS-1585.
        """
        self._flush()

    def probe(self) -> None:
        """Try the disk again after it took no row, with a signed head. After a failed sync there is no trying again.

        Raises:
            CheckFailed: SS-1585.
        """
        with self._lock:
            self._sign_inside()
            self._sync()

    def head(self) -> Head:
        """The present head, signed; everything under it is on disk.

        Raises:
            CheckFailed: SS-1585.
        """
        return self._flush()

    def rekey(self, signer: Signer) -> None:
        """Sign with a renewed certificate from here on; what came before stands under a head of the old key.

        Raises:
            CheckFailed: SS-1585.
        """
        with self._lock:
            if signer.certificate != self.certificate:
                self._sign_inside()
            self._signer, self.certificate = signer, signer.certificate
            self._write(self._continued())
            self._sign_inside()
            self._sync()

    def close(self) -> None:
        """Write the last row and a head, and let the next process have the log. May be called more than once.

        Raises:
            CheckFailed: SS-1585; the log is closed nevertheless.
        """
        with self._lock:
            if self._closed:
                return
            try:
                if not self._broken:
                    self._sign_inside()
                    self._write(Ended())
                    self._sync()
            finally:
                self._closed = True
                with self._syncing:  # Somebody may be waiting for the disk still.
                    _abandon(self._files, self._heads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, found: Found | Torn | None) -> None:
        if isinstance(found, Found):
            self.id, self._hash, self._index = found.log, found.hash, found.rows
            self._files.resume(found.file, found.size)
            self._write(self._continued())
            torn = found.torn
        else:
            self.id = secrets.token_bytes(16)
            self._hash = genesis(self.id)
            self._files.begin(1)
            certificate = base64.b64encode(self._signer.certificate).decode("ascii")
            self._write(Began(log=self.id.hex(), party=self._party, certificate=certificate))
            torn = found
        if torn is not None:
            self._write(torn)
        self._sign_inside()
        self._sync()

    def _continued(self) -> Continued:
        certificate = base64.b64encode(self._signer.certificate).decode("ascii")
        return Continued(log=self.id.hex(), party=self._party, file=self._files.number, certificate=certificate)

    def _write(self, event: Event | None) -> None:
        """One row; without an event, a signed head of what stands before it."""
        self._require_usable()
        try:
            if self._files.full:
                # What the seal covers when it is alone never lies farther back than one file.
                self._sync()
                self._files.begin(self._files.number + 1)
                self._put(self._continued())
            self._put(SignedHead(signature=self._signed().signature.hex()) if event is None else event)
        except OSError as error:
            raise unwritable(error.strerror or type(error).__name__) from None

    def _put(self, event: Event) -> None:
        line, digest = encode_row(self._hash, self._index, self._clock(), event)
        self._files.write(line)
        self._hash, self._index = digest, self._index + 1
        self._since += 1
        self._heads.note(self._signed())

    def _sign_inside(self) -> None:
        """Put a head into the log itself: it signs every row before it."""
        self._write(None)
        self._since = 0

    def _flush(self) -> Head:
        """Everything that stands there now to the disk, and a synced head of it. Whoever comes meanwhile waits for its own."""
        with self._lock:
            self._require_usable()
            head, handle = self._signed(), self._duplicate()
        try:
            self._to_disk(head, handle)
        finally:
            os.close(handle)
        return head

    def _sync(self) -> None:
        """The same where nobody else may write meanwhile."""
        handle = self._duplicate()
        try:
            self._to_disk(self._signed(), handle)
        finally:
            os.close(handle)

    def _duplicate(self) -> int:
        try:
            return self._files.duplicate()
        except OSError as error:
            raise unwritable(error.strerror or type(error).__name__) from None

    def _to_disk(self, head: Head, handle: int) -> None:
        try:
            with self._syncing:
                if head.rows > self._synced:
                    os.fsync(handle)
                    self._heads.sync(head)
                    self._synced = head.rows
        except OSError as error:
            # After a failed fsync nobody knows what is on disk, and a second one would say that all is well.
            self._broken = True
            raise unwritable(error.strerror or type(error).__name__) from None

    def _require_usable(self) -> None:
        if self._closed or self._broken:
            raise unwritable("it is closed" if self._closed else "an earlier write failed")

    def _signed(self) -> Head:
        if self._last is not None and self._last.rows == self._index:
            return self._last
        signature = self._signer.sign(statement(self.id, self._index, self._hash))
        self._last = Head(self.id, self._index, self._hash, signature)
        return self._last


def _abandon(files: Files, heads: HeadFile | None) -> None:
    for thing in (heads, files):
        if thing is not None:
            with suppress(OSError, CheckFailed):
                thing.close()
