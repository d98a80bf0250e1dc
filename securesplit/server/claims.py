"""What clients claim to a server that does not know which round had the last sum: it began anew without its list.

A client that keeps a sum says so, and names the others in it. One word is not enough: who is hostile could name a round far
ahead, or leave a client out, and the server would refuse those who are honest. A claim is believed

* when a quorum of different clients make the same one, or are ready for a later round, which comes to the same thing; or
* when it names the whole roster and everybody else of it is here, and wants this very round: then all make the sum once more,
  which costs nobody anything, whether the claim is true or not.

Until then who makes it waits, refuses nobody and stops nothing, and is let go after a while. Each client has one claim.

What this does not prevent: a quorum of hostile clients. That many can sum without the others anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from securesplit.protocol.messages import RoundKept

__all__ = ["Claim", "Claims"]


@dataclass(frozen=True, slots=True)
class Claim:
    """That a round has a sum.

    Attributes:
        round: which.
        clients: who is in it, sorted.
        by: who says so, and the names of the runs that they have it of.
    """

    round: int
    clients: tuple[str, ...]
    by: tuple[tuple[str, bytes], ...]


class Claims:
    """Who claims what.

    Args:
        roster: names of all clients.
        quorum: fewest clients of a sum.
    """

    def __init__(self, roster: tuple[str, ...], quorum: int) -> None:
        self._roster, self._quorum = frozenset(roster), quorum
        self._said: dict[str, tuple[int, tuple[str, ...], bytes]] = {}
        self._since: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._said)

    def add(self, name: str, message: RoundKept, now: float) -> None:
        """A client claims it; a new claim takes the place of its last one, and has waited for as long."""
        self._said[name] = message.round, tuple(sorted(set(message.clients))), message.run
        self._since.setdefault(name, now)

    def drop(self, name: str) -> None:
        """A client is gone, or says something else."""
        self._said.pop(name, None)
        self._since.pop(name, None)

    def believed(self, ready: Mapping[str, int]) -> Claim | None:
        """The claim that may be believed, of several that with the latest round.

        Args:
            ready: who is ready for which round.
        """
        found = (self._claim(number, clients) for number, clients, _ in self._said.values())
        return max((claim for claim in found if self._holds(claim, ready)), key=lambda c: c.round, default=None)

    def _claim(self, number: int, clients: tuple[str, ...]) -> Claim:
        by = tuple((name, run) for name, (n, c, run) in sorted(self._said.items()) if (n, c) == (number, clients))
        return Claim(number, clients, by)

    def _holds(self, claim: Claim, ready: Mapping[str, int]) -> bool:
        of = frozenset(claim.clients)
        behind = {name for name, _ in claim.by} | {name for name in of if ready.get(name, -1) > claim.round}
        if len(behind) >= self._quorum:
            return True
        return of == self._roster == behind | {name for name in of if ready.get(name) == claim.round}

    def stale(self, now: float, patience: float) -> tuple[str, ...]:
        """Who has claimed for so long, and was not believed."""
        return tuple(sorted(name for name, since in self._since.items() if now - since > patience))
