"""Clients in lanes: those of one lane share a copy of B's adapters and step one after another; lanes do not wait for each other.

One lane of all clients is SplitFed v2 and split learning; a lane for each client or group is SplitFed v1, v3 and the
hierarchical mode, whose copies are averaged when everybody who is expected has made so many steps, or rests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from securesplit.errors import RemoteProtocolError
from securesplit.protocol.messages import Backward, Forward
from securesplit.protocol.training import Order
from securesplit.server.attendance import Attendance
from securesplit.server.course import Ask, Average, Due, Pass

__all__ = ["Lanes"]

_MEAN = -1
"""What those wait for whose steps are made; lanes count from 0."""


@dataclass(slots=True)
class _Lane:
    number: int
    members: tuple[str, ...]
    holder: Ask | None = None
    since: float = 0.0
    last: str | None = None
    waiting: list[Ask] = field(default_factory=list)


class Lanes:
    """Implements :class:`securesplit.server.course.Course`.

    Args:
        lanes: names of the clients of each lane; every client stands in one.
        attendance: who owes a step.
        order: whose step is next in a lane.
        every: steps of each client between two means; None: a mean whenever nobody is expected any more, or a sum begins.
        replicated: whether there are copies to average.
        patience: seconds that a client may hold its turn.
    """

    def __init__(
        self,
        lanes: tuple[tuple[str, ...], ...],
        attendance: Attendance,
        *,
        order: Order = "arrival",
        every: int | None = None,
        replicated: bool = False,
        patience: float = 120.0,
    ) -> None:
        self._lanes = tuple(_Lane(number, tuple(sorted(members))) for number, members in enumerate(lanes))
        self._of = {name: lane for lane in self._lanes for name in lane.members}
        self._attendance = attendance
        self._order = order
        self._every = every
        self._replicated = replicated
        self._patience = patience
        self._steps = dict.fromkeys(self._of, 0)
        self._held: list[Ask] = []
        self._begun = (
            False  # Whether a secure sum has begun, and a pending graph still keeps the mean before it from being made.
        )

    def ask(self, ask: Ask, now: float) -> list[Due]:
        """See :class:`Course`. Evaluation waits for nothing but a mean that is due."""
        lane = self._of.get(ask.name)
        if isinstance(ask.message, Backward):
            # Elsewhere than in its own turn it would cost the one whose turn it is the graph.
            if lane is None or lane.holder is None or lane.holder.connection != ask.connection:
                raise RemoteProtocolError("SS-4014", "a gradient arrived for a step that is not pending")
            return [Pass((ask,))]
        if lane is not None and (self._begun or self._complete(ask.name)):
            self._refuse_second(ask)
            self._held.append(ask)
            return self._settled(now)
        return self._learn(ask, now) if ask.message.learn else [Pass((ask,))]

    def _learn(self, ask: Ask, now: float) -> list[Due]:
        lane = self._of[ask.name]
        self._attendance.comes(ask.name)
        if lane.holder is not None and lane.holder.connection == ask.connection:
            # Another step of the holder's own gives it no more time: its turn lasts until its backward.
            return [Pass((ask,))]
        self._refuse_second(ask)
        lane.waiting.append(ask)
        return self._next(lane, now)

    def _refuse_second(self, ask: Ask) -> None:
        queued = [*self._of[ask.name].waiting, *self._held]
        if any(other.connection == ask.connection for other in queued):
            raise RemoteProtocolError("SS-4025", "a client sent a learning step while another of its own waits")

    def done(self, ask: Ask, now: float) -> list[Due]:
        """See :class:`Course`. A turn ends with the answer to its gradient."""
        lane = self._of.get(ask.name)
        if lane is None or not isinstance(ask.message, Backward) or lane.holder is None:
            return []
        if lane.holder.connection != ask.connection:
            return []
        lane.holder = None
        self._steps[ask.name] += 1
        return [*self._next(lane, now), *self._settled(now)]

    def rests(self, name: str, now: float) -> list[Due]:
        """See :class:`Course`."""
        self._attendance.rests(name)
        return self._all_next(now)

    def leaves(self, name: str, now: float) -> list[Due]:
        """See :class:`Course`."""
        if name in self._of:
            self._attendance.leaves(name)
        return self._all_next(now)

    def lost(self, connection: int, now: float) -> list[Due]:
        """See :class:`Course`."""
        self._held = [ask for ask in self._held if ask.connection != connection]
        for lane in self._lanes:
            lane.waiting = [ask for ask in lane.waiting if ask.connection != connection]
            if lane.holder is not None and lane.holder.connection == connection:
                lane.holder = None
        return self._all_next(now)

    def begins(self, now: float) -> list[Due]:
        """See :class:`Course`. Whoever is not in the sum has its steps in the mean, as far as it has come."""
        self._begun = self._replicated and any(self._steps.values())
        return self._settled(now)

    def rise(self) -> None:
        """See :class:`Course`."""
        self._attendance.rise()

    def tick(self, now: float) -> tuple[tuple[int, ...], list[Due]]:
        """See :class:`Course`."""
        late = tuple(
            lane.holder.connection
            for lane in self._lanes
            if lane.holder is not None and now - lane.since > self._patience
        )
        owing = [name for name in self._attendance.expected if not self._present(name)]
        gone: tuple[str, ...] = ()
        for lane in self._lanes:
            if lane.holder is None and lane.waiting:
                gone += self._attendance.give_up(tuple(n for n in owing if n in lane.members), now, lane.number)
            else:
                self._attendance.served(lane.number)
        if self._held:
            self._attendance.waits(now, _MEAN)
            gone += self._attendance.give_up(tuple(n for n in owing if not self._complete(n)), now, _MEAN)
        else:
            self._attendance.served(_MEAN)
        return late, self._all_next(now) if gone else []

    def move(self, old: int, new: int) -> None:
        """See :class:`Course`."""
        self._held = [ask for ask in self._held if ask.connection != old]
        for lane in self._lanes:
            lane.waiting = [ask for ask in lane.waiting if ask.connection != old]
            if lane.holder is not None and lane.holder.connection == old:
                lane.holder = replace(lane.holder, connection=new)

    def hold(self, ask: Ask, now: float) -> None:
        """See :class:`Course`."""
        lane = self._of[ask.name]
        lane.holder, lane.since, lane.last = ask, now, ask.name

    def recall(self, steps: Mapping[str, int], order: Sequence[str]) -> None:
        """See :class:`Course`."""
        self._steps |= {name: count for name, count in steps.items() if name in self._steps}
        for name in order:
            if name in self._of:
                self._of[name].last = name

    def learns(self, connection: int) -> bool:
        """See :class:`Course`."""
        return any(lane.holder is not None and lane.holder.connection == connection for lane in self._lanes)

    def _present(self, name: str) -> bool:
        """Whether this client waits, too, or is at work."""
        lane = self._of[name]
        at_work = lane.holder is not None and lane.holder.name == name
        return at_work or any(ask.name == name for ask in (*lane.waiting, *self._held))

    def _complete(self, name: str) -> bool:
        return self._every is not None and self._steps.get(name, 0) >= self._every

    def _all_next(self, now: float) -> list[Due]:
        return [due for lane in self._lanes for due in self._next(lane, now)] + self._settled(now)

    def _next(self, lane: _Lane, now: float) -> list[Due]:
        """Give the turn to whoever is next, if that is known."""
        if lane.holder is not None or not lane.waiting:
            return []
        ask = lane.waiting[0] if self._order == "arrival" else self._by_roster(lane)
        if ask is None:
            self._attendance.waits(now, lane.number)
            return []
        lane.waiting.remove(ask)
        lane.holder, lane.since, lane.last = ask, now, ask.name
        self._attendance.served(lane.number)
        return [Pass((ask,))]

    def _by_roster(self, lane: _Lane) -> Ask | None:
        """The step of the next one behind the last; None while that one has not asked."""
        expected = set(self._attendance.expected)
        due = [name for name in lane.members if name in expected and not self._complete(name)]
        if not due:
            return None
        after = [name for name in due if lane.last is not None and name > lane.last]
        name = (after or due)[0]
        return next((ask for ask in lane.waiting if ask.name == name), None)

    def _settled(self, now: float) -> list[Due]:
        """A mean where everybody who is expected has made its steps; then whoever waited for it goes on."""
        stepped = any(self._steps.values())
        busy = any(lane.holder is not None for lane in self._lanes)
        owing = [name for name in self._attendance.expected if not self._complete(name)]
        if not self._replicated or busy or not stepped or (owing and not self._begun):
            if self._held:
                self._attendance.waits(now, _MEAN)
            return []
        self._steps, self._begun = dict.fromkeys(self._steps, 0), False
        self._attendance.served(_MEAN)
        held, self._held = self._held, []
        due: list[Due] = [Average()]
        for ask in sorted(held, key=lambda ask: ask.name):
            assert isinstance(ask.message, Forward)
            due += self._learn(ask, now) if ask.message.learn else [Pass((ask,))]
        return due
