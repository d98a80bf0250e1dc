"""The end of a round: who has its sum on disk, who still lacks it, and when nobody will need help with it any more.

A client that was killed after others had the result gets the same sum once more: the same clients contribute the same
updates again, and sums are integers. So nobody moves on before all clients of the sum say that they keep it
(:class:`RoundKept`), or those who lack it have been silent for too long. What clients say is enough to go on after a restart
of the server; the names of runs that are closed are kept on disk before anyone is told, so that whoever comes late hears
the same.

What this does not protect: clients believe nothing of it. A server that closes a round too early, or never, costs them the
round; which updates enter which sums is the clients' own rule (securesplit/aggregate/answered.py).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from securesplit.errors import RemoteProtocolError
from securesplit.pki.files import write_atomically
from securesplit.protocol.messages import RoundKept
from securesplit.server.gathering import Gathering

__all__ = ["ClosedRuns", "Ending", "Move"]

_log = logging.getLogger(__name__)
_MOST = 4096


class ClosedRuns:
    """Names of runs whose rounds are closed; on disk where there is a path. The oldest are forgotten beyond 4096.

    Args:
        path: a file that this alone writes; made when absent, and begun anew when it is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._runs: dict[bytes, None] = {}
        if path is not None and path.exists():
            self._runs = dict.fromkeys(self._read(path))

    @staticmethod
    def _read(path: Path) -> list[bytes]:
        try:
            fields = json.loads(path.read_bytes())
            runs = [bytes.fromhex(run) for run in fields["runs"]]
        except (OSError, ValueError, KeyError, TypeError):
            # It only spares clients a wait: without it those who keep a sum wait for each other once more.
            _log.warning("%s is not the list of closed rounds that a server keeps; it begins anew", path)
            return []
        return [run for run in runs if len(run) == 16]

    def __contains__(self, run: bytes) -> bool:
        return run in self._runs

    def add(self, runs: Iterable[bytes]) -> None:
        """Keep these names, durably when there is a path."""
        self._runs |= dict.fromkeys(runs)
        self._runs = dict.fromkeys(list(self._runs)[-_MOST:])
        if self._path is not None:
            text = json.dumps({"format": 1, "runs": [run.hex() for run in self._runs]})
            write_atomically(self._path, text.encode("ascii"), mode=0o600)


@dataclass(frozen=True, slots=True)
class Move:
    """What is to be done now about a round that has its sum.

    Attributes:
        missing: whom those who wait, wait for.
        again: clients that want the sum, when it can be made once more.
        closes: whether nobody waits for the missing any longer.
        refused, code: clients that are let go, and by which code.
    """

    missing: frozenset[str] = frozenset()
    again: tuple[str, ...] = ()
    closes: bool = False
    refused: tuple[str, ...] = ()
    code: str = ""


class Ending:
    """The round that has a sum and is not closed yet, if there is one.

    Args:
        closed: what was closed before.
        quorum: fewest clients of a sum that may go on without the rest of it.
        patience: seconds for which the rest is waited for.

    Attributes:
        number: the round; the last one when none is open, and -1 before the first.
        open: whether somebody may still need help with it.
        clients: who is in its sum.
        waiting: who keeps it and is here, so that it can help.
    """

    def __init__(self, closed: ClosedRuns, quorum: int, patience: float) -> None:
        self._closed, self._quorum, self._patience = closed, quorum, patience
        self.number, self.open = -1, False
        self._seen = False  # Whether a round has ended here since the server began.
        self._since = 0.0  # When something last happened to it.
        self.clients: tuple[str, ...] = ()
        self.waiting: set[str] = set()
        self._done: set[str] = set()
        self._runs: set[bytes] = set()

    @property
    def missing(self) -> tuple[str, ...]:
        """Who has not said yet that it keeps the sum."""
        return tuple(name for name in self.clients if name not in self._done) if self.open else ()

    def summed(self, number: int, run: bytes, clients: tuple[str, ...], now: float) -> None:
        """A run has ended with a sum over these clients."""
        if not self.open or self.number != number:
            self._begin(number, clients)
        self._seen = True
        self._runs.add(run)
        self._since = now

    def _begin(self, number: int, clients: tuple[str, ...]) -> None:
        self.number, self.open, self.clients = number, True, tuple(sorted(clients))
        self.waiting, self._done, self._runs = set(), set(), set()

    def kept(self, name: str, message: RoundKept, now: float) -> bool:
        """A client keeps its sum; whether that round is closed already.

        Raises:
            RemoteProtocolError: SS-4051 when the client is not in the sum that it speaks of, or no sum is over so few.
        """
        if name not in message.clients:
            raise RemoteProtocolError("SS-4051", "a client keeps a sum that it is not in")
        if (
            len(set(message.clients)) < self._quorum
        ):  # A restarted server would take its word for it, against all others.
            raise RemoteProtocolError("SS-4051", "a client keeps a sum over fewer clients than any sum has")
        if (
            message.run in self._closed
            or message.round < self.number
            or (message.round == self.number and not self.open)
        ):
            return True
        if message.round > self.number:
            if self._seen:
                raise RemoteProtocolError("SS-4051", "a client keeps the sum of a round that has none")
            self._begin(message.round, message.clients)  # This server was restarted, and learns of the round by this.
        elif name not in self.clients:
            raise RemoteProtocolError("SS-4051", "a client keeps a sum that it is not in")
        if name not in self._done or message.run not in self._runs:
            self._since = now
        self._done.add(name)
        self._runs.add(message.run)
        self.waiting.add(name)
        return False

    def ready(self, name: str, number: int, now: float) -> None:
        """A client is ready for a round. For a later one: it has this one. For an earlier one: it began anew, and needs none.

        Raises:
            RemoteProtocolError: SS-6033 when the client wants this round, and is not in its sum.
        """
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
        self._since = now

    def drop(self, name: str) -> None:
        """A client's connection is gone. What it keeps it keeps."""
        self.waiting.discard(name)

    def due(self, gathering: Gathering, now: float) -> bool:
        """Whether :meth:`move` has anything to do."""
        late = now - self._since > self._patience
        return self.open and (not self.missing or bool(self._helped(gathering)) or late)

    def _helped(self, gathering: Gathering) -> tuple[str, ...]:
        """Who wants the sum, when all of its clients are here to make it once more."""
        wanting = gathering.wanting(self.number)
        return wanting if set(self.clients) <= {*wanting, *self.waiting} else ()

    def move(self, gathering: Gathering, now: float) -> Move:
        """What to do; nothing is changed by asking."""
        if not self.missing:
            return Move(closes=True)
        wanting = gathering.wanting(self.number)
        if helped := self._helped(gathering):
            return Move(again=helped)
        needed = self.clients if wanting else self.missing  # Those who keep the sum are needed to make it once more.
        missing = frozenset(needed) - {*gathering.rounds, *self.waiting}
        if now - self._since <= self._patience:
            return Move(missing)
        if len(self.clients) - len(self.missing) >= self._quorum:  # They are gone for good, and the rest goes on.
            return Move(missing, closes=True, refused=wanting, code="SS-6033")
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
