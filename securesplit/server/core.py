"""The server without a network: sessions, learning turns, decoding and sums, as a function from bytes to actions.

Implements :class:`securesplit.transport.actions.Core`. What a peer sends can close that peer's connection with a code,
and never does more: every other connection goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from securesplit.admit import breaches
from securesplit.errors import ConnectionFailed, RemoteProtocolError, SecureSplitError
from securesplit.journal.checkpoint import Checkpoints
from securesplit.journal.events import Event
from securesplit.policy.schema import Gaussian, Policy
from securesplit.protocol.codec import Caps
from securesplit.protocol.job import Job
from securesplit.protocol.messages import (
    Backward,
    Bye,
    Confirm,
    Declined,
    DropCache,
    Failure,
    Forward,
    Handover,
    Hello,
    Join,
    KeepAnchor,
    Mark,
    Message,
    RoundKept,
    RoundReady,
    Run,
    Seal,
    Secagg,
)  # fmt: skip
from securesplit.protocol.roles import Standing, require_right
from securesplit.protocol.session import Party, Session
from securesplit.protocol.states import State
from securesplit.server.anchors import KeptAnchors
from securesplit.server.connection import (
    Answer,
    Connection,
    Sealed,
    Together,
    Told,
    opened,
    over,
    seal_back,
    served,
    witnessed,
)
from securesplit.server.course import Ask
from securesplit.server.engine import Engine
from securesplit.server.former import FormerStates
from securesplit.server.learning import Learning
from securesplit.server.marks import Marks, slots_of
from securesplit.server.quotas import Quotas
from securesplit.server.requests import Requests
from securesplit.server.speakers import Speakers
from securesplit.server.steps import Steps
from securesplit.server.sums import Outbound, Sums
from securesplit.transport.actions import Action, Close, Send, Work
from securesplit.transport.limits import Limits

_log = logging.getLogger(__name__)


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
        limits: what each client may use, and who besides the roster may connect.
        note: writes a row of the audit log; raises when it cannot, and then what it tells of is not done.
        checkpoints: shows clients the head of the audit log, and keeps theirs.
        steps: does what learns, and remembers it; by default in memory alone.
        former: where B's states lie that checkpoints name; by default in memory alone.
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
        limits: Limits | None = None,
        note: Callable[[Event], None] = lambda _event: None,
        checkpoints: Checkpoints | None = None,
        steps: Steps | None = None,
        former: FormerStates | None = None,
    ) -> None:
        self.job = job
        self.sums = sums
        self._policy = policy
        self._model = model
        self._engine = engine
        self._randomness = randomness
        self._kept = kept or KeptAnchors()
        uniform = job.mode.weighting == "uniform"
        self.steps = steps or Steps(lambda: self._engine, job.codec, uniform=uniform)
        self._marks = Marks(lambda: self._engine, slots_of(job), job.sums.roster, former)
        self._work = Requests(lambda: self._engine, self._kept, job.codec, self.steps, self._marks)
        self._limits = limits or Limits()
        self.quotas = Quotas(self._limits)
        self._note = note
        self._checkpoints = checkpoints
        self._caps = Caps(
            policy.limits.max_message_bytes,
            width=engine.middle.width,
            code_width=engine.code.width if engine.code else None,
        )
        self._connections: dict[int, Connection] = {}
        self._speakers = Speakers(sums)
        self._learning = Learning(job, self.steps, self._work, self._connections)
        self._count = 0
        self._now = 0.0
        self._clocked = False  # Whether the sums are looking at the clock just now.

    def welcome(self, name: str) -> None:
        """See :class:`Core`."""
        if self._standing(name) is None:
            raise ConnectionFailed(
                "SS-3214",
                "this client is neither on the job's roster nor a guest",
                hint="Ask the server's operator to add it; its certificate is in order.",
            )

    def connect(self, name: str, party: Party) -> int:
        """See :class:`Core`."""
        self._count += 1
        session = Session("server", party, self._caps)
        self._connections[self._count] = Connection(
            name, session, party.peer, self._standing(name) or "guest", self._now
        )
        return self._count

    def allowance(self, connection: int, start: bytes) -> int:
        """See :class:`Core`."""
        peer = self._connections.get(connection)
        return 0 if peer is None else peer.session.allowance(start)

    def reject(self, connection: int, error: SecureSplitError) -> list[Action]:
        """See :class:`Core`."""
        peer = self._connections.get(connection)
        return [Close(connection, error.code)] if peer is None else self._refuse(connection, peer, error)

    def receive(self, connection: int, data: bytes) -> list[Action]:
        """See :class:`Core`."""
        peer = self._connections.get(connection)
        if peer is None:
            return []
        try:
            self.quotas.charge(peer.name, len(data))
            message = peer.session.receive(data)
            require_right(peer.standing, message)
            self.quotas.charge(peer.name, 0, message)
            if isinstance(message, Seal):
                return [Work(connection, lambda: witnessed(peer, message, self._checkpoints), apart=True)]
            return self._answer(connection, peer, message)
        except SecureSplitError as error:
            return self._refuse(connection, peer, error)

    def complete(self, connection: int, result: object) -> list[Action]:
        """See :class:`Core`."""
        if isinstance(result, Told):
            due = self._learning.summed(result.outbound, self.sums.finished, self._now)
            return [*due, *self._deliver(result.outbound)]
        peer = self._connections.get(connection)
        if isinstance(result, Together):
            return [action for answer in result.answers for action in self._answered(answer)] + [
                action for ask in result.asks for action in self._failed(ask, result)
            ]
        if isinstance(result, Answer):
            return self._answered(result)
        if peer is None:
            return []
        if isinstance(result, SecureSplitError):
            return self._refuse(connection, peer, result)
        return self._seal(connection, peer, result) if isinstance(result, Sealed) else []

    def _answered(self, answer: Answer) -> list[Action]:
        connection, request = answer.connection, answer.request
        peer = self._connections.get(connection)
        if peer is None:
            return self._learning.too_late(answer, self._now)
        if isinstance(answer.reply, Declined):  # Not an answer: the same request again is computed.
            _log.info("connection %d (%s) is declined a decoding step: %s", connection, peer.name, answer.reply.code)
            return self._send(connection, answer.reply)
        if isinstance(request, Forward):
            peer.answered.clear()
        try:
            if not answer.again:
                self._served(connection, peer, request)
        except SecureSplitError as error:  # What cannot be written down is not answered.
            return self._refuse(connection, peer, error)
        if not answer.run:
            peer.answered[type(request)] = answer
        actions = self._send(connection, answer.reply)
        # In mode sequential the others are ready at once, and wait for all of its steps.
        learns_alone = isinstance(request, Backward) and self.job.mode.mode == "sequential"
        self.sums.works(peer.name, self._now, awaited=learns_alone)
        return actions + self._learning.answered(answer, self._now)

    def _failed(self, ask: Ask, result: Together) -> list[Action]:
        peer = self._connections.get(ask.connection)
        assert result.error is not None
        return [] if peer is None else self._refuse(ask.connection, peer, result.error)

    def disconnect(self, connection: int) -> list[Action]:
        """See :class:`Core`."""
        peer = self._connections.pop(connection, None)
        if peer is None:
            return []
        others = any(c.name == peer.name and c.session.state is State.OPEN for c in self._connections.values())
        self._speakers.gone(peer.name, connection, others=others, now=self._now)
        return self._learning.lost(connection, peer, self._now)

    def tick(self, now: float) -> list[Action]:
        """See :class:`Core`."""
        self._now = now
        actions: list[Action] = []
        if not self._clocked and self.sums.due(now):
            self._clocked = True
            actions.append(Work(0, lambda: self._clock(now)))
        looked = self._learning.tick(now)
        for connection in looked.late:
            slow = RemoteProtocolError("SS-4020", "a client held its learning step too long")
            actions += self._refuse(connection, self._connections[connection], slow)
        return [*actions, *looked.actions, *self._unfinished(now)]

    def _served(self, connection: int, peer: Connection, request: Message) -> None:
        if (row := served(connection, peer, request)) is not None:
            self._note(row)

    def _unfinished(self, now: float) -> list[Action]:
        """Clients that have connected and not admitted the job: each holds a place, and none may hold it for ever."""
        actions: list[Action] = []
        patience = self._limits.handshakes.greeting_seconds
        for number, peer in list(self._connections.items()):
            peer.since = peer.since or now  # The clock may not have been looked at when it connected.
            opening = peer.session.state not in {State.OPEN, State.CLOSED}
            if opening and now - peer.since > patience:
                late = ConnectionFailed("SS-3053", "a client did not finish its greeting")
                actions += self._refuse(number, peer, late)
        return actions

    def _standing(self, name: str) -> Standing | None:
        if name in self.job.sums.roster:
            return "trainer"
        return "guest" if name in self._limits.guests else None

    def _clock(self, now: float) -> Told:
        """Off the event loop: whom nobody waits for any more may be the last that a sum was waiting for."""
        try:
            return Told(self.sums.tick(now))
        finally:
            self._clocked = False

    @property
    def engine(self) -> Engine:
        """B."""
        return self._engine

    @property
    def former(self) -> FormerStates:
        """States of B that checkpoints name."""
        return self._marks.states

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the clients that are connected now."""
        return tuple(c.name for c in self._connections.values())

    def _answer(self, connection: int, peer: Connection, message: Message) -> list[Action]:
        match message:
            case Hello():
                return self._offer(connection, peer)
            case Forward():
                return self._forward(connection, peer, message)
            case Backward():
                return self._replayed(connection, peer, message) or self._learning.asked(
                    connection, peer, message, self._now
                )
            case Run():
                return self._learning.enters(connection, peer, message.run, self._now)
            case DropCache() | KeepAnchor() | Mark():
                return [self._kept_or_dropped(connection, peer, message)]
            case RoundReady() | RoundKept() | Join() | Handover() | Secagg():
                self._speakers.speaks(peer.name, connection)
                due = self._learning.rests(peer.name, self._now) if isinstance(message, RoundReady) else []
                return [*due, Work(connection, lambda: Told(self._speakers.said(peer.name, message, self._now)))]
            case Bye() | Failure():
                return [Close(connection), *self._learning.leaves(connection, peer, self._now)]
            case Confirm():
                agreed = peer.session.agreed
                _log.info("connection %d: %s admitted the job, under policy %s", connection, peer.name, agreed[:16])
                self._note(opened(connection, peer, policy=agreed, job=self.job.digest))
                self.sums.join(peer.name)
                return []
            case _:
                raise RemoteProtocolError("SS-4010", "a client may not send this")

    def _kept_or_dropped(self, connection: int, peer: Connection, message: DropCache | KeepAnchor | Mark) -> Work:
        if isinstance(message, Mark):
            self._marks.admit(message)
            return self._work.mark(connection, peer.name, message)
        self._served(connection, peer, message)
        if isinstance(message, DropCache):
            return self._work.drop(connection, message)
        return self._work.keep(connection, peer.certificate, message)

    def _offer(self, connection: int, peer: Connection) -> list[Action]:
        if found := breaches(self._policy, self.job):
            _log.error("the job breaks the server's own policy: %s", "; ".join(found))
            raise RemoteProtocolError("SS-2001", "the server's policy forbids its job")
        peer.session.offer(
            session=self._randomness(16), nonce=self._randomness(32), job=self.job, model=self._model,
            anchor=self._kept.of(peer.certificate), policy=self._policy,
        )  # fmt: skip
        return self._flush(connection, peer)

    def _forward(self, connection: int, peer: Connection, message: Forward) -> list[Action]:
        if replay := self._replayed(connection, peer, message):
            return replay
        if len(message.lengths) > self._policy.limits.max_sequences:
            raise RemoteProtocolError("SS-4021", "a batch has more sequences than the server's policy takes")
        # Without noise a prompt is not padded, and may be longer than a bucket; the engine's cap on a cache holds for it.
        bucketed = not message.cache or isinstance(self._policy.privacy, Gaussian)
        if bucketed and max(message.lengths) > max(self._policy.limits.buckets):
            raise RemoteProtocolError("SS-4029", "a sequence is longer than any bucket of the server's policy")
        if message.cache:
            return [self._work.decode(connection, peer.name, message)]
        if self._marks.chosen(connection):
            if message.learn:
                raise RemoteProtocolError("SS-4096", "a session that computes with a former state may not learn")
            return [self._work.run((Ask(connection, peer.name, message),))]  # It waits for no mean of what learns.
        return self._learning.asked(connection, peer, message, self._now)

    def _replayed(self, connection: int, peer: Connection, message: Message) -> list[Action]:
        """The same request again gets the same answer; the same number with other bytes is refused."""
        known = peer.answered.get(type(message))
        if known is None:
            return []
        if known.request == message:
            return self._send(connection, known.reply)
        if getattr(known.request, "step", None) == getattr(message, "step", None):
            raise RemoteProtocolError("SS-4022", "a step number came again with other contents")
        return []

    def _deliver(self, outbound: list[Outbound]) -> list[Action]:
        actions: list[Action] = []
        names = {number: peer.name for number, peer in self._connections.items()}
        for number, message in self._speakers.addressed(outbound, names):
            actions += self._send(number, message)
            if isinstance(message, Failure):
                actions.append(Close(number, message.code))
        return actions

    def _seal(self, connection: int, peer: Connection, sealed: Sealed) -> list[Action]:
        if peer.session.state is not State.OPEN:
            return []
        try:
            seal_back(peer, sealed, self._checkpoints)
        except SecureSplitError as error:
            return self._refuse(connection, peer, error)
        return self._flush(connection, peer)

    def _send(self, connection: int, message: Message) -> list[Action]:
        peer = self._connections[connection]
        if peer.session.state is not State.OPEN:
            # Refused and not gone yet, or a second connection that has not said who it is for: nothing is due to it.
            return []
        peer.session.send(message)
        return self._flush(connection, peer)

    def _flush(self, connection: int, peer: Connection) -> list[Action]:
        return [Send(connection, data) for data in peer.session.data_to_send()]

    def _refuse(self, connection: int, peer: Connection, error: SecureSplitError) -> list[Action]:
        _log.warning("connection %d (%s) is closed: %s", connection, peer.name, error)
        if (row := over(connection, peer, error)) is not None:
            try:
                self._note(row)
            except SecureSplitError as fault:  # It is refused all the same; the shell finds out that the log is broken.
                _log.error("the audit log did not take a refusal: %s", fault)
        peer.session.fail(error.code)
        return [*self._flush(connection, peer), Close(connection, error.code)]
