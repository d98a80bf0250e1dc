"""Mode ``client-batch``: B computes one forward and one backward pass over the batches of all clients at once.

A step begins when everybody who is expected has asked for it, and its backward pass when all who are in it have brought
their gradients. Whoever keeps the others waiting beyond the patience is left out, and comes back with a later step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from securesplit.errors import RemoteProtocolError
from securesplit.protocol.messages import Backward
from securesplit.server.attendance import Attendance
from securesplit.server.course import Ask, Due, Pass

__all__ = ["Together"]


class Together:
    """Implements :class:`securesplit.server.course.Course`.

    Args:
        attendance: who owes a step.
        patience: seconds that a client may keep the others waiting for its gradient.
    """

    def __init__(self, attendance: Attendance, *, patience: float = 120.0) -> None:
        self._attendance = attendance
        self._patience = patience
        self._asked: dict[str, Ask] = {}
        self._inside: dict[str, Ask] = {}  # Whose rows the pending graph holds.
        self._brought: dict[str, Ask] = {}
        self._computed: set[str] = set()  # Whose gradients are being computed.
        self._since = 0.0

    def ask(self, ask: Ask, now: float) -> list[Due]:
        """See :class:`Course`."""
        if isinstance(ask.message, Backward):
            inside = self._inside.get(ask.name)
            if inside is None or (inside.connection, inside.message.step) != (ask.connection, ask.message.step):
                raise RemoteProtocolError("SS-4014", "a gradient arrived for a step that is not pending")
            if ask.name in self._computed:  # Said again while it is computed: the answer follows from that.
                return [Pass((ask,))]
            self._brought[ask.name] = ask
            return self._backward()
        if not ask.message.learn:
            return [Pass((ask,))]
        if (inside := self._inside.get(ask.name)) is not None and inside.message == ask.message:
            return [Pass((ask,))]  # The same.
        waiting = self._asked.get(ask.name)
        if waiting is not None and waiting.connection == ask.connection:
            raise RemoteProtocolError("SS-4025", "a client sent a learning step while another of its own waits")
        self._attendance.comes(ask.name)
        self._asked[ask.name] = (
            ask  # Of a client that came back before its old connection was seen to be gone, the new one.
        )
        return self._forward(now)

    def done(self, ask: Ask, now: float) -> list[Due]:
        """See :class:`Course`. The step is over with the first answer to a gradient; all of them come at once."""
        if not isinstance(ask.message, Backward) or ask.name not in self._inside:
            return []
        del self._inside[ask.name]
        self._computed.discard(ask.name)
        return self._forward(now)

    def rests(self, name: str, now: float) -> list[Due]:
        """See :class:`Course`."""
        self._attendance.rests(name)
        return self._forward(now)

    def leaves(self, name: str, now: float) -> list[Due]:
        """See :class:`Course`."""
        if name in self._attendance.roster:
            self._attendance.leaves(name)
        return self._forward(now)

    def lost(self, connection: int, now: float) -> list[Due]:
        """See :class:`Course`. Its rows stay in the graph and get no gradient."""
        for asks in (self._asked, self._inside, self._brought):
            for name in [name for name, ask in asks.items() if ask.connection == connection]:
                del asks[name]
                self._computed.discard(name)
        return [*self._backward(), *self._forward(now)]

    def begins(self, now: float) -> list[Due]:
        """See :class:`Course`. There are no copies to average; whoever is in the sum rests, and the others may go on."""
        return self._forward(now)

    def rise(self) -> None:
        """See :class:`Course`."""
        self._attendance.rise()

    def tick(self, now: float) -> tuple[tuple[int, ...], list[Due]]:
        """See :class:`Course`."""
        slow: tuple[int, ...] = ()
        if self._inside and now - self._since > self._patience:
            slow = tuple(ask.connection for name, ask in self._inside.items() if name not in self._brought)
        if not self._asked:
            self._attendance.served()
        owing = tuple(name for name in self._attendance.expected if name not in self._asked)
        gone = not self._inside and self._attendance.give_up(owing, now)
        return slow, self._forward(now) if gone else []

    def move(self, old: int, new: int) -> None:
        """See :class:`Course`."""
        self._asked = {name: ask for name, ask in self._asked.items() if ask.connection != old}
        for asks in (self._inside, self._brought):
            for name, ask in asks.items():
                if ask.connection == old:
                    asks[name] = replace(ask, connection=new)

    def hold(self, ask: Ask, now: float) -> None:
        """See :class:`Course`."""
        self._inside[ask.name] = ask
        self._since = now

    def recall(self, steps: Mapping[str, int], order: Sequence[str]) -> None:
        """See :class:`Course`. Nothing here hangs on it."""

    def learns(self, connection: int) -> bool:
        """See :class:`Course`."""
        return any(ask.connection == connection for ask in self._inside.values())

    def _forward(self, now: float) -> list[Due]:
        if self._inside or not self._asked:
            return []
        if any(name not in self._asked for name in self._attendance.expected):
            self._attendance.waits(now)
            return []
        self._inside, self._asked = dict(sorted(self._asked.items())), {}
        self._attendance.served()
        self._since = now
        return [Pass(tuple(self._inside.values()))]

    def _backward(self) -> list[Due]:
        if not self._inside or self._computed or any(name not in self._brought for name in self._inside):
            return []
        brought, self._brought = dict(sorted(self._brought.items())), {}
        self._computed = set(brought)
        return [Pass(tuple(brought.values()))]
