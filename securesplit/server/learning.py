"""The learning side of a server's core: whose step is next, and steps that outlive a connection.

A client that says ``Run`` and is lost in the middle of a step may come back within its patience, over another connection or to
a server that was started again, and finds the step as it left it. Sans-I/O, as the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from securesplit.protocol.job import Job
from securesplit.protocol.messages import Backward, Forward, RoundBegin
from securesplit.server.connection import Answer, Connection
from securesplit.server.course import Ask, Due, Pass
from securesplit.server.courses import course_of
from securesplit.server.requests import Requests
from securesplit.server.steps import Part, Steps
from securesplit.server.sums import Outbound
from securesplit.transport.actions import Action

__all__ = ["Learning", "Looked"]


@dataclass(frozen=True, slots=True)
class Looked:
    """What a look at the clock gave.

    Attributes:
        late: connections that held their step too long; they are to be refused.
        actions: what is due.
    """

    late: tuple[int, ...]
    actions: list[Action]


class Learning:
    """See the module.

    Args:
        job: names the mode.
        steps: does what learns, and remembers it.
        work: makes work of what is due.
        connections: all that are open, by number.
    """

    def __init__(self, job: Job, steps: Steps, work: Requests, connections: Mapping[int, Connection]) -> None:
        self._steps = steps
        self._work = work
        self._connections = connections
        self._course = course_of(job)
        self._course.recall(steps.since, steps.order)
        # Clients that hold a step without a connection: they lost theirs, or this server was started again.
        self._away: dict[str, tuple[int, bytes]] = {}
        self._held = tuple(
            Ask(-1 - place, waiting.client, waiting.message, waiting.run) for place, waiting in enumerate(steps.waiting)
        )  # From before the start.
        for ask in self._held:
            self._away[ask.name] = (ask.connection, ask.run)
            self._course.hold(ask, 0.0)
        self._begun = b""  # Name of the last sum's run.
        self._finished = 0  # Sums, as far as the course knows.

    def asked(self, connection: int, peer: Connection, message: Forward | Backward, now: float) -> list[Action]:
        """A client asks for a pass over a batch, or brings a gradient.

        Raises:
            RemoteProtocolError: as :meth:`securesplit.server.course.Course.ask`.
        """
        ask = Ask(connection, peer.name, message, peer.run)
        learns = isinstance(message, Backward) or message.learn
        if learns and self._steps.knows(Part(ask.name, ask.run, message)):
            return [self._work.run((ask,))]  # It was answered before, and has no turn to wait for.
        return self._due(self._course.ask(ask, now))

    def answered(self, answer: Answer, now: float) -> list[Action]:
        """An answer has been sent."""
        if not isinstance(answer.request, Forward | Backward):
            return []
        return self._due(self._course.done(Ask(answer.connection, answer.client, answer.request, answer.run), now))

    def too_late(self, answer: Answer, now: float) -> list[Action]:
        """It went while its request was computed; what was computed is dropped, or kept for when its run goes on."""
        request = answer.request
        if isinstance(request, Backward):
            return self.answered(answer, now)
        if not isinstance(request, Forward) or not request.learn or answer.run:
            return []
        # But not its new session's.
        again = any(c.name == answer.client and self._course.learns(n) for n, c in self._connections.items())
        return [self._work.forget(answer.connection, "" if again else answer.client)]

    def lost(self, connection: int, peer: Connection, now: float) -> list[Action]:
        """A connection is gone."""
        holds = self._course.learns(connection)  # Another session of its may be the one that learns.
        if holds and peer.run:  # It may come back within its patience, and finds its step as it left it.
            self._away[peer.name] = (connection, peer.run)
            return [self._work.forget(connection, "")]
        forgotten = self._work.forget(connection, peer.name if holds else "")
        return [forgotten, *self._due(self._course.lost(connection, now))]

    def enters(self, connection: int, peer: Connection, run: bytes, now: float) -> list[Action]:
        """A client's run begins here or comes back, perhaps before its old connection was found to be dead."""
        for number, other in self._connections.items():
            if number != connection and other.name == peer.name and other.run == run:
                other.run = b""
                self._course.move(number, connection)
        peer.run = run
        if peer.name in self._away:
            number, known = self._away[peer.name]
            if known != run:
                return self._give_up(peer.name, now)
            del self._away[peer.name]
            self._course.move(number, connection)
        return []

    def leaves(self, connection: int, peer: Connection, now: float) -> list[Action]:
        """A client has said goodbye: it does not mean to come back."""
        peer.run = b""
        others = any(c.name == peer.name for number, c in self._connections.items() if number != connection)
        return [] if others else self._due(self._course.leaves(peer.name, now))

    def rests(self, name: str, now: float) -> list[Action]:
        """A client is ready for a secure sum. A mean that this makes due comes first: whoever has the sum may evaluate at once."""
        return self._due(self._course.rests(name, now))

    def summed(self, outbound: list[Outbound], finished: int, now: float) -> list[Action]:
        """What a step of the sums gives: before anybody hears of an end and steps again, and before a sum that has just begun.

        Args:
            outbound: what the clients are about to be told.
            finished: sums so far.
        """
        taken: list[Action] = []
        if finished > self._finished:
            self._finished = finished
            self._course.rise()
            taken = [*self._work.ended()]
        runs = {item.message.run for item in outbound if isinstance(item.message, RoundBegin)} - {self._begun}
        if not runs:
            return taken
        (self._begun,) = runs
        return taken + self._due(self._course.begins(now))

    def tick(self, now: float) -> Looked:
        """A look at the clock."""
        held, self._held = self._held, ()
        for ask in held:  # Their patience begins with the first look.
            if self._away.get(ask.name) == (ask.connection, ask.run):
                self._course.hold(ask, now)
        late, due = self._course.tick(now)
        actions = self._due(due)
        for number in (number for number in late if number not in self._connections):
            name = next((name for name, (held_by, _) in self._away.items() if held_by == number), "")
            actions += self._give_up(name, now) if name else []
        here = tuple(number for number in late if number in self._connections)
        for number in here:
            self._connections[number].run = b""
        return Looked(here, actions)

    def _give_up(self, name: str, now: float) -> list[Action]:
        """A client without a connection loses its step."""
        number, _ = self._away.pop(name)
        return [self._work.forget(number, name), *self._due(self._course.lost(number, now))]

    def _due(self, due: list[Due]) -> list[Action]:
        return [self._work.run(one.asks) if isinstance(one, Pass) else self._work.average() for one in due]
