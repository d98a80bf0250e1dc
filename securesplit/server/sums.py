"""The server's part of the secure sums of a job: when a round begins, who is in it, who may come back, and the clock.

The protocol itself is securesplit/aggregate/server.py; nothing here is trusted by the clients. Adding up vectors and
taking masks off takes time, so :meth:`Sums.ready` and :meth:`Sums.receive` are called off the event loop; what else is
called meanwhile waits for its turn without holding the loop up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from securesplit.aggregate import wire
from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.encryption import SumWorker
from securesplit.aggregate.roster import Verify
from securesplit.aggregate.server import ServerResult, ServerRound
from securesplit.aggregate.wire import Delivery
from securesplit.errors import AggregationAborted, InputError, RemoteProtocolError
from securesplit.protocol.messages import Failure, Message, RoundBegin, RoundReady, Secagg
from securesplit.protocol.words import vector_of, words_blob

RECONNECT_SECONDS = 10.0

ConfigOf = Callable[[bytes, RoundReady], RoundConfig]
"""(run, what the clients are ready for) -> the round's parameters, from the job and the model that the server holds."""


@dataclass(frozen=True, slots=True)
class Outbound:
    """A message for one client, by certificate name."""

    to: str
    message: Message


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds.

    Attributes:
        stage: for the slowest client of a stage.
        gather: for the rest of the roster, once the first client is ready.
        reconnect: for a client whose connection broke.
    """

    stage: float
    gather: float
    reconnect: float


class Sums:
    """All rounds of one job.

    Args:
        roster: names of the clients.
        quorum: fewest clients that a round may begin with.
        patience: how long to wait.
        config_of: builds a round's parameters.
        randomness: bytes by length, for the names of runs.
        worker: adds ciphertexts, in jobs with homomorphic encryption.
        verify: checks what clients sign; see :class:`ServerRound`.
        keep: told of every round that has ended.

    Attributes:
        finished: number of rounds that ended with a sum.
        aborted: number of rounds that ended without one.
        last: result of the last round; in blind rounds it is uniform noise to this server.
    """

    def __init__(
        self,
        *,
        roster: tuple[str, ...],
        quorum: int,
        patience: Patience,
        config_of: ConfigOf,
        randomness: Callable[[int], bytes],
        worker: SumWorker | None = None,
        verify: Verify | None = None,
        keep: Callable[[ServerRound], None] = lambda _round: None,
    ) -> None:
        self.finished = 0
        self.aborted = 0
        self.last: ServerResult | None = None
        self._roster = roster
        self._quorum = quorum
        self._patience = patience
        self._config_of = config_of
        self._randomness = randomness
        self._worker = worker
        self._verify = verify
        self._keep = keep
        self._lock = threading.Lock()
        self._moves: deque[tuple[str, float | None]] = deque()
        self._away: dict[str, float] = {}
        self._ready: dict[str, RoundReady] = {}
        self._since: float | None = None
        self._stage: tuple[int, float] = (0, 0.0)
        self._round: ServerRound | None = None
        self._past: ServerRound | None = None
        self._begun: tuple[RoundReady, RoundBegin] | None = None

    def ready(self, name: str, message: RoundReady, now: float) -> list[Outbound]:
        """A client's local work is done. Said once more, as after a lost connection, it gets the same answer.

        Raises:
            RemoteProtocolError: SS-6003 outside the roster, SS-6005 when a round is running, SS-6013 when it runs without
                this client, SS-6004 when it holds other adapters, or another round, than the clients that are ready.
        """
        if name not in self._roster:
            raise RemoteProtocolError("SS-6003", "a client outside the roster wants to take part in a sum")
        with self._lock:
            self._settle()
            if self._round is not None and self._begun is not None:
                return self._begun_for(name, message, self._round, *self._begun)
            first = next(iter(self._ready.values()), message)
            if first != message:
                raise RemoteProtocolError(
                    "SS-6004", "a client is ready for another round, or with other adapters, than the rest"
                )
            self._ready[name] = message
            self._since = now if self._since is None else self._since
            return self._begin(now) if len(self._ready) == len(self._roster) else []

    @staticmethod
    def _begun_for(
        name: str, message: RoundReady, running: ServerRound, ready: RoundReady, begin: RoundBegin
    ) -> list[Outbound]:
        if message == ready and running.stage == wire.ADVERTISE and name in running.waiting_for:
            return [Outbound(name, begin)]
        if message == ready:
            raise RemoteProtocolError("SS-6013", "a client is ready for a round that runs without it")
        raise RemoteProtocolError("SS-6005", "a client is ready for a round while another one is running")

    def receive(self, name: str, message: Secagg, now: float) -> list[Outbound]:
        """One message of a running round; or of the last one, from a client that lost its connection and has no result.

        Raises:
            RemoteProtocolError: SS-60xx; the round stands as before.
        """
        with self._lock:
            self._settle()
            self._away.pop(name, None)
            running = self._round or self._past
            if running is None or message.round != running.config.round:
                raise RemoteProtocolError("SS-6006", "a message belongs to a round that is not running")
            try:
                told = running.receive(name, message.stage, message.body, vector_of(message.vector))
            except AggregationAborted as error:  # Not this client's fault: the round cannot go on.
                told = running.abort(error.code)
            return [self._outbound(message.round, d) for d in told] if self._round is None else self._carry(told, now)

    def join(self, name: str) -> None:
        """A client is connected, for the first time or again. Returns at once."""
        self._moves.append((name, None))

    def leave(self, name: str, now: float) -> None:
        """A client's connection is gone; it may come back for a while. Returns at once."""
        self._moves.append((name, now))

    def tick(self, now: float) -> list[Outbound]:
        """Look at the clock: begin without the missing, or go on without the lost and the slow. Returns at once."""
        if not self._lock.acquire(blocking=False):
            return []  # Somebody's vector is being added; the clock is looked at again soon.
        try:
            self._settle()
            return self._run_stage(now) if self._round is not None else self._gather(now)
        finally:
            self._lock.release()

    def _settle(self) -> None:
        """Take note of who has come and gone."""
        while self._moves:
            name, left = self._moves.popleft()
            if left is None:
                self._away.pop(name, None)
                continue
            self._away[name] = left
            self._ready.pop(name, None)
            if not self._ready:
                # Nobody waits any more; whoever is ready next has the whole of the time.
                self._since = None

    def _lost(self, now: float) -> set[str]:
        return {name for name, left in self._away.items() if now - left > self._patience.reconnect}

    def _run_stage(self, now: float) -> list[Outbound]:
        assert self._round is not None
        told: list[Outbound] = []
        for name in sorted(self._lost(now)):
            if self._round is not None:
                told += self._carry(self._round.leave(name), now)
        if self._round is not None and now - self._stage[1] > self._patience.stage:
            told += self._carry(self._round.timeout(), now)
        return told

    def _gather(self, now: float) -> list[Outbound]:
        if self._since is None:
            return []
        missing = set(self._roster) - set(self._ready)
        enough = len(self._ready) >= self._quorum
        if now - self._since > self._patience.gather or (missing <= self._lost(now) and enough):
            return self._begin(now) if enough else self._give_up("SS-6010")
        return []

    def _begin(self, now: float) -> list[Outbound]:
        ready = next(iter(self._ready.values()))
        run = self._randomness(16)
        try:
            config = self._config_of(run, ready)
        except InputError:
            return self._give_up("SS-6001")
        self._round, self._stage = ServerRound(config, self._verify, worker=self._worker), (wire.ADVERTISE, now)
        self._begun = ready, RoundBegin(round=ready.round, run=run)
        present = tuple(self._ready)
        self._ready, self._since, self._past = {}, None, None
        begin = [Outbound(name, self._begun[1]) for name in present]
        absent = [d for name in self._roster if name not in present for d in self._round.leave(name)]
        return begin + self._carry(absent, now)

    def _give_up(self, code: str) -> list[Outbound]:
        """No round can begin: whoever waits for it is told and let go."""
        names = tuple(self._ready)
        self._ready, self._since = {}, None
        self.aborted += 1
        return [Outbound(name, Failure(code=code)) for name in names]

    def _carry(self, deliveries: list[Delivery], now: float) -> list[Outbound]:
        running, begun = self._round, self._begun
        assert running is not None
        assert begun is not None
        if running.stage != self._stage[0]:
            self._stage = (running.stage, now)
        if running.finished:
            self._round, self._past = None, running
            self._keep(running)
            if running.result is not None:
                self.finished, self.last = self.finished + 1, running.result
            else:
                self.aborted += 1
        return [self._outbound(begun[1].round, delivery) for delivery in deliveries]

    @staticmethod
    def _outbound(number: int, delivery: Delivery) -> Outbound:
        vector = words_blob(delivery.vector)
        return Outbound(delivery.to, Secagg(round=number, stage=delivery.stage, body=delivery.body, vector=vector))
