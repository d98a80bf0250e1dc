"""Which of a client's connections speaks in secure sums: its messages go to the sums, and theirs come back to it.

A client may have a second session, to generate by the same key; what sums have to say is not for that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from securesplit.protocol.messages import Handover, Join, Message, RoundKept, RoundReady, Secagg
from securesplit.server.sums import Outbound, Sums

__all__ = ["Speakers", "SumMessage"]

SumMessage = RoundReady | RoundKept | Join | Handover | Secagg
"""What clients say of sums."""


class Speakers:
    """Connections by the client that they speak for.

    Args:
        sums: the secure sums.
    """

    def __init__(self, sums: Sums) -> None:
        self._sums = sums
        self._at: dict[str, int] = {}

    def speaks(self, name: str, connection: int) -> None:
        """A client says something of a sum on this connection; from here on it is the one."""
        self._at[name] = connection

    def said(self, name: str, message: SumMessage, now: float) -> list[Outbound]:
        """Tell the sums. It takes time, and is called off the event loop.

        Raises:
            RemoteProtocolError: as :class:`Sums`.
        """
        match message:
            case RoundReady():
                return self._sums.ready(name, message, now)
            case RoundKept():
                return self._sums.kept(name, message, now)
            case Join():
                return self._sums.asks(name, message, now)
            case Handover():
                return self._sums.answers(name, message, now)
            case _:
                return self._sums.receive(name, message, now)

    def gone(self, name: str, connection: int, *, others: bool, now: float) -> None:
        """A connection is gone. The client has left when it has no others, or when that was the one that spoke."""
        if not others or self._at.get(name) == connection:
            self._at.pop(name, None)
            self._sums.leave(name, now)

    def addressed(self, outbound: Iterable[Outbound], names: Mapping[int, str]) -> Iterable[tuple[int, Message]]:
        """Which connection each message is for: the client's that speaks, or all of its own where that one is not there.

        Args:
            outbound: messages by client.
            names: of the connections that are there.
        """
        for item in outbound:
            speaks = self._at.get(item.to)
            for number, name in names.items():
                if name == item.to and (number == speaks or speaks not in names):
                    yield number, item.message
