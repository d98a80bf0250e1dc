"""Where a log stopped, when a process opens it anew: its last file is read, and held against what was sealed."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from securesplit.errors import SecureSplitError
from securesplit.journal.disk import file_name, files_of
from securesplit.journal.events import Began, Continued, Torn
from securesplit.journal.faults import altered, cut, unsigned
from securesplit.journal.row import Row
from securesplit.journal.scan import Line, Place, Tail, last_hash, scan_file
from securesplit.journal.seal import Head, Sealed, Signer, read_sealed, statement

__all__ = ["Found", "find_end"]


@dataclass(frozen=True, slots=True)
class Found:
    """The end of a log.

    Attributes:
        log: its name, 16 bytes.
        file: number of the last file; ``size`` bytes of it are whole rows.
        rows, hash: how many rows there are, and the last one's hash.
        torn: the row to write about what was left there, or None when the log ended in order.
    """

    log: bytes
    file: int
    size: int
    rows: int
    hash: bytes
    torn: Torn | None


def find_end(path: Path, party: str, signer: Signer) -> Found | Torn | None:
    """Read the last two files and what was sealed; None where there is no log yet, and what there is of a log's first row
    where a process died before it was whole.

    No more is read, so that a long log does not hold up a start; `securesplit audit verify` reads it all.

    Raises:
        CheckFailed: SS-1580 when a line does not follow, SS-1581 when rows are gone that were on disk and sealed, SS-1582
            when the log is another party's or its seal is not signed by a certificate of this party.
        OSError: when a file cannot be read.
    """
    files, seal = files_of(path), path / "head"
    sealed = read_sealed(seal) if seal.exists() else None
    if not files:
        if sealed is not None:
            raise cut("its files are missing, and its head is there")
        return None
    number = len(files)
    if files[-1].name != file_name(number):
        raise cut("one of its files is missing")
    if number == 1 and sealed is None and b"\n" not in (first := files[0].read_bytes()):
        files[0].unlink()
        return Torn(bytes=len(first), sha256=hashlib.sha256(first).hexdigest()) if first else None
    if sealed is None:
        raise unsigned("there is no sealed head beside it")
    if number > 1 and files[-1].stat().st_size == 0:
        files[-1].unlink()  # A process that died between two files.
        number -= 1
    start = max(1, number - 1)
    index, previous = last_hash(path, start - 1) if start > 1 else (-1, None)
    reading = _Reading(party, signer, sealed, start=index + 1)
    for place in range(start, number + 1):
        for found in scan_file(path, place, index=reading.rows, previous=previous, last=place == number):
            reading.take(found)
            previous = reading.hash
        if place < number and reading.rows == index + 1:
            raise altered(file_name(place), "it is empty")
    return reading.result(path, number)


class _Reading:
    """What was learned from the lines so far."""

    def __init__(self, party: str, signer: Signer, sealed: Sealed, *, start: int) -> None:
        self.rows, self.hash = start, b""
        self._party, self._signer, self._sealed = party, signer, sealed
        self._hashes: dict[int, bytes] = {}
        self._certificates: list[tuple[int, bytes]] = []
        self._place: Place | None = None
        self._tail: Tail | None = None

    def take(self, found: Line | Tail) -> None:
        """One line."""
        if isinstance(found, Tail):
            self._tail = found
            return
        event = found.row.event
        if isinstance(event, Began | Continued):
            self._owner(event, found.row)
        self.rows, self.hash, self._place = found.row.index + 1, found.row.hash, found.place
        if self.rows in {self._sealed.synced.rows, self._sealed.latest.rows}:
            self._hashes[self.rows] = self.hash

    def result(self, path: Path, number: int) -> Found:
        """Compare with what was sealed."""
        synced, latest = self._sealed.synced, self._sealed.latest
        if self._place is None:
            raise altered(file_name(number), "its first row is missing")
        for head in (synced, latest):
            self._require_signed(head)
        if synced.rows > self.rows:
            raise cut(f"{synced.rows} rows were sealed on disk, and {self.rows} are there")
        for head in (synced, latest):
            if head.rows <= self.rows and self._hashes.get(head.rows) != head.hash:
                raise altered(str(path), f"row {head.rows - 1} is not the one that was sealed")
        torn = Torn(
            bytes=self._tail.bytes if self._tail else 0,
            sha256=self._tail.sha256 if self._tail else "",
            unsealed=max(0, self.rows - latest.rows),
            lost=max(0, latest.rows - self.rows),
        )
        end = self._place.end if self._place.file == number else 0
        return Found(synced.log, number, end, self.rows, self.hash, None if torn == Torn() else torn)

    def _owner(self, event: Began | Continued, row: Row) -> None:
        certificate = base64.b64decode(event.certificate)
        if event.party != self._party or bytes.fromhex(event.log) != self._sealed.synced.log:
            raise unsigned("it is another party's, or another log's head lies beside it")
        if certificate != self._signer.certificate:
            try:
                known = self._signer.trust(certificate, row.at)
            except SecureSplitError as error:
                raise unsigned(f"it was signed with a certificate that is not this party's ({error.code})") from None
            if known != self._party:
                raise unsigned("it was signed with another party's certificate")
        self._certificates.append((row.index, certificate))

    def _require_signed(self, head: Head) -> None:
        """By the certificate that was in force when the head's last row was written."""
        certificate = next((c for index, c in reversed(self._certificates) if index < head.rows), b"")
        try:
            self._signer.verify(certificate, head.signature, statement(head.log, head.rows, head.hash))
        except SecureSplitError as error:
            raise unsigned(f"the head beside it has no good signature ({error.code})") from None
