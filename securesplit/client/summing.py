"""What the secure sums of a job say and hear over a link: when one begins, its messages, its end, and who comes late.

The protocol of a sum is securesplit/aggregate/client.py; what is said again after a loss is securesplit/client/rounds.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from securesplit.errors import RemoteProtocolError
from securesplit.protocol.messages import (
    Handover,
    Join,
    Message,
    RoundBegin,
    RoundKept,
    RoundReady,
    RoundStatus,
    Secagg,
)

if TYPE_CHECKING:
    from securesplit.client.link import Link

__all__ = ["Donor", "Summing"]


class Donor(Protocol):
    """Answers those who come late; see securesplit/client/handover.py."""

    def asked(self, join: Join) -> None:
        """Another client asks for what all hold in common. Answered at once, or when that stands still again."""
        ...

    def waits(self) -> None:
        """What this client holds is about to change by a sum; nothing is answered now."""
        ...

    def goes_on(self) -> None:
        """It stands still again."""
        ...


class _Nobody:
    """Holds nothing that others could want."""

    def asked(self, join: Join) -> None:
        del join

    def waits(self) -> None: ...

    def goes_on(self) -> None: ...


class Summing:
    """One link's part.

    Args:
        link: carries the messages; it asks :meth:`is_due` of each that arrives.

    Attributes:
        missing: names that the server says a secure sum waits for, or waited for last; for people to read.
        waits_for: told of them whenever they change.
        donor: asked by clients that come late, whenever this end listens.
    """

    def __init__(self, link: Link) -> None:
        self.missing: tuple[str, ...] = ()
        self.waits_for: Callable[[tuple[str, ...]], None] = lambda _missing: None
        self.donor: Donor = _Nobody()
        self._link = link
        self._begin: RoundBegin | None = None
        self._keeps = -1
        self._late = False  # Whether this client waits for what others hand over.

    def ready(self, number: int, *, dim: int, frozen: str, step: float = 0.0) -> bytes:
        """Local work of a round is done; waits until the sum begins and returns its name, 16 bytes.

        What comes before that belongs to an earlier round, which this client is not in any more.
        """
        self._link.tell(RoundReady(round=number, dim=dim, frozen=frozen, step=step))
        while isinstance(begin := self._link.next(), Secagg):
            continue
        self._begin = self._link.of(RoundBegin, begin)
        if self._begin.round != number:
            raise RemoteProtocolError("SS-4018", "the server began another round than the one that is ready")
        return self._begin.run

    def kept(self, number: int, run: bytes, clients: tuple[str, ...]) -> RoundBegin | None:
        """A round's sum is safe here; wait until all others have it, too.

        Returns:
            The beginning of one more run of the round, by which another client is to get its sum; None when the round is closed.
        """
        self._keeps = number
        try:
            self._link.tell(RoundKept(round=number, run=run, clients=clients))
            while isinstance(message := self._link.next(), Secagg):  # Of a run that this client is not in any more.
                continue
        finally:
            self._keeps = -1
        if isinstance(message, RoundStatus):
            return None
        self._begin = self._link.of(RoundBegin, message)
        if self._begin.round != number:
            raise RemoteProtocolError("SS-4018", "the server began another round than the one that was summed")
        return self._begin

    def secagg(self) -> Secagg:
        """Wait for the next message of a secure sum. Its beginning may be told twice to one who lost a connection."""
        while (message := self._link.next()) == self._begin:
            continue
        return self._link.of(Secagg, message)

    def is_due(self, message: Message) -> bool:
        """Whether somebody waits for this message. What may come at any time is dealt with here."""
        match message:
            case Join():
                self.donor.asked(message)
                return False
            case Handover():  # One that comes when it is needed no more is passed over.
                return self._late
            case RoundStatus():
                self.missing = message.missing
                if not message.closed and not self._late:
                    self.waits_for(message.missing)
                return self._late or (message.closed and message.round == self._keeps)
        return True

    def late(self, join: Join) -> bool:
        """Ask what the others hold in common.

        Returns:
            Whether rounds went on without this client, so that :meth:`handed` is to be waited for; as the server says.
        """
        self._late = True
        self._link.tell(join)
        while not (isinstance(message := self._link.next(), RoundStatus) and message.round == join.round):
            continue  # Of a round that this client is not in any more.
        self._late = message.closed
        return message.closed

    def handed(self, *, within: float) -> Handover:
        """The next answer to :meth:`late`."""
        until = time.monotonic() + within
        while not isinstance(message := self._link.next(within=max(until - time.monotonic(), 0.0)), Handover):
            continue
        return message

    def caught_up(self) -> None:
        """Nothing is waited for any more."""
        self._late = False
