"""What clients mark: states of B's adapters that they want kept, and which session computes with which.

A session that computes with a former state learns nothing, and disturbs nothing that learns: its forwards run with other
values in B's adapters, put there for that computation alone (:meth:`securesplit.server.learner.Learner.lent`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from securesplit.errors import RemoteProtocolError
from securesplit.protocol.job import Job
from securesplit.protocol.messages import Mark
from securesplit.server.engine import Engine
from securesplit.server.former import FormerStates, Values

__all__ = ["Marks", "slots_of"]

_log = logging.getLogger(__name__)


def slots_of(job: Job) -> int:
    """What a job has kept for each client: its best, where it keeps one or has checkpoints, and a state for each of these."""
    rounds = job.schedule.checkpoints or 0
    return rounds + 1 if rounds or job.schedule.keep_best else 0


class Marks:
    """See the module. What computes is called by one thread, in the order of the requests.

    Args:
        engine: gives B.
        slots: how many each client has: 0 for its best one, then as many as the job's ``schedule.checkpoints``; see :func:`slots_of`.
        roster: whose states are taken at a sum's end.
        states: where they are kept; in memory alone when absent.
    """

    def __init__(
        self,
        engine: Callable[[], Engine],
        slots: int,
        roster: Sequence[str] = (),
        states: FormerStates | None = None,
    ) -> None:
        self.slots = slots
        self._engine, self._roster = engine, tuple(roster)
        self.states = states or FormerStates()
        self._chosen: dict[int, bytes] = {}

    def admit(self, message: Mark) -> None:
        """Whether a client may ask this, under this job.

        Raises:
            RemoteProtocolError: SS-4096.
        """
        asks = message.what == "use" or (not message.name and message.slot < self.slots)
        if message.code or not asks:
            raise RemoteProtocolError("SS-4096", "a client marks what the job does not keep")

    def chosen(self, connection: int) -> bool:
        """Whether this session computes with a former state; from any thread."""
        return connection in self._chosen

    def answer(self, connection: int, client: str, message: Mark) -> Mark:
        """Do what is asked, and what to answer: a name, or why not."""
        if message.what == "use":
            if self._found(message.name) is None:
                return message.model_copy(update={"code": "SS-4095"})
            self._engine().forget(connection)  # No text goes on in another B than it began in.
            self._chosen[connection] = message.name
            return message
        try:
            if message.what == "ended":
                name = self.states.keep_ended(client, message.slot)
            else:
                values = self._engine().fleet.values((client,))[client]
                name = self.states.keep(client, message.slot, values)
        except OSError as error:
            _log.error("a state of B's adapters could not be kept: %s", error)
            return message.model_copy(update={"code": "SS-4097"})
        return message.model_copy(update={"name": name} if name else {"code": "SS-4095"})

    def ended(self) -> None:
        """A secure sum has ended."""
        try:
            self.states.ended(self._engine().fleet.values(self._roster))
        except OSError as error:
            _log.error("B's adapters at the end of a round could not be kept: %s", error)

    def of(self, connection: int) -> Values | None:
        """What this session computes with: None for B as it is.

        Raises:
            RemoteProtocolError: SS-4095 when others' states have taken the place of the one that it chose.
        """
        name = self._chosen.get(connection)
        if name is None:
            return None
        if (found := self._found(name)) is None:
            raise RemoteProtocolError("SS-4095", "the state that a session computes with is kept no more")
        return found

    def forget(self, connection: int) -> None:
        """A connection is gone."""
        self._chosen.pop(connection, None)

    def _found(self, name: bytes) -> Values | None:
        """The state, if it is one of this B's."""
        found, own = self.states.find(name), self._engine().fleet.common.parameters
        if found is None or [value.shape for value in found] != [parameter.shape for parameter in own]:
            return None
        return found
