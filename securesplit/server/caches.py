"""Room for decoding caches: what the server may hold of texts that are being generated, and who makes room for whom.

Room is counted before anything is computed, from what one position of one sequence was measured to take, and counted again
from the tensors afterwards. Memory of all caches together stays under the budget; while rows are added, one layer's keys are
there twice.

Who makes room. A connection stands in the queue from the oldest text on for which it has had, or waited for, room; clients
take turns there (securesplit/server/turns.py), so that a second connection of one stands behind the first ones of all. A
cache may be dropped for another connection's when nobody has used it for a while, or when its owner stands behind that
one. So the first always goes on, nobody waits for one who waits for him, and two connections never drop each other's caches
in turns; and since one connection holds half of the budget at most, so does a client when others ask, by whatever number
of connections. While nobody else asks it may have everything. A client's first connection that has waited for long may
take from whoever holds as much as it would have itself, and the one that loses then goes to the end of the queue: otherwise the
first could keep everything for ever.
Who is dropped is told so (SS-4017) and builds the cache again from the bytes that it released before; who gets no
room is told to try later (SS-4040). Neither ends a session.

What this does not prevent: clients in league. Each of them has a turn, and two that are never done hold everything until
somebody has waited for long.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from securesplit.errors import RemoteProtocolError
from securesplit.model.parts import PartCache
from securesplit.server.turns import Turns

__all__ = ["POLITE", "CacheStore", "Cached", "Lane", "Room"]

POLITE = frozenset({"SS-4017", "SS-4040", "SS-4041"})
"""What is answered by ``Declined``: the step was not computed, and the session goes on."""

_CACHES = 64
"""Decoding caches of one connection, with those that were dropped or wait for room; a client needs one for each batch that it generates."""

_SPARE = 8
"""One part in so many is kept for texts that have begun to grow; those that begin leave it alone, or they would be dropped at once."""

Key = tuple[int, int]
"""A connection, and its own number for a cache."""


@dataclass(frozen=True, slots=True)
class Room:
    """What there is.

    Attributes:
        bytes: all caches together; one connection may hold half of it, and so may one client while others ask.
        positions: most positions in one cache.
        idle_seconds: unused for so long, a cache makes room before others do.
        patience_seconds: how long those before it may keep a client waiting.
    """

    bytes: int
    positions: int
    idle_seconds: float = 10.0
    patience_seconds: float = 60.0


@dataclass(slots=True)
class Lane:
    """Sequences of one cache that began equally long, and so run as one batch without a mask.

    Attributes:
        rows: which of the cache's sequences.
        past: their keys and values.
    """

    rows: tuple[int, ...]
    past: PartCache


@dataclass(slots=True)
class Cached:
    """One decoding cache.

    Attributes:
        lanes: of its sequences, by length.
        used: when, by the store's clock.
        nbytes: memory held, in bytes, by the tensors themselves when it was used last.
    """

    lanes: tuple[Lane, ...]
    used: float = 0.0
    nbytes: int = 0

    @property
    def length(self) -> int:
        """Positions of its longest sequence."""
        return max(lane.past.length for lane in self.lanes)

    @property
    def sequences(self) -> int:
        """How many sequences it has."""
        return sum(len(lane.rows) for lane in self.lanes)


@dataclass(slots=True)
class CacheStore:
    """The decoding caches of all connections. One thread uses it.

    Args:
        room: the budget.
        clock: monotonic seconds.
    """

    room: Room
    clock: Callable[[], float] = time.monotonic
    kept: OrderedDict[Key, Cached] = field(default_factory=OrderedDict)
    dropped: set[Key] = field(default_factory=set)
    _turns: Turns = field(default_factory=Turns)
    _waiting: dict[Key, float] = field(default_factory=dict)  # Since when, for those who were refused last.

    @property
    def nbytes(self) -> int:
        """Memory of all caches, in bytes."""
        return sum(cached.nbytes for cached in self.kept.values())

    def admit(self, key: Key, client: str, *, rows: int, need: int) -> Cached | None:
        """Make room for more rows, before they are computed.

        Args:
            key: the cache.
            client: whose connection it is.
            rows: positions that its longest sequence gets.
            need: bytes that all of its sequences will take more, at most.

        Returns:
            What there is of it; None when it begins.

        Raises:
            RemoteProtocolError: SS-4034 for more positions or caches than a connection may have; and, of :data:`POLITE`,
                SS-4017 when it was dropped to make room, SS-4040 when there is no room now, SS-4041 when there never is.
        """
        connection, known = key[0], self.kept.get(key)
        if key in self.dropped:
            raise RemoteProtocolError(
                "SS-4017", "the decoding cache was dropped to make room", hint="Build it again from the released rows."
            )
        if (known.length if known is not None else 0) + rows > self.room.positions:
            raise _beyond_share("positions")
        others = {*self.kept, *self.dropped, *self._waiting} - {key}
        if known is None and sum(mine == connection for mine, _ in others) >= _CACHES:
            raise _beyond_share("caches")
        if self._held(connection) + need > self.room.bytes // 2:
            raise RemoteProtocolError(
                "SS-4041",
                "the server never gives one session so much room for decoding",
                hint="Generate shorter texts, or fewer at once.",
            )
        self._make_room(key, client, need)
        return known

    def keep(self, key: Key, cached: Cached) -> None:
        """Its rows were computed: it is the one used last."""
        cached.used, cached.nbytes = self.clock(), sum(lane.past.nbytes for lane in cached.lanes)
        self.kept[key] = cached
        self.kept.move_to_end(key)
        self._waiting.pop(key, None)

    def drop(self, key: Key) -> None:
        """Its owner is done with it."""
        self.kept.pop(key, None)
        self.dropped.discard(key)
        self._waiting.pop(key, None)
        self._leave(key[0])

    def forget(self, connection: int) -> None:
        """The connection is gone."""
        for key in [key for key in (*self.kept, *self.dropped, *self._waiting) if key[0] == connection]:
            self.drop(key)
        self._turns.leave(connection)

    def _held(self, connection: int) -> int:
        return sum(cached.nbytes for (owner, _), cached in self.kept.items() if owner == connection)

    def _leave(self, connection: int) -> None:
        """Who neither holds nor waits for anything comes last the next time."""
        if not any(owner == connection for owner, _ in (*self.kept, *self.dropped, *self._waiting)):
            self._turns.leave(connection)

    def _make_room(self, key: Key, client: str, need: int) -> None:
        """Drop as much as is needed, or nothing at all."""
        now = self.clock()
        self._turns.enter(key[0], client)
        waited = key in self._waiting and now - self._waiting[key] >= self.room.patience_seconds
        begins = key not in self.kept and any(owner != key[0] for owner, _ in self.kept)
        spare = self.room.bytes // _SPARE if begins and not waited else 0  # Who has waited is not dropped at once.
        short = self.nbytes + need + spare - self.room.bytes
        victims: list[Key] = []
        ahead: set[str] = set()
        for victim, stood_ahead in self._victims(key, need, now, waited=waited) if short > 0 else ():
            victims.append(victim)
            ahead |= {self._turns.client(victim[0])} if stood_ahead else set()
            short -= self.kept[victim].nbytes
            if short <= 0:
                break
        if short > 0:
            self._waiting.setdefault(key, now)
            raise RemoteProtocolError("SS-4040", "the server has no room for another text now", hint="Try again later.")
        for victim in victims:
            del self.kept[victim]
            self.dropped.add(victim)
        for owner in sorted(ahead):
            self._turns.set_back(owner)

    def _victims(self, key: Key, need: int, now: float, *, waited: bool) -> Iterable[tuple[Key, bool]]:
        """Which caches may make room for this one, and whether each stood before it and was in use.

        In this order: unused ones; of those behind it the last ones of clients with most connections, and among these those
        of whoever holds most; and those before it.
        """
        standings, client = self._turns.standings(), self._turns.client(key[0])
        mine, held = standings[key[0]], dict[str, int]()
        for (owner, _), cached in self.kept.items():
            of = self._turns.client(owner)
            held[of] = held.get(of, 0) + cached.nbytes
        wanted = held.get(client, 0) + need
        found: list[tuple[tuple[int, int, int], Key]] = []
        for other, cached in self.kept.items():
            theirs, of = standings[other[0]], self._turns.client(other[0])
            if other == key:
                continue
            if now - cached.used >= self.room.idle_seconds:
                found.append(((0, 0, -held[of]), other))
            elif theirs > mine:
                found.append(((1, -theirs[0], -held[of]), other))
            elif waited and mine[0] == 0 and of != client and held[of] >= wanted:
                found.append(((2, 0, -held[of]), other))
        # The store is in the order of use, and sorting keeps it among equals.
        return [(other, rank[0] == 2) for rank, other in sorted(found, key=lambda one: one[0])]


def _beyond_share(of: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        "SS-4034",
        f"a client's decoding caches have more {of} than it may hold",
        hint="Generate less at a time, or fewer texts at once.",
    )
