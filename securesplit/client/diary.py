"""A client's audit log, as its link and its gate write it: what was agreed, what left, what was refused, and checkpoints.

Every row is written before what it tells of happens. A disk that takes no row ends the run (SS-1585): what is not logged is
not sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from securesplit.errors import SecureSplitError
from securesplit.journal.checkpoint import Checkpoints, Peer
from securesplit.journal.events import Closed, Event, Loaded, Opened, Refused, Released, Round
from securesplit.journal.log import Journal
from securesplit.journal.seal import Head
from securesplit.logged import open_journal
from securesplit.pki.certificate import verify_signature
from securesplit.pki.identity import identity_of
from securesplit.pki.store import KeyFolder
from securesplit.privacy.let import Let
from securesplit.protocol.messages import Seal

__all__ = ["Diary"]

Stage = Literal["tcp", "tls", "identity", "policy", "protocol", "budget"]
_STAGES: dict[str, Stage] = {"SS-2": "policy", "SS-30": "tcp", "SS-31": "identity", "SS-32": "identity", "SS-33": "tls",
    "SS-5": "budget", "SS-7": "policy"}  # fmt: skip


class Diary:
    """One client process's log.

    Args:
        journal: open; closed by :meth:`close`.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._checkpoints = Checkpoints(journal, verify_signature)
        self._peer: Peer | None = None

    @classmethod
    def beside(cls, folder: KeyFolder) -> Diary:
        """The log in a client's key folder. Where another process of the same client has it, the next number's.

        Raises:
            CheckFailed: SS-1580 to SS-1582, SS-1585.
        """
        return cls(open_journal(folder, shared=True))

    def note(self, event: Event, *, durable: bool = True) -> None:
        """Write a row.

        Raises:
            CheckFailed: SS-1585.
        """
        self._journal.append(event, durable=durable)

    def begins(self, policy: str) -> None:
        """A session is about to be asked for, under the policy of this digest."""
        self.note(Loaded(what="policy", digest=policy), durable=False)

    def opened(self, *, session: bytes, certificate: bytes, policy: str, job: str, model: str) -> None:
        """The handshake is signed by both sides; ``policy`` is the digest of what they agreed on."""
        self._peer = Peer(session.hex(), identity_of(certificate).uri, certificate)
        self.note(Opened(session=session.hex(), peer=self._peer.uri, policy=policy, job=job, model=model))

    def let(self, released: Let) -> None:
        """The gate lets something out. Charged releases wait for the disk, resent ones do not."""
        self.note(
            Released(
                channel=released.channel, sequences=released.sequences, charged=released.charged, units=released.units,
                noised=released.noised, payload=released.payload, session=self._session,
            ),
            durable=released.charged > 0 or not released.noised,
        )  # fmt: skip

    def round(
        self,
        state: Literal["started", "ended", "refused"],
        number: int,
        run: bytes,
        *,
        clients: int = 0,
        code: str = "",
    ) -> None:
        """A secure sum begins or ends."""
        self.note(Round(state=state, number=number, run=run.hex(), clients=clients, code=code))

    def refused(self, error: SecureSplitError) -> None:
        """This side ends what it did, or was refused by the other."""
        stage: Stage = next((_STAGES[error.code[:n]] for n in (5, 4) if error.code[:n] in _STAGES), "protocol")
        peer = self._peer.uri if self._peer is not None else ""
        self.note(Refused(stage=stage, code=error.code, address="", peer=peer))

    def closed(self, *, steps: int, up: int, down: int) -> None:
        """The session is over."""
        peer = self._peer.uri if self._peer is not None else ""
        self.note(Closed(session=self._session, peer=peer, steps=steps, bytes_up=up, bytes_down=down))

    def checkpoint(self, say: Callable[[Head], Seal], hear: Callable[[], Seal]) -> None:
        """Show the other end this log's head, and write down its.

        Args:
            say: sends the seal of a head and returns it.
            hear: waits for the other end's.

        Raises:
            RemoteProtocolError: SS-4031, SS-4033. CheckFailed: SS-1585. What ``say`` and ``hear`` raise.
        """
        assert self._peer is not None
        said = say(self._checkpoints.head())
        heard = hear()
        head = Head(heard.log, heard.rows, heard.head, heard.signature)
        self._checkpoints.witness(self._peer, heard.number, head)
        self._checkpoints.agreed(self._peer.session, heard.number, up=said.stream, down=heard.stream)
        self._journal.sync()

    def ended(self, *, steps: int, up: int, down: int) -> None:
        """The session is over, and so is the log.

        Raises:
            CheckFailed: SS-1585.
        """
        try:
            self.closed(steps=steps, up=up, down=down)
        finally:
            self.close()

    def close(self) -> None:
        """Close the log.

        Raises:
            CheckFailed: SS-1585.
        """
        self._journal.close()

    @property
    def _session(self) -> str:
        return self._peer.session if self._peer is not None else ""
