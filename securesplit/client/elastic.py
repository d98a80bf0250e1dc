"""A run in a job that hands over: it may come late, or be away while rounds go on, and it helps others who do.

Where it stands is the run's own position (securesplit/client/position.py); how it asks and answers is
securesplit/client/handover.py.
"""

from __future__ import annotations

from collections.abc import Callable

from securesplit.aggregate.handover import Common
from securesplit.client.client import Client
from securesplit.client.handover import HelpsLate, catch_up, common_at, take_over
from securesplit.client.position import Position
from securesplit.client.sharing import learns_in
from securesplit.errors import InputError
from securesplit.pki.store import KeyFolder

__all__ = ["BEHIND", "Elastic"]

BEHIND = frozenset({"SS-6004", "SS-6005", "SS-6031", "SS-6033"})
"""Codes by which a round goes on without this client, or is over."""
PATIENCE = 600.0
"""Seconds for which a client that comes late waits for the others."""


_BESIDE = 1 << 14
"""Bytes of a message besides its values, and more than enough."""


class Elastic:
    """One run's part.

    Args:
        client: this site.
        folder: signs for it, and verifies the others.
        at: where the run stands; moved on when rounds went on without it.
        batches: of one pass.
        tell: told what is waited for.

    Raises:
        InputError: SS-1254 when what clients hold in common is larger than a message may be.
    """

    def __init__(
        self, client: Client, folder: KeyFolder, at: Position, batches: int, tell: Callable[[str], None]
    ) -> None:
        self._client, self._folder, self._at, self._batches, self._tell = client, folder, at, batches, tell
        size = common_at(client, 0, b"").values.nbytes + _BESIDE
        if size > client.policy.limits.max_message_bytes:
            raise InputError(
                "SS-1254",
                f"what clients hold in common takes {size} bytes in one message, and the policy allows {client.policy.limits.max_message_bytes}",
                hint="Raise limits.max_message_bytes on both ends, or take sums.late out of the job.",
            )
        client.link.sums.donor = self._helps = HelpsLate(client, folder)
        self._told: Common | None = None  # By :meth:`left_behind`.

    def comes(self, *, asks: bool) -> None:
        """The run begins, or goes on after a crash.

        Args:
            asks: whether to ask if rounds went on without it; not while it does again what it did before a crash.
        """
        client, begun = self._client, self._at.begun
        if begun is not None:  # In the middle of a round: what that began from is what the others hold.
            now = client.snapshot()
            client.install(begun.before)
            self.settle()
            client.install(now)
        elif not asks or not self.caught_up():
            self.settle()

    def settle(self) -> None:
        """A round begins from here: this is what all hold alike, and others may have it."""
        self._helps.settle(common_at(self._client, self._at.done, self._at.heard))

    def left_behind(self) -> bool:
        """In the middle of a round, whether it is over for the others: then nothing more need be released in it.

        Raises:
            AggregationAborted: SS-6036. ConnectionFailed.
        """
        at = self._at
        self._told = catch_up(self._client, self._folder, at.done, progress=self._tell, within=PATIENCE)
        if self._told is not None and self._told.round == at.done:
            self._told = None
        return self._told is not None

    def caught_up(self) -> bool:
        """Whether rounds went on without this client, and it is now where the others are.

        Raises:
            AggregationAborted: SS-6036, SS-6037. ConnectionFailed.
        """
        client, at = self._client, self._at
        common, self._told = self._told, None
        if common is None:
            common = catch_up(client, self._folder, at.done, progress=self._tell, within=PATIENCE)
        if common is None or common.round == at.done:
            return False
        take_over(client, common)
        missed = range(at.done, common.round)
        at.missed += missed
        # Of all rounds, not of those that it missed: what it did in the first of these may be counted already.
        at.moves = sum(self._moves_in(number) for number in range(common.round))
        at.done, at.heard = common.round, common.heard
        self.settle()
        self._tell(f"rounds went on without this client; it goes on with the others at round {common.round + 1}")
        return True

    def _moves_in(self, number: int) -> int:
        """How often this client's optimiser would have moved in a round, so that its rate is the schedule's where it goes on."""
        job = self._client.job
        if self._client.regime == "round":
            return 1
        if not learns_in(job, self._client.link.name, number):
            return 0
        together = 1 if self._client.regime == "step" else job.optimiser.accumulate
        return -(-job.schedule.epochs * self._batches // together)
