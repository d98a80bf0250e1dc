"""The server without a network: sessions, learning turns, decoding and sums, as a function from bytes to actions.

Implements :class:`securesplit.transport.actions.Core`. What a peer sends can close that peer's connection with a code,
and never does more: every other connection goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from securesplit.admit import breaches
from securesplit.errors import RemoteProtocolError, SecureSplitError
from securesplit.policy.schema import Policy
from securesplit.protocol.codec import Caps
from securesplit.protocol.job import Job
from securesplit.protocol.messages import (
    Backward,
    Bye,
    Confirm,
    DropCache,
    Failure,
    Forward,
    Gradient,
    Hello,
    Hidden,
    KeepAnchor,
    Message,
    RoundReady,
    Secagg,
)  # fmt: skip
from securesplit.protocol.session import Party, Session
from securesplit.protocol.states import State
from securesplit.server.anchors import KeptAnchors
from securesplit.server.engine import Engine
from securesplit.server.sums import Outbound, Sums
from securesplit.server.turns import Turns
from securesplit.transport.actions import Action, Close, Send, Work
from securesplit.transport.tensors import blob_of, tensor_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a computation gives back: the request, and the reply to send."""

    request: Message
    reply: Message


@dataclass(frozen=True, slots=True)
class _Told:
    """What a step of a secure sum gave, for whoever it is for."""

    outbound: list[Outbound]


@dataclass(slots=True)
class _Connection:
    name: str
    session: Session
    certificate: bytes
    journal: dict[type[Message], _Answer] = field(default_factory=dict)


class ServerCore:
    """One job's server.

    Args:
        job: sent to every client.
        policy: the server's own limits; a client's policy is its own affair, and may be stricter.
        model: digest of the model's manifest.
        engine: B.
        sums: the secure sums.
        randomness: bytes by length, for nonces and session ids.
        kept: what clients asked to keep.
    """

    def __init__(
        self,
        job: Job,
        policy: Policy,
        *,
        model: str,
        engine: Engine,
        sums: Sums,
        randomness: Callable[[int], bytes],
        kept: KeptAnchors | None = None,
    ) -> None:
        self.job = job
        self.sums = sums
        self._policy = policy
        self._model = model
        self._engine = engine
        self._randomness = randomness
        self._kept = kept or KeptAnchors()
        self._caps = Caps(
            policy.limits.max_message_bytes,
            width=engine.middle.width,
            code_width=engine.code.width if engine.code else None,
        )
        self._connections: dict[int, _Connection] = {}
        self._sums_at: dict[str, int] = {}
        self._turns = Turns()
        self._count = 0
        self._now = 0.0
        self._clocked = False  # Whether the sums are looking at the clock just now.

    def connect(self, name: str, party: Party) -> int:
        """See :class:`Core`."""
        self._count += 1
        self._connections[self._count] = _Connection(name, Session("server", party, self._caps), party.peer)
        return self._count

    def receive(self, connection: int, data: bytes) -> list[Action]:
        """See :class:`Core`."""
        peer = self._connections.get(connection)
        if peer is None:
            return []
        try:
            message = peer.session.receive(data)
            return self._answer(connection, peer, message)
        except SecureSplitError as error:
            return self._refuse(connection, peer, error)

    def complete(self, connection: int, result: object) -> list[Action]:
        """See :class:`Core`."""
        if isinstance(result, _Told):
            return self._deliver(result.outbound)
        peer = self._connections.get(connection)
        if peer is None:
            # It went while its request was computed; what the computation kept for it is dropped.
            return [self._forget(connection)] if isinstance(result, _Answer) else []
        if isinstance(result, SecureSplitError):
            return self._refuse(connection, peer, result)
        if not isinstance(result, _Answer):
            return []
        if isinstance(result.request, Forward):
            peer.journal.clear()
        peer.journal[type(result.request)] = result
        actions = self._send(connection, result.reply)
        if isinstance(result.request, Backward):
            actions += self._next_turn(self._turns.release(connection, self._now))
        return actions

    def disconnect(self, connection: int) -> list[Action]:
        """See :class:`Core`."""
        peer = self._connections.pop(connection, None)
        if peer is None:
            return []
        others = any(c.name == peer.name and c.session.state is State.OPEN for c in self._connections.values())
        if not others or self._sums_at.get(peer.name) == connection:
            self._sums_at.pop(peer.name, None)
            self.sums.leave(peer.name, self._now)
        return [self._forget(connection), *self._next_turn(self._turns.forget(connection, self._now))]

    def tick(self, now: float) -> list[Action]:
        """See :class:`Core`."""
        self._now = now
        actions: list[Action] = []
        if not self._clocked and self.sums.due(now):
            self._clocked = True
            actions.append(Work(0, lambda: self._clock(now)))
        if (late := self._turns.overdue(now)) is not None and (peer := self._connections.get(late)) is not None:
            actions += self._refuse(
                late, peer, RemoteProtocolError("SS-4020", "a client held its learning step too long")
            )
        return actions

    def _clock(self, now: float) -> _Told:
        """Off the event loop: whom nobody waits for any more may be the last that a sum was waiting for."""
        try:
            return _Told(self.sums.tick(now))
        finally:
            self._clocked = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the clients that are connected now."""
        return tuple(c.name for c in self._connections.values())

    def _answer(self, connection: int, peer: _Connection, message: Message) -> list[Action]:
        match message:
            case Hello():
                return self._offer(connection, peer)
            case Forward():
                return self._forward(connection, peer, message)
            case Backward():
                return self._replayed(connection, peer, message) or [
                    Work(connection, lambda: self._backward(connection, message))
                ]
            case DropCache(cache=cache):
                return [Work(connection, lambda: self._drop(connection, message, cache))]
            case KeepAnchor(blob=blob):
                return [Work(connection, lambda: self._keep(peer.certificate, blob))]
            case RoundReady():
                self._sums_at[peer.name] = connection
                return [Work(connection, lambda: _Told(self.sums.ready(peer.name, message, self._now)))]
            case Secagg():
                self._sums_at[peer.name] = connection
                return [Work(connection, lambda: _Told(self.sums.receive(peer.name, message, self._now)))]
            case Bye() | Failure():
                return [Close(connection)]
            case Confirm():
                _log.info("connection %d: %s admitted the job", connection, peer.name)
                self.sums.join(peer.name)
                return []
            case _:
                raise RemoteProtocolError("SS-4010", "a client may not send this")

    def _offer(self, connection: int, peer: _Connection) -> list[Action]:
        if found := breaches(self._policy, self.job):
            _log.error("the job breaks the server's own policy: %s", "; ".join(found))
            raise RemoteProtocolError("SS-2001", "the server's policy forbids its job")
        peer.session.offer(
            session=self._randomness(16), nonce=self._randomness(32), job=self.job, model=self._model,
            anchor=self._kept.of(peer.certificate),
        )  # fmt: skip
        return self._flush(connection, peer)

    def _forward(self, connection: int, peer: _Connection, message: Forward) -> list[Action]:
        if replay := self._replayed(connection, peer, message):
            return replay
        if len(message.lengths) > self._policy.limits.max_sequences:
            raise RemoteProtocolError("SS-4021", "a batch has more sequences than the server's policy takes")
        if message.learn and not self._turns.take(connection, message, self._now):
            return []
        return [self._compute(connection, message)]

    def _compute(self, connection: int, message: Forward) -> Work:
        def run() -> _Answer:
            hidden = tensor_of(message.hidden)
            if message.cache and message.gain != 1:
                hidden *= message.gain
            output: Tensor
            if message.cache:
                output = self._engine.decode(connection, message.cache, message.lengths, hidden)
            else:
                output = self._engine.forward(
                    connection, message.step, message.lengths, hidden, gain=message.gain, learn=message.learn
                )
            return _Answer(message, Hidden(step=message.step, hidden=blob_of(output, self.job.codec)))

        return Work(connection, run)

    def _backward(self, connection: int, message: Backward) -> _Answer:
        gradient = self._engine.backward(connection, message.step, tensor_of(message.gradient))
        return _Answer(message, Gradient(step=message.step, gradient=blob_of(gradient, self.job.codec)))

    def _keep(self, certificate: bytes, blob: bytes) -> None:
        try:
            self._kept.keep(certificate, blob)
        except OSError as error:  # The client is protected by its own anchor; this one was a second line.
            _log.warning("an anchor could not be kept: %s", type(error).__name__)

    def _drop(self, connection: int, message: Message, cache: int) -> None:
        del message
        self._engine.drop_cache(connection, cache)

    def _replayed(self, connection: int, peer: _Connection, message: Message) -> list[Action]:
        """The same request again gets the same answer; the same number with other bytes is refused."""
        known = peer.journal.get(type(message))
        if known is None:
            return []
        if known.request == message:
            return self._send(connection, known.reply)
        if getattr(known.request, "step", None) == getattr(message, "step", None):
            raise RemoteProtocolError("SS-4022", "a step number came again with other contents")
        return []

    def _next_turn(self, following: tuple[int, Forward] | None) -> list[Action]:
        return [] if following is None else [self._compute(*following)]

    def _deliver(self, outbound: list[Outbound]) -> list[Action]:
        actions: list[Action] = []
        for item in outbound:
            # A client may have a second session, to generate by the same key; the sum's messages are not for that one.
            speaks = self._sums_at.get(item.to)
            for number, peer in self._connections.items():
                if peer.name == item.to and (number == speaks or speaks not in self._connections):
                    actions += self._send(number, item.message)
                    if isinstance(item.message, Failure):
                        actions.append(Close(number, item.message.code))
        return actions

    def _forget(self, connection: int) -> Work:
        return Work(connection, lambda: self._engine.forget(connection))

    def _send(self, connection: int, message: Message) -> list[Action]:
        peer = self._connections[connection]
        if peer.session.state is not State.OPEN:
            # Refused and not gone yet, or a second connection that has not said who it is for: nothing is due to it.
            return []
        peer.session.send(message)
        return self._flush(connection, peer)

    def _flush(self, connection: int, peer: _Connection) -> list[Action]:
        return [Send(connection, data) for data in peer.session.data_to_send()]

    def _refuse(self, connection: int, peer: _Connection, error: SecureSplitError) -> list[Action]:
        _log.warning("connection %d (%s) is closed: %s", connection, peer.name, error)
        peer.session.fail(error.code)
        return [*self._flush(connection, peer), Close(connection, error.code)]
