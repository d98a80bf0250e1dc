"""The server's part of the secure sums of a job: when a round begins, who is in it, and the clock.

The protocol itself is securesplit/aggregate/server.py; nothing here is trusted by the clients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from securesplit.aggregate import wire
from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.server import ServerResult, ServerRound
from securesplit.aggregate.wire import Delivery
from securesplit.errors import InputError, RemoteProtocolError
from securesplit.protocol.messages import Blob, Failure, Message, RoundBegin, RoundReady, Secagg

ConfigOf = Callable[[bytes, int, int, str], RoundConfig]
"""(run, round, dim, frozen) -> the round's parameters; built from the job and the model that the server holds."""


@dataclass(frozen=True, slots=True)
class Outbound:
    """A message for one client, by certificate name."""

    to: str
    message: Message


class Sums:
    """All rounds of one job.

    Args:
        roster: names of the clients.
        quorum: fewest clients that a round may begin with.
        stage_seconds: how long a stage may wait for its slowest client.
        gather_seconds: how long the first ready client waits for the rest of the roster.
        config_of: builds a round's parameters.
        randomness: bytes by length, for the names of runs.

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
        stage_seconds: float,
        gather_seconds: float,
        config_of: ConfigOf,
        randomness: Callable[[int], bytes],
    ) -> None:
        self.finished = 0
        self.aborted = 0
        self.last: ServerResult | None = None
        self._roster = roster
        self._quorum = quorum
        self._stage_seconds = stage_seconds
        self._gather_seconds = gather_seconds
        self._config_of = config_of
        self._randomness = randomness
        self._ready: dict[str, RoundReady] = {}
        self._since: float | None = None
        self._stage: tuple[int, float] = (0, 0.0)
        self._round: ServerRound | None = None
        self._number = 0

    def ready(self, name: str, message: RoundReady, now: float) -> list[Outbound]:
        """A client's local work is done.

        Raises:
            RemoteProtocolError: SS-6003 outside the roster, SS-6005 when a round is running or it says so twice,
                SS-6004 when it holds other adapters, or another round, than the clients that are ready.
        """
        if name not in self._roster:
            raise RemoteProtocolError("SS-6003", "a client outside the roster wants to take part in a sum")
        if self._round is not None or name in self._ready:
            raise RemoteProtocolError("SS-6005", "a client is ready for a round that has begun")
        first = next(iter(self._ready.values()), message)
        if first != message:
            raise RemoteProtocolError(
                "SS-6004", "a client is ready for another round, or with other adapters, than the rest"
            )
        self._ready[name] = message
        self._since = now if self._since is None else self._since
        return self._begin(now) if len(self._ready) == len(self._roster) else []

    def receive(self, name: str, message: Secagg, now: float) -> list[Outbound]:
        """One message of a running round.

        Raises:
            RemoteProtocolError: SS-60xx; the round stands as before.
        """
        if self._round is None or message.round != self._number:
            raise RemoteProtocolError("SS-6006", "a message belongs to a round that is not running")
        vector = (
            np.frombuffer(message.vector.data, dtype="<u4")
            if message.vector.dtype == "u32" and message.vector.shape != (0,)
            else None
        )
        return self._carry(self._round.receive(name, message.stage, message.body, vector), now)

    def leave(self, name: str, now: float) -> list[Outbound]:
        """A client is gone."""
        self._ready.pop(name, None)
        if not self._ready:
            # Nobody waits any more; whoever is ready next has the whole of the time.
            self._since = None
        return self._carry(self._round.leave(name), now) if self._round is not None else []

    def tick(self, now: float) -> list[Outbound]:
        """Look at the clock: begin without the missing, or end a stage without the slow."""
        if self._round is not None:
            return self._carry(self._round.timeout(), now) if now - self._stage[1] > self._stage_seconds else []
        if self._since is not None and now - self._since > self._gather_seconds:
            if len(self._ready) >= self._quorum:
                return self._begin(now)
            return self._give_up("SS-6010")
        return []

    def _begin(self, now: float) -> list[Outbound]:
        ready = next(iter(self._ready.values()))
        run = self._randomness(16)
        try:
            config = self._config_of(run, ready.round, ready.dim, ready.frozen)
        except InputError:
            return self._give_up("SS-6001")
        self._round, self._number, self._stage = ServerRound(config), ready.round, (wire.ADVERTISE, now)
        present = tuple(self._ready)
        self._ready, self._since = {}, None
        begin = [Outbound(name, RoundBegin(round=self._number, run=run)) for name in present]
        absent = [d for name in self._roster if name not in present for d in self._round.leave(name)]
        return begin + self._carry(absent, now)

    def _give_up(self, code: str) -> list[Outbound]:
        """No round can begin: whoever waits for it is told and let go."""
        names = tuple(self._ready)
        self._ready, self._since = {}, None
        self.aborted += 1
        return [Outbound(name, Failure(code=code)) for name in names]

    def _carry(self, deliveries: list[Delivery], now: float) -> list[Outbound]:
        running = self._round
        assert running is not None
        if running.stage != self._stage[0]:
            self._stage = (running.stage, now)
        if running.finished:
            self._round = None
            if running.result is not None:
                self.finished, self.last = self.finished + 1, running.result
            else:
                self.aborted += 1
        return [self._outbound(self._number, delivery) for delivery in deliveries]

    @staticmethod
    def _outbound(number: int, delivery: Delivery) -> Outbound:
        vector = delivery.vector if delivery.vector is not None else np.zeros(0, dtype=np.uint32)
        blob = Blob(dtype="u32", shape=(len(vector),), data=vector.astype("<u4").tobytes())
        return Outbound(delivery.to, Secagg(round=number, stage=delivery.stage, body=delivery.body, vector=blob))
