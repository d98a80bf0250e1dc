"""Who is connected, who has gone and since when: noted at once, taken note of when the sums have time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

__all__ = ["Presence"]


class Presence:
    """Comings and goings of clients.

    Args:
        gone: called with every name that went, by :meth:`settle`.
    """

    def __init__(self, gone: Callable[[str], None]) -> None:
        self._gone = gone
        self._moves: deque[tuple[str, float | None]] = deque()
        self._here: set[str] = set()
        self._away: dict[str, float] = {}  # Whose connection is gone, and since when.
        self._expected: set[str] = set()  # Who is away and waited for all the same, because all were gone since.

    def join(self, name: str) -> None:
        """A client is connected, for the first time or again. Returns at once."""
        self._moves.append((name, None))

    def leave(self, name: str, now: float) -> None:
        """A client's connection is gone. Returns at once."""
        self._moves.append((name, now))

    def settle(self) -> None:
        """Take note of who has come and gone."""
        while self._moves:
            name, left = self._moves.popleft()
            self._expected.discard(name)
            if left is None:
                self._away.pop(name, None)
                self._here.add(name)
                continue
            self._away[name] = left
            self._here.discard(name)
            self._gone(name)
            if not self._here:  # Who comes next begins anew, and so may the rest: the first must not leave them behind.
                self._expected = set(self._away)

    @property
    def here(self) -> frozenset[str]:
        """Who is connected, as of the last :meth:`settle`."""
        return frozenset(self._here)

    def lost(self, now: float, patience: float) -> set[str]:
        """Who has been away for more than so many seconds."""
        return {name for name, left in self._away.items() if now - left > patience}

    def given_up(self, now: float, patience: float) -> set[str]:
        """Those of them whom nobody who gathers waits for."""
        return self.lost(now, patience) - self._expected
