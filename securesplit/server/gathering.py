"""Who is ready for which secure sum, and since when: whether it is time to begin, and with whom.

Clients that say the same thing form a group, and the largest one decides. Whoever comes first has no say: a client that was
killed and begins anew from round 0, or one that is late by a round, must not put out everybody else.
"""

from __future__ import annotations

from dataclasses import dataclass

from securesplit.protocol.messages import RoundReady

_HELD_UP = 3
"""Times the seconds that a group waits for the roster: for how much longer one that comes late, and is at work, is waited for."""


@dataclass(frozen=True, slots=True)
class Group:
    """Clients that are ready for the same thing.

    Attributes:
        message: what they said.
        names: who they are, in the order in which they said it.
        others: who is ready for something else.
    """

    message: RoundReady
    names: tuple[str, ...]
    others: tuple[str, ...]


class Gathering:
    """Who waits for the next round.

    Args:
        roster: names of all clients.
        quorum: fewest clients that a round may begin with.
        seconds: how long the first of a group waits for the rest of the roster.
        late: whether those at an earlier round are helped on; of two groups alike that at the later round then decides.
    """

    def __init__(self, roster: tuple[str, ...], quorum: int, seconds: float, *, late: bool = False) -> None:
        self._roster = frozenset(roster)
        self._quorum = quorum
        self._seconds = seconds
        self._late = late
        self._ready: dict[str, tuple[RoundReady, float]] = {}
        self.worked = 0.0  # When somebody whom all wait for was last seen to be at work.
        self.helped = 0.0  # When one that comes late was helped on, or seen at work since: not waited for for ever.

    def add(self, name: str, message: RoundReady, now: float) -> None:
        """A client is ready. Said once more, it waits since the first time."""
        known = self._ready.get(name)
        if known is None or known[0] != message:
            self._ready[name] = message, now

    @property
    def rounds(self) -> dict[str, int]:
        """Who waits, and for which round."""
        return {name: message.round for name, (message, _) in self._ready.items()}

    def wanting(self, number: int) -> tuple[str, ...]:
        """Who waits for this round, and says the same as most of them."""
        wanted = {name: message for name, (message, _) in self._ready.items() if message.round == number}
        groups = [tuple(n for n, m in wanted.items() if m == message) for message in set(wanted.values())]
        return max(groups, key=len, default=())

    def pick(self, names: tuple[str, ...]) -> RoundReady:
        """Take these out, who say the same; what they say."""
        *_, (message, _since) = (self._ready.pop(name) for name in names)
        return message

    def drop(self, name: str) -> None:
        """A client is gone, and does not wait any more."""
        self._ready.pop(name, None)

    def restart(self, now: float) -> None:
        """The clock begins anew: a round that was running has ended."""
        self._ready = {name: (message, now) for name, (message, _) in self._ready.items()}

    def due(self, lost: set[str], now: float) -> bool:
        """Whether it is time to begin, or to give up: all are here or lost, or one has waited for too long.

        Args:
            lost: clients whose connection broke and who did not come back; nobody waits for them where enough are ready.
            now: the time.
        """
        if not self._ready:
            return False
        leading, missing = self._leading(), self._roster - set(self._ready)
        enough = len(leading) >= self._quorum
        first = min(self._ready[name][1] for name in leading)
        waited = now - max(self.worked, first, min(self.helped, first + _HELD_UP * self._seconds))
        return not missing or waited > self._seconds or (enough and missing <= lost)

    def take(self) -> tuple[Group, bool]:
        """The group that decides, and whether it is large enough for a round. Nobody waits any more then."""
        leading = self._leading()
        group = Group(self._ready[leading[0]][0], leading, tuple(name for name in self._ready if name not in leading))
        self._ready = {}
        return group, len(leading) >= self._quorum

    def _leading(self) -> tuple[str, ...]:
        """Names of the largest group; of two alike, the one at the later round if ``late``, else that has waited for longer."""
        groups: dict[RoundReady, list[str]] = {}
        for name, (message, _) in self._ready.items():
            groups.setdefault(message, []).append(name)

        def weight(names: list[str]) -> tuple[int, int, float]:
            number = self._ready[names[0]][0].round if self._late else 0
            return len(names), number, -min(self._ready[name][1] for name in names)

        leading = max(groups.values(), key=weight)
        return tuple(leading)
