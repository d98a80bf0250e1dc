"""The server's part of the secure sums of a job: when a round begins, who is in it, who may come back, and the clock.

The protocol itself is securesplit/aggregate/server.py; nothing here is trusted by the clients. Adding up vectors and
taking masks off takes time, so :meth:`Sums.ready`, :meth:`Sums.receive` and :meth:`Sums.tick` are called off the event loop;
what else is called meanwhile returns at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from securesplit.aggregate import wire
from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.encryption import SumWorker
from securesplit.aggregate.roster import Verify
from securesplit.aggregate.server import ServerResult, ServerRound
from securesplit.aggregate.wire import Delivery
from securesplit.errors import AggregationAborted, InputError, RemoteProtocolError, SecureSplitError
from securesplit.protocol.messages import (
    Failure,
    Handover,
    Join,
    Message,
    RoundBegin,
    RoundKept,
    RoundReady,
    RoundStatus,
    Secagg,
)
from securesplit.protocol.words import vector_of, words_blob
from securesplit.server.closed import ClosedRuns
from securesplit.server.endings import Ending
from securesplit.server.gathering import Gathering
from securesplit.server.latecomers import Latecomers
from securesplit.server.news import News
from securesplit.server.presence import Presence

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
        closed: see :class:`Ending`; None in jobs without ``sums.attempts``, where a round that is lost ends the run and
            nobody waits for its end.
        late: whether clients may ask what the others hold in common.

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
        closed: ClosedRuns | None = None,
        late: bool = False,
    ) -> None:
        self.finished = 0
        self.aborted = 0
        self.last: ServerResult | None = None
        self._roster = roster
        self._quorum = quorum
        self._again = closed is not None
        self._ending = Ending(closed or ClosedRuns(), quorum, patience.gather, roster)
        self._news = News()
        self._late = Latecomers() if late else None
        self._left = False  # Whether somebody has gone whom those who wait should be told of.
        self._patience = patience
        self._config_of = config_of
        self._randomness = randomness
        self._worker = worker
        self._verify = verify
        self._keep = keep
        self._lock = threading.Lock()
        self._gathering = Gathering(roster, quorum, patience.gather, late=late)
        self._presence = Presence(self._gone)
        self._behind: set[str] = set()  # Whom the round goes on without.
        self._stage: tuple[int, float] = (0, 0.0)
        self._round: ServerRound | None = None
        self._past: ServerRound | None = None
        self._begun: tuple[RoundReady, RoundBegin] | None = None

    def ready(self, name: str, message: RoundReady, now: float) -> list[Outbound]:
        """A client's local work is done. Said once more, as after a lost connection, it gets the same answer.

        A client that was left behind, or was killed and begins anew, may be ready for a later round while one is running;
        its place in that one is given up then. With ``closed`` so is the place of one that is ready for the running round
        once more: it was killed, and its keys of that run are gone.

        Raises:
            RemoteProtocolError: SS-6003 outside the roster; SS-6033 when the round has its sum without this client; while a
                round is running, SS-6013 when it runs without this client, SS-6005 for the same number with other facts or
                an earlier one.
        """
        if name not in self._roster:
            raise RemoteProtocolError("SS-6003", "a client outside the roster wants to take part in a sum")
        with self._lock:
            self._presence.settle()
            self._ending.ready(name, message.round, now)
            self._news.forget(name)
            if self._late is not None and not self._owes(name) and message.round <= self._last:
                raise RemoteProtocolError("SS-6033", "a client is ready for a round that has its sum without it")
            shown = self._shown(name, ready=True)
            if self._round is not None and self._begun is not None:
                return [*shown, *self._meanwhile(name, message, self._round, *self._begun, now=now)]
            self._gathering.add(name, message, now)
            return [*shown, *self._gather(now)]

    def _meanwhile(
        self, name: str, message: RoundReady, running: ServerRound, ready: RoundReady, begin: RoundBegin, *, now: float
    ) -> list[Outbound]:
        begun = running.stage != wire.ADVERTISE or name not in running.waiting_for
        if message.round > ready.round or (self._again and message == ready and begun):
            self._gathering.add(name, message, now)
            return self._leave(name, now)
        if message != ready:
            raise RemoteProtocolError("SS-6005", "a client is ready for a round while another one is running")
        if begun:
            raise RemoteProtocolError("SS-6013", "a client is ready for a round that runs without it")
        return [Outbound(name, begin)]

    def kept(self, name: str, message: RoundKept, now: float) -> list[Outbound]:
        """A client has a round's sum on its disk, and waits until all others have; it may be asked for help until then.

        Raises:
            RemoteProtocolError: SS-6003 outside the roster; SS-4051 for a sum without this client, of a round that has none,
                or in a job without ``sums.attempts``.
        """
        if not self._again:
            raise RemoteProtocolError("SS-4051", "a client keeps a sum in a job whose rounds are tried once")
        if not {name, *message.clients} <= set(self._roster):
            raise RemoteProtocolError("SS-6003", "a client keeps a sum over clients outside the roster")
        with self._lock:
            self._presence.settle()
            self._news.forget(name)
            running = message.round if self._round is None or self._begun is None else self._begun[0].round
            if message.round > running:
                raise RemoteProtocolError("SS-4051", "a client keeps the sum of a round that has none")
            return [*self._shown(name), *self._kept(name, message, running, now)]

    def _kept(self, name: str, message: RoundKept, running: int, now: float) -> list[Outbound]:
        if self._ending.kept(name, message, now) or message.round < running:
            return [Outbound(name, RoundStatus(round=message.round, closed=True))]
        if self._round is None or self._begun is None:
            return self._gather(now)
        if not self._ending.open:  # Nobody knows yet whether it is true; the run goes on.
            return []
        if self._round.stage == wire.ADVERTISE and name in self._round.waiting_for:
            return [Outbound(name, self._begun[1])]
        # It was killed inside of this run, or the run is over fewer clients than the sum that is there already.
        return self._carry(self._round.abort("SS-6010"), now)

    def receive(self, name: str, message: Secagg, now: float) -> list[Outbound]:
        """One message of a running round; or of the last one, from a client that lost its connection and has no result.

        Raises:
            RemoteProtocolError: SS-60xx; the round stands as before. SS-6013 when it goes on without this client.
        """
        with self._lock:
            self._presence.settle()
            running, farewell = self._round or self._past, message.stage == wire.ABORT
            if running is None or message.round != running.config.round:
                if farewell:  # Of a round that is over already.
                    return []
                raise RemoteProtocolError("SS-6006", "a message belongs to a round that is not running")
            try:
                told = running.receive(name, message.stage, message.body, vector_of(message.vector))
            except AggregationAborted as error:  # Not this client's fault: the round cannot go on.
                told = running.abort(error.code)
            if not told and not farewell and (running.finished or name in self._behind):
                # It repeats what the round has already, and nothing will ever follow.
                raise RemoteProtocolError("SS-6013", "a client came back to a round that goes on without it")
            return [self._outbound(message.round, d) for d in told] if self._round is None else self._carry(told, now)

    def asks(self, name: str, message: Join, now: float) -> list[Outbound]:
        """A client that was away asks what the others hold in common; told whether rounds went on without it.

        Raises:
            RemoteProtocolError: SS-6003 in another's name; SS-4052 in a job that hands nothing over.
        """
        late = self._latecomers(name, message.name)
        with self._lock:
            self._presence.settle()
            self._ending.witness(message.round)
            behind = message.round < self._next(name)
            status = Outbound(name, RoundStatus(round=message.round, closed=behind))
            shown = late.asks(name, message, self._presence.here & set(self._roster), now) if behind else []
            return [status, *(Outbound(*one) for one in shown)]

    def answers(self, name: str, message: Handover, now: float) -> list[Outbound]:
        """What one client hands over to another that asked.

        Raises:
            RemoteProtocolError: as :meth:`asks`.
        """
        late = self._latecomers(name, message.of)
        with self._lock:
            given = late.answers(name, message)
            if given:
                self._gathering.helped = now
            return [Outbound(*one) for one in given]

    def _latecomers(self, name: str, said: str) -> Latecomers:
        if self._late is None:
            raise RemoteProtocolError("SS-4052", "a client comes late in a job that hands nothing over")
        if name not in self._roster or said != name:
            raise RemoteProtocolError("SS-6003", "a client outside the roster, or in another's name, comes late")
        return self._late

    def _next(self, name: str) -> int:
        """The round that a client begins next when it was in all that this server knows of."""
        if self._owes(name):
            return self._ending.number
        # Of fewer clients than make a quorum with this one the word is not enough: one alone could keep all from beginning.
        waits = sorted((number for other, number in self._gathering.rounds.items() if other != name), reverse=True)
        known, begun = [self._last + 1, *waits[self._quorum - 2 :][:1]], self._begun
        return max(known if self._round is None or begun is None else [*known, begun[0].round])

    @property
    def _last(self) -> int:
        """The last round that had a sum, as far as it is of the clients that are here."""
        return self._ending.number if self._ending.witnessed else -1

    def _owes(self, name: str) -> bool:
        """Whether it may have lost a sum that it is in, and is helped to it."""
        return self._ending.open and self._ending.witnessed and name in self._ending.clients

    def _shown(self, name: str, *, ready: bool = False) -> list[Outbound]:
        """Who comes late is shown to a client whose round begins or ends."""
        if self._late is None:
            return []
        if ready:
            self._late.ready(name)
        return [Outbound(*one) for one in self._late.speaks(name)]

    def works(self, name: str, now: float, *, awaited: bool) -> None:
        """A client has made a step. If the others wait for it, whoever gathers waits from now on. Returns at once."""
        if awaited:
            self._gathering.worked = now
        if self._late is not None and self._late.works(name):
            self._gathering.helped = now

    def join(self, name: str) -> None:
        """A client is connected, for the first time or again. Returns at once."""
        self._presence.join(name)

    def leave(self, name: str, now: float) -> None:
        """A client's connection is gone; it may come back for a while. Returns at once."""
        self._presence.leave(name, now)

    def due(self, now: float) -> bool:
        """Whether :meth:`tick` would do anything. Returns at once, and changes nothing that others wait for."""
        if not self._lock.acquire(blocking=False):
            return False  # Somebody's vector is being added; the clock is looked at again soon.
        try:
            self._presence.settle()
            if self._round is None:
                if self._left or self._ending.open or self._ending.due(self._gathering, now):
                    return self._left or self._ending.due(self._gathering, now)
                return self._gathering.due(self._presence.given_up(now, self._patience.reconnect), now)
            return (
                bool(self._presence.lost(now, self._patience.reconnect) - self._behind)
                or now - self._stage[1] > self._patience.stage
            )
        finally:
            self._lock.release()

    def tick(self, now: float) -> list[Outbound]:
        """Look at the clock: begin without the missing, or go on without the lost and the slow."""
        if not self._lock.acquire(blocking=False):
            return []
        try:
            self._presence.settle()
            return self._run_stage(now) if self._round is not None else self._gather(now)
        finally:
            self._lock.release()

    def _gone(self, name: str) -> None:
        self._gathering.drop(name)
        self._ending.drop(name)
        self._news.forget(name)
        if self._late is not None:
            self._late.leaves(name)
        self._left = self._again

    def _run_stage(self, now: float) -> list[Outbound]:
        told: list[Outbound] = []
        for name in sorted(self._presence.lost(now, self._patience.reconnect) - self._behind):
            told += self._leave(name, now)
        if self._round is not None and now - self._stage[1] > self._patience.stage:
            told += self._carry(self._round.timeout(), now)
        return told

    def _leave(self, name: str, now: float) -> list[Outbound]:
        if self._round is None:
            return []
        self._behind.add(name)
        return self._carry(self._round.leave(name), now)

    def _gather(self, now: float) -> list[Outbound]:
        told = self._give_up(gone, "SS-6010") if (gone := self._ending.hear(self._gathering.rounds, now)) else []
        return [*told, *(self._end(now) if self._ending.open else self._take(now))]

    def _take(self, now: float) -> list[Outbound]:
        if not self._gathering.due(self._presence.given_up(now, self._patience.reconnect), now):
            return self._status(set(self._roster) - set(self._gathering.rounds))
        group, enough = self._gathering.take()
        others = [Outbound(name, Failure(code="SS-6004")) for name in group.others]
        if not enough and others and self._late is not None:  # They come back where these are, and are waited for.
            for name in group.names:
                self._gathering.add(name, group.message, now)
            return others
        if not enough:
            return [*others, *self._give_up(group.names, "SS-6004" if others else "SS-6010")]
        return [*others, *self._begin(group.message, group.names, now)]

    def _end(self, now: float) -> list[Outbound]:
        """A round has its sum: make it once more for those who lack it, and close it when nobody does."""
        move = self._ending.move(self._gathering, now)
        told = self._status(move.missing)
        if move.again:
            ready = self._gathering.pick(move.again)
            return [*told, *self._begin(ready, self._ending.again(), now)]
        if move.void:
            self._ending.void()
            return [*told, *self._gather(now)]
        if move.refused:
            self._ending.refuse(self._gathering, now)
            told += self._give_up(move.refused, move.code)
        if not move.closes:
            return told
        status = RoundStatus(round=self._ending.number, closed=True, missing=self._ending.missing)
        told += [Outbound(name, status) for name in self._ending.close()]
        return told if status.missing else [*told, *self._gather(now)]

    def _status(self, missing: AbstractSet[str]) -> list[Outbound]:
        """Those who wait are told for whom, in jobs whose rounds are tried again."""
        self._left = False
        if not self._again:
            return []
        waits = self._gathering.rounds | dict.fromkeys(self._ending.waiting, self._ending.number)
        return [Outbound(*news) for news in self._news.of(waits, missing)]

    def _begin(self, ready: RoundReady, present: tuple[str, ...], now: float) -> list[Outbound]:
        run = self._randomness(16)
        try:
            config = self._config_of(run, ready)
        except InputError:
            return self._give_up(present, "SS-6001")
        except SecureSplitError as error:  # The group has been taken already; it must not wait for what never comes.
            return self._give_up(present, error.code)
        self._round, self._past = ServerRound(config, self._verify, worker=self._worker), None
        self._stage, self._behind = (wire.ADVERTISE, now), set()
        self._begun = ready, RoundBegin(round=ready.round, run=run)
        told = [Outbound(name, self._begun[1]) for name in present]
        for name in self._roster:
            if name not in present:
                told += self._leave(name, now)
        return told

    def _give_up(self, names: tuple[str, ...], code: str) -> list[Outbound]:
        """No round can begin: whoever waits for it is told and let go."""
        self.aborted += 1
        return [Outbound(name, Failure(code=code)) for name in names]

    def _carry(self, deliveries: list[Delivery], now: float) -> list[Outbound]:
        running, begun = self._round, self._begun
        assert running is not None
        assert begun is not None
        told: list[Outbound] = []
        if running.stage != self._stage[0]:
            self._stage = (running.stage, now)
        if running.finished:
            self._round, self._past = None, running
            self._gathering.restart(now)
            self._keep(running)
            if running.result is not None:
                self.finished, self.last = self.finished + 1, running.result
                if self._again:
                    told += self._summed(begun[1], running.result.survivors, now)
            else:
                self.aborted += 1
        return [*(self._outbound(begun[1].round, delivery) for delivery in deliveries), *told]

    def _summed(self, begun: RoundBegin, clients: tuple[str, ...], now: float) -> list[Outbound]:
        self._ending.summed(begun.round, begun.run, clients, now)
        late = tuple(name for name in self._gathering.wanting(begun.round) if name not in self._ending.clients)
        if late:  # Killed before it gave its update, and back before the others were through.
            self._gathering.pick(late)
        return [Outbound(name, Failure(code="SS-6033")) for name in late]

    @staticmethod
    def _outbound(number: int, delivery: Delivery) -> Outbound:
        vector = words_blob(delivery.vector)
        return Outbound(delivery.to, Secagg(round=number, stage=delivery.stage, body=delivery.body, vector=vector))
