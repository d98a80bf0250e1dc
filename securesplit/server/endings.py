"""The end of a round: who has its sum on disk, who still lacks it, and when nobody will need help with it any more.

A client that was killed after others had the result gets the same sum once more: the same clients contribute the same
updates again, and sums are integers. So nobody moves on before all clients of the sum say that they keep it
(:class:`RoundKept`), or those who lack it have been silent for too long. Which round is open, over whom and by which runs is on disk
before anyone is told the sum, and so are the names of runs that are closed: a server that was restarted believes a client no more
than one that was not, and whoever comes late hears the same. Only one that lost its list has to go by what clients say
(securesplit/server/claims.py).

What a client of the sum can do that says false things: be taken for one that keeps it; draw out the waiting for those who are
missing, as often as a client may that is killed again and again; and have the others make the sum once more each time that all of
its clients are there, which tells nobody anything new.

What this does not protect: clients believe nothing of it. A server that closes a round too early, or never, costs them the
round; which updates enter which sums is the clients' own rule (securesplit/aggregate/answered.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from securesplit.errors import RemoteProtocolError
from securesplit.protocol.messages import RoundKept
from securesplit.server.claims import Claims
from securesplit.server.closed import ClosedRuns, LastRound
from securesplit.server.gathering import Gathering

__all__ = ["Ending", "Move"]

_NEWS = 16
"""How often what one client says of itself makes the others wait anew: that it has the sum, or began the round once more."""


@dataclass(frozen=True, slots=True)
class Move:
    """What is to be done now about a round that has its sum.

    Attributes:
        missing: whom those who wait, wait for.
        again: clients that want the sum, when it can be made once more.
        closes: whether nobody waits for the missing any longer.
        refused, code: clients that are let go, and by which code.
        void: whether nobody keeps the sum, a quorum has begun anew, and the round is begun as if there were none.
    """

    missing: frozenset[str] = frozenset()
    again: tuple[str, ...] = ()
    closes: bool = False
    refused: tuple[str, ...] = ()
    code: str = ""
    void: bool = False


class Ending:
    """The round that has a sum and is not closed yet, if there is one.

    Args:
        closed: what was closed before.
        quorum: fewest clients of a sum that may go on without the rest of it.
        patience: seconds for which the rest is waited for.
        roster: names of all clients.

    Attributes:
        number: the round; the last one when none is open, and -1 before the first.
        open: whether somebody may still need help with it.
        witnessed: whether that round is of the clients that are here now, as far as one of them has said. What is read from the
            disk may be of a run that was given up.
        clients: who is in its sum.
        waiting: who keeps it and is here, so that it can help.
    """

    def __init__(self, closed: ClosedRuns, quorum: int, patience: float, roster: tuple[str, ...] = ()) -> None:
        self._closed, self._quorum, self._patience = closed, quorum, patience
        self.number, self.open, self.witnessed = -1, False, False
        self._since: float | None = None  # When something last happened to it; since a restart nothing has.
        self.clients: tuple[str, ...] = ()
        self.waiting: set[str] = set()
        self._done: set[str] = set()
        self._runs: set[bytes] = set()
        self._news: dict[str, int] = {}
        self._claims = Claims(roster, quorum)
        if (last := closed.last) is not None and last.open:
            self._begin(last.number, last.clients)
            self._runs = set(last.runs)

    @property
    def missing(self) -> tuple[str, ...]:
        """Who has not said yet that it keeps the sum."""
        return tuple(name for name in self.clients if name not in self._done) if self.open else ()

    def summed(self, number: int, run: bytes, clients: tuple[str, ...], now: float) -> None:
        """A run has ended with a sum over these clients."""
        if not self.open or self.number != number:
            self._begin(number, clients)
        self.witnessed = True
        self._runs.add(run)
        self._since = now
        self._closed.summed(LastRound(number, self.clients, tuple(sorted(self._runs))))

    def _begin(self, number: int, clients: tuple[str, ...]) -> None:
        self.number, self.open, self.clients = number, True, tuple(sorted(clients))
        self.waiting, self._done, self._runs, self._news = set(), set(), set(), {}

    def kept(self, name: str, message: RoundKept, now: float) -> bool:
        """A client keeps its sum; whether that round is closed already. Where this server cannot know, see :meth:`hear`.

        Raises:
            RemoteProtocolError: SS-4051 when the client is not in the sum that it speaks of, no sum is over so few, or none was
                made here by that name.
        """
        if name not in message.clients:
            raise RemoteProtocolError("SS-4051", "a client keeps a sum that it is not in")
        if len(set(message.clients)) < self._quorum:
            raise RemoteProtocolError("SS-4051", "a client keeps a sum over fewer clients than any sum has")
        if message.run in self._closed:
            return True
        if self.open and message.round == self.number:
            self._mine(name, message, now)
            return False
        last = self._closed.last
        if message.round <= max(self.number, -1 if last is None else last.number):
            return True
        if last is not None or self.open:
            raise RemoteProtocolError("SS-4051", "a client keeps the sum of a round that has none")
        self._claims.add(name, message, now)
        return False

    def _mine(self, name: str, message: RoundKept, now: float) -> None:
        if name not in self.clients:
            raise RemoteProtocolError("SS-4051", "a client keeps a sum that it is not in")
        if self._closed.last is not None and message.run not in self._runs:
            raise RemoteProtocolError("SS-4051", "a client keeps a sum of a run that gave none")
        self.witnessed = True
        if name not in self._done:
            self._drawn(name, now)
            self._runs.add(message.run)
        self._done.add(name)
        self.waiting.add(name)

    def _drawn(self, name: str, now: float) -> None:
        self._news[name] = self._news.get(name, 0) + 1
        if self._news[name] <= _NEWS:
            self._since = now

    def hear(self, ready: Mapping[str, int], now: float) -> tuple[str, ...]:
        """Open the round whose sum enough clients claim, where this server does not know of the last one.

        Args:
            ready: who is ready for which round.
            now: the time.

        Returns:
            Whose claim is not believed and is not waited for any longer; it may be made again.
        """
        if not self._claims:
            return ()
        if self._closed.last is None and not self.open and (claim := self._claims.believed(ready)) is not None:
            self._begin(claim.round, claim.clients)
            self._since, self.witnessed = now, True
            for name, run in claim.by:
                self._claims.drop(name)
                self._done.add(name)
                self._runs.add(run)
                self.waiting.add(name)
            for name, number in ready.items():
                if number != claim.round:  # It was ready before this server knew that this round has a sum.
                    self.ready(name, number, now)
        known = self._closed.last is not None or self.open
        gone = self._claims.stale(now, -1.0 if known else self._patience)
        for name in gone:
            self._claims.drop(name)
        return gone

    def witness(self, number: int) -> None:
        """A client stands at this round."""
        self.witnessed = self.witnessed or (self.open and number == self.number)

    def ready(self, name: str, number: int, now: float) -> None:
        """A client is ready for a round. For a later one: it has this one. For an earlier one: it began anew, and needs none.

        Raises:
            RemoteProtocolError: SS-6033 when the client wants this round, and is not in its sum.
        """
        self._claims.drop(name)
        self.witness(number)
        if not self.open:
            return
        if number != self.number:
            self._done.add(name)
            self.waiting.discard(name)
            return
        if name not in self.clients:
            raise RemoteProtocolError("SS-6033", "a round has its sum without this client")
        if name in self._done or name in self.waiting:  # It was set back to before it kept the sum.
            self._done.discard(name)
            self.waiting.discard(name)
        self._drawn(name, now)

    def drop(self, name: str) -> None:
        """A client's connection is gone. What it keeps it keeps."""
        self.waiting.discard(name)
        self._claims.drop(name)

    def due(self, gathering: Gathering, now: float) -> bool:
        """Whether :meth:`hear` or :meth:`move` has anything to do."""
        if self._claims:
            known = self._closed.last is not None or self.open
            return bool(self._claims.stale(now, -1.0 if known else self._patience)) or (
                not known and self._claims.believed(gathering.rounds) is not None
            )
        return self.open and (not self.missing or bool(self._helped(gathering)) or self._late(now))

    def _late(self, now: float) -> bool:
        if self._since is None:
            self._since = now  # A server that was restarted waits as long as one that was not.
        return now - self._since > self._patience

    def _helped(self, gathering: Gathering) -> tuple[str, ...]:
        """Who wants the sum, when all of its clients are here to make it once more."""
        wanting = gathering.wanting(self.number)
        return wanting if set(self.clients) <= {*wanting, *self.waiting} else ()

    def move(self, gathering: Gathering, now: float) -> Move:
        """What to do now."""
        if not self.missing:
            return Move(closes=True)
        wanting = gathering.wanting(self.number)
        if helped := self._helped(gathering):
            return Move(again=helped)
        needed = self.clients if wanting else self.missing  # Those who keep the sum are needed to make it once more.
        missing = frozenset(needed) - {*gathering.rounds, *self.waiting}
        if not self._late(now):
            return Move(missing)
        # Of a sum that this server knows from one client's word alone it need not be true that there is one.
        told = self._closed.last is None and len(self._done) < self._quorum
        if (told or not self._done) and len(wanting) >= self._quorum:
            return Move(missing, void=True)
        if len(self.clients) - len(self.missing) >= self._quorum:  # They are gone for good, and the rest goes on.
            return Move(missing, closes=True, refused=wanting, code="SS-6033")
        if not wanting and not self.waiting:
            self._since = now  # Nobody is here, and those who are away may keep it all the same.
        return Move(missing, refused=(*wanting, *sorted(self.waiting)), code="SS-6010")

    def refuse(self, gathering: Gathering, now: float) -> None:
        """Those who want the sum, and where too few keep it these too, are let go; who comes again is waited for anew."""
        if wanting := gathering.wanting(self.number):
            gathering.pick(wanting)
        if len(self.clients) - len(self.missing) < self._quorum:
            self._since, self.waiting = now, set()

    def again(self) -> tuple[str, ...]:
        """The sum is made once more: who takes part. They say anew that they keep it."""
        self.waiting = set()
        return self.clients

    def close(self) -> tuple[str, ...]:
        """End it; who waits to hear so. Durable before that returns."""
        told = tuple(sorted(self.waiting))
        self._closed.add(sorted(self._runs))
        self.open = False
        self.waiting = set()
        return told

    def void(self) -> None:
        """Nobody has the sum: what is said next is said of a round that has none."""
        self.open, self.waiting = False, set()
        self._closed.void()
        self.number = -1
