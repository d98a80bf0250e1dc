"""What the server's core keeps of one connection, and the rows of the audit log that tell of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from securesplit.errors import SecureSplitError
from securesplit.journal.checkpoint import NO_LOG, Checkpoints, Peer
from securesplit.journal.events import Event, Opened, Quota, Served
from securesplit.journal.seal import Head
from securesplit.pki.identity import identity_of
from securesplit.protocol.messages import Backward, DropCache, Forward, KeepAnchor, Message, Seal
from securesplit.protocol.roles import Standing
from securesplit.protocol.session import Session
from securesplit.server.course import Ask
from securesplit.server.quotas import Exceeded
from securesplit.server.sums import Outbound

__all__ = ["Answer", "Connection", "Sealed", "Together", "Told", "opened", "over", "seal_back", "served", "witnessed"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a computation gives back.

    Attributes:
        connection, client: whose request it was.
        request, reply: the reply is to be sent.
        run: the client's run, where it outlives the connection.
        again: whether the request was answered before.
    """

    connection: int
    client: str
    request: Message
    reply: Message
    run: bytes = b""
    again: bool = False


@dataclass(frozen=True, slots=True)
class Together:
    """What a computation for several clients gave: all their answers; or none, whose requests they were, and why."""

    answers: tuple[Answer, ...]
    asks: tuple[Ask, ...] = ()
    error: SecureSplitError | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """What a step of a secure sum gave, for whoever it is for."""

    outbound: list[Outbound]


@dataclass(frozen=True, slots=True)
class Sealed:
    """A client's seal that was checked and written down, and the head to answer with."""

    request: Seal
    head: Head


@dataclass(slots=True)
class Connection:
    """A client's connection.

    Attributes:
        name: of the client.
        session: its protocol.
        certificate: its leaf, DER.
        standing: what it may send.
        since: when it came, by the clock of :meth:`ServerCore.tick`.
        answered: the last request of each kind, and what was answered.
        run: what the client learns in, where that outlives the connection; else empty.
    """

    name: str
    session: Session
    certificate: bytes
    standing: Standing
    since: float
    answered: dict[type[Message], Answer] = field(default_factory=dict)
    run: bytes = b""

    @property
    def id(self) -> str:
        """The session's name, 32 hex digits."""
        assert self.session.welcome is not None
        return self.session.welcome.session.hex()


def opened(number: int, peer: Connection, *, policy: str, job: str) -> Event:
    """The client has admitted the job.

    Args:
        number, peer: the connection.
        policy: digest of what both sides agreed on.
        job: its digest.
    """
    assert peer.session.welcome is not None
    return Opened(
        connection=number, session=peer.id, peer=identity_of(peer.certificate).uri, policy=policy, job=job,
        model=peer.session.welcome.model,
    )  # fmt: skip


def served(number: int, peer: Connection, request: Message) -> Event | None:
    """The client's request was answered, or done; None for what is not a request."""
    what: Literal["forward", "decode", "backward", "drop", "anchor"]
    rows = step = size = 0
    match request:
        case Forward():
            what, step = "decode" if request.cache else "forward", request.step
            rows, size = request.hidden.shape[0], len(request.hidden.data)
        case Backward():
            what, step, rows, size = "backward", request.step, request.gradient.shape[0], len(request.gradient.data)
        case DropCache():
            what = "drop"
        case KeepAnchor():
            what = "anchor"
        case _:
            return None
    return Served(connection=number, session=peer.id, what=what, step=step, rows=rows, bytes=size)


def witnessed(peer: Connection, seal: Seal, checkpoints: Checkpoints | None) -> Sealed:
    """Write a client's head down, and take this log's own. Waits for the disk.

    Raises:
        RemoteProtocolError: SS-4033. CheckFailed: SS-1585.
    """
    if checkpoints is None:
        return Sealed(seal, NO_LOG)
    who = Peer(peer.id, identity_of(peer.certificate).uri, peer.certificate)
    checkpoints.witness(who, seal.number, Head(seal.log, seal.rows, seal.head, seal.signature))
    return Sealed(seal, checkpoints.head())


def seal_back(peer: Connection, sealed: Sealed, checkpoints: Checkpoints | None) -> None:
    """Answer a seal, and write down that both ends saw the same.

    Raises:
        CheckFailed: SS-1585.
    """
    head, asked = sealed.head, sealed.request
    said = peer.session.seal(log=head.log, rows=head.rows, head=head.hash, signature=head.signature)
    if checkpoints is not None:
        checkpoints.agreed(peer.id, asked.number, up=asked.stream, down=said.stream)


def over(number: int, peer: Connection, error: SecureSplitError) -> Event | None:
    """A client has used up a quota."""
    if not isinstance(error, Exceeded):
        return None
    uri = identity_of(peer.certificate).uri
    return Quota(quota=error.quota, code=error.code, limit=error.limit, peer=uri, connection=number)
