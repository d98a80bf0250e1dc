"""Clients that ask what the others hold in common: shown to the others, whose answers are handed on.

A client may ask when rounds went on without it. The others are shown that once, and once more whenever a round of theirs begins
or ends, because answers count only together, and those of two rounds do not go together. One of them is asked for the values,
the rest for a digest. Nothing here is trusted by the clients, and nothing of what they hold can be read here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from securesplit.protocol.messages import Handover, Join

__all__ = ["Latecomers"]


_ONCE_IN = 1.0
"""Seconds between two questions of one client that the others are troubled with."""


@dataclass(slots=True)
class _Waiting:
    """One that asks: its message, whom the values are asked of, and who was asked for them before, in vain."""

    join: Join
    giver: str = ""
    tried: set[str] = field(default_factory=set)


class Latecomers:
    """Of one job. Messages for others are told as (name, message)."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}
        self._asked: dict[str, float] = {}  # When each was last shown because it asked.
        self._helped: set[str] = set()  # Who was helped on, and is not ready for a sum yet.
        self._working: set[str] = set()  # Who of them has begun, and needs no more help.

    def works(self, name: str) -> bool:
        """A client has made a step: whether it was helped on just now, so that the others wait for it. Returns at once."""
        if name not in self._helped:
            return False
        self._working.add(name)
        return True

    def asks(self, name: str, join: Join, here: Iterable[str], now: float) -> list[tuple[str, Join]]:
        """A client asks, for the first time or again, by another key. One that asks all the time is shown once in a while."""
        before, others = self._waiting.get(name), sorted(set(here) - {name})
        tried = set() if before is None else before.tried | {before.giver}
        self._helped.discard(name)
        self._working.discard(name)
        self._waiting[name] = _Waiting(join, tried=set() if tried >= set(others) else tried)
        if now - self._asked.get(name, -_ONCE_IN) < _ONCE_IN:  # Whose round begins or ends is shown it all the same.
            return []
        self._asked[name] = now
        return [shown for other in others for shown in self._shown(name, other)]

    def speaks(self, name: str) -> list[tuple[str, Join]]:
        """A round of this client begins or ends: show it who asks."""
        return [shown for asker in sorted(self._waiting) for shown in self._shown(asker, name)]

    def _shown(self, asker: str, name: str) -> list[tuple[str, Join]]:
        if asker == name or asker in self._working:
            return []
        waiting = self._waiting[asker]
        if not waiting.giver and name not in waiting.tried:
            waiting.giver = name
        return [(name, waiting.join.model_copy(update={"whole": waiting.giver == name}))]

    def answers(self, name: str, handover: Handover) -> list[tuple[str, Handover]]:
        """One answer, for who asked by this key."""
        waiting = self._waiting.get(handover.to)
        if waiting is None or waiting.join.key != handover.asked or handover.of != name:
            return []
        self._helped.add(handover.to)
        return [(handover.to, handover)]

    def leaves(self, name: str) -> None:
        """A client is gone: it asks no more, and gives nothing."""
        self.ready(name)
        for waiting in self._waiting.values():
            if waiting.giver == name:
                waiting.giver = ""
                waiting.tried.add(name)

    def ready(self, name: str) -> None:
        """It is where the others are."""
        self._waiting.pop(name, None)
        self._helped.discard(name)
        self._working.discard(name)
