"""Each end's witness of the other: at a checkpoint it writes down the other end's signed head, and shows its own.

What this is for: somebody who may write one machine's disk and use its key can make that machine's log say anything, and no
file on that machine tells. The other end's log does, as long as its disk and key are in other hands.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable

from securesplit.errors import RemoteProtocolError, SecureSplitError
from securesplit.journal.events import Checkpoint, PeerHead
from securesplit.journal.log import Journal
from securesplit.journal.seal import Head, statement

__all__ = ["NO_LOG", "Checkpoints", "Peer"]

NO_LOG = Head(log=bytes(16), rows=0, hash=bytes(32), signature=bytes(8))
"""What an end shows that keeps no log."""


class Peer:
    """The other end of one session.

    Args:
        session: 32 hex digits.
        uri: its identity, verified.
        certificate: its leaf, DER, verified.
    """

    def __init__(self, session: str, uri: str, certificate: bytes) -> None:
        self.session, self.uri, self.certificate = session, uri, certificate


class Checkpoints:
    """This end's part.

    Args:
        journal: where to.
        verify: ``verify(certificate, signature, data)``; raises one of our errors when the signature is not good.
    """

    def __init__(self, journal: Journal, verify: Callable[[bytes, bytes, bytes], None]) -> None:
        self._journal = journal
        self._verify = verify
        self._seen: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def head(self) -> Head:
        """This end's head, on disk. Waits for the disk.

        Raises:
            CheckFailed: SS-1585.
        """
        return self._journal.head()

    def witness(self, peer: Peer, number: int, head: Head) -> None:
        """Check the other end's head and write it down.

        Raises:
            RemoteProtocolError: SS-4033 when its signature is not good, or when the same log had more rows before.
            CheckFailed: SS-1585.
        """
        if head.rows == 0:
            return
        try:
            self._verify(peer.certificate, head.signature, statement(head.log, head.rows, head.hash))
        except SecureSplitError as error:
            raise RemoteProtocolError(
                "SS-4033", f"the head of the other end's audit log is not signed by it ({error.code})"
            ) from None
        with self._lock:
            if self._seen.get(head.log, 0) > head.rows:
                raise RemoteProtocolError("SS-4033", "the other end's audit log has fewer rows than before")
            if len(self._seen) > 4096:
                self._seen.clear()  # What was seen stands in the journal; this is the quick look alone.
            self._seen[head.log] = head.rows
        self._journal.append(
            PeerHead(
                session=peer.session, number=number, peer=peer.uri, log=head.log.hex(), rows=head.rows, head=head.hash.hex(),
                signature=head.signature.hex(), certificate=base64.b64encode(peer.certificate).decode("ascii"),
            ),
            durable=False,
        )  # fmt: skip

    def agreed(self, session: str, number: int, *, up: bytes, down: bytes) -> None:
        """Both ends have seen the same messages up to here.

        Raises:
            CheckFailed: SS-1585.
        """
        self._journal.append(Checkpoint(session=session, number=number, up=up.hex(), down=down.hex()), durable=False)
