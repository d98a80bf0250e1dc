"""Whom a learning step waits for: everybody on the roster who owes one, and has not been away for too long.

A client rests from the moment when it is ready for a secure sum until that sum is over, and after it has said goodbye. One
that is waited for in vain is absent, and nobody waits for it any more until it asks for a step again: so clients may come
late, leave, and come back.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["Attendance", "Presence"]


class Presence(Enum):
    """What is known of a client."""

    EXPECTED = "expected"
    RESTS = "rests"
    LEFT = "left"
    ABSENT = "absent"


class Attendance:
    """Of one job.

    Args:
        roster: all clients.
        patience: seconds that others wait for one who owes a step.
    """

    def __init__(self, roster: tuple[str, ...], patience: float) -> None:
        self._patience = patience
        self._presence = dict.fromkeys(sorted(roster), Presence.EXPECTED)
        self._waiting: dict[int, float] = {}  # What is waited for, and since when.

    @property
    def roster(self) -> tuple[str, ...]:
        """All clients; guests are none of them."""
        return tuple(self._presence)

    @property
    def expected(self) -> tuple[str, ...]:
        """Who owes a step, in the roster's order."""
        return tuple(name for name, presence in self._presence.items() if presence is Presence.EXPECTED)

    @property
    def absent(self) -> tuple[str, ...]:
        """Whom nobody waits for any more."""
        return tuple(name for name, presence in self._presence.items() if presence is Presence.ABSENT)

    def comes(self, name: str) -> None:
        """It asks for a step."""
        self._presence[name] = Presence.EXPECTED

    def rests(self, name: str) -> None:
        """It is ready for a secure sum."""
        if self._presence[name] is not Presence.LEFT:
            self._presence[name] = Presence.RESTS

    def leaves(self, name: str) -> None:
        """It has said goodbye."""
        self._presence[name] = Presence.LEFT

    def rise(self) -> None:
        """A sum is over: whoever rested owes steps again."""
        for name, presence in self._presence.items():
            if presence is Presence.RESTS:
                self._presence[name] = Presence.EXPECTED

    def waits(self, now: float, what: int = 0) -> None:
        """Somebody waits for others from now on, if nobody did before.

        Args:
            now: the time.
            what: number of the thing that is waited for; each has a clock of its own, which no progress elsewhere sets back.
        """
        self._waiting.setdefault(what, now)

    def served(self, what: int = 0) -> None:
        """Nobody waits for this any more."""
        self._waiting.pop(what, None)

    def give_up(self, owing: tuple[str, ...], now: float, what: int = 0) -> tuple[str, ...]:
        """After the patience those who owe a step are absent; who they are."""
        since = self._waiting.get(what)
        if since is None or now - since <= self._patience:
            return ()
        late = tuple(name for name in owing if self._presence[name] is Presence.EXPECTED)
        for name in late:
            self._presence[name] = Presence.ABSENT
        self.served(what)
        return late
