"""Room for decoding caches: what the server may hold of texts that are being generated, and who makes room for whom.

Room is counted before anything is computed, from what one position of one sequence was measured to take, and counted again
from the tensors afterwards. Memory of all caches together stays under the budget; while rows are added, one layer's keys are
there twice.

Who makes room. A connection is as old as the oldest text for which it has had, or waited for, room. A cache may be
dropped for another connection's when nobody has used it for a while, or when its owner is younger. So the oldest always
goes on, nobody waits for one who waits for him, and two connections never drop each other's caches in turns. One that has
waited for long may take from whoever holds more than it asks for itself: otherwise the first could keep everything for ever.
Who is dropped is told so (SS-4017) and builds the cache again from the bytes that it released before; who gets no
room is told to try later (SS-4040). Neither ends a session.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from securesplit.errors import RemoteProtocolError
from securesplit.model.parts import PartCache

__all__ = ["POLITE", "CacheStore", "Cached", "Lane", "Room"]

POLITE = frozenset({"SS-4017", "SS-4040", "SS-4041"})
"""What is answered by ``Declined``: the step was not computed, and the session goes on."""

_CACHES = 64
"""Decoding caches of one connection, with those that were dropped; a client needs one for each batch that it generates."""

_SPARE = 8
"""One part in so many is kept for texts that have begun to grow; those that begin leave it alone, or they would be dropped at once."""

Key = tuple[int, int]
"""A connection, and its own number for a cache."""


@dataclass(frozen=True, slots=True)
class Room:
    """What there is.

    Attributes:
        bytes: all caches together; one connection may hold half of it.
        positions: most positions in one cache.
        idle_seconds: unused for so long, a cache makes room before others do.
        patience_seconds: how long the first may keep a later one waiting.
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
class _Queue:
    """When a connection first asked for room, as a running number, and since when it has been waiting for some."""

    place: int
    waiting: float | None = None


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
    _queue: dict[int, _Queue] = field(default_factory=dict)
    _asked: int = 0

    @property
    def nbytes(self) -> int:
        """Memory of all caches, in bytes."""
        return sum(cached.nbytes for cached in self.kept.values())

    def admit(self, key: Key, *, rows: int, need: int) -> Cached | None:
        """Make room for more rows, before they are computed.

        Args:
            key: the cache.
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
        if known is None and sum(mine == connection for mine, _ in (*self.kept, *self.dropped)) >= _CACHES:
            raise _beyond_share("caches")
        if self._held(connection) + need > self.room.bytes // 2:
            raise RemoteProtocolError(
                "SS-4041",
                "the server never gives one session so much room for decoding",
                hint="Generate shorter texts, or fewer at once.",
            )
        self._make_room(key, need)
        return known

    def keep(self, key: Key, cached: Cached) -> None:
        """Its rows were computed: it is the one used last."""
        cached.used, cached.nbytes = self.clock(), sum(lane.past.nbytes for lane in cached.lanes)
        self.kept[key] = cached
        self.kept.move_to_end(key)
        self._queue[key[0]].waiting = None

    def drop(self, key: Key) -> None:
        """Its owner is done with it."""
        self.kept.pop(key, None)
        self.dropped.discard(key)
        self._leave(key[0])

    def forget(self, connection: int) -> None:
        """The connection is gone."""
        for key in [key for key in (*self.kept, *self.dropped) if key[0] == connection]:
            self.drop(key)
        self._queue.pop(connection, None)

    def _held(self, connection: int) -> int:
        return sum(cached.nbytes for (owner, _), cached in self.kept.items() if owner == connection)

    def _leave(self, connection: int) -> None:
        """Who neither holds nor waits for anything comes last the next time."""
        mine = self._queue.get(connection)
        if (
            mine is not None
            and mine.waiting is None
            and not any(owner == connection for owner, _ in (*self.kept, *self.dropped))
        ):
            del self._queue[connection]

    def _make_room(self, key: Key, need: int) -> None:
        """Drop as much as is needed, or nothing at all."""
        now = self.clock()
        if key[0] not in self._queue:
            self._asked += 1
            self._queue[key[0]] = _Queue(self._asked)
        begins = key not in self.kept and any(owner != key[0] for owner, _ in self.kept)
        short = self.nbytes + need - self.room.bytes + (self.room.bytes // _SPARE if begins else 0)
        victims: list[Key] = []
        for victim in self._victims(key, need, now) if short > 0 else ():
            victims.append(victim)
            short -= self.kept[victim].nbytes
            if short <= 0:
                break
        if short > 0:
            mine = self._queue[key[0]]
            mine.waiting = now if mine.waiting is None else mine.waiting
            raise RemoteProtocolError("SS-4040", "the server has no room for another text now", hint="Try again later.")
        for victim in victims:
            del self.kept[victim]
            self.dropped.add(victim)

    def _victims(self, key: Key, need: int, now: float) -> Iterable[Key]:
        """Which caches may make room for this one, in this order: unused ones first, then those of whoever holds most."""
        connection, mine = key[0], self._queue[key[0]]
        held: dict[int, int] = {}
        for (owner, _), cached in self.kept.items():
            held[owner] = held.get(owner, 0) + cached.nbytes
        wanted = held.get(connection, 0) + need
        waited = mine.waiting is not None and now - mine.waiting >= self.room.patience_seconds

        def idle(other: Key) -> bool:
            return now - self.kept[other].used >= self.room.idle_seconds

        def yields(other: Key) -> bool:
            if other == key:
                return False
            if idle(other):
                return True
            younger = self._queue[other[0]].place > mine.place
            return other[0] != connection and (younger or (waited and held[other[0]] > wanted))

        # The store is in the order of use, and sorting keeps it among equals.
        return sorted((k for k in self.kept if yields(k)), key=lambda k: (not idle(k), -held[k[0]]))


def _beyond_share(of: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        "SS-4034",
        f"a client's decoding caches have more {of} than it may hold",
        hint="Generate less at a time, or fewer texts at once.",
    )
