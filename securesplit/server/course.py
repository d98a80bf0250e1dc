"""What a mode of training does with requests to learn: which run now, which wait, and when B's copies are averaged.

Sans-I/O: requests in, what is due out; the caller computes and says when it is done. :class:`securesplit.server.lanes.Lanes`
and :class:`securesplit.server.together.Together` are the two kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from securesplit.protocol.messages import Backward, Forward

__all__ = ["Ask", "Average", "Course", "Due", "Pass"]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, whose it is, and the run that it belongs to where that outlives the connection."""

    connection: int
    name: str
    message: Forward | Backward
    run: bytes = b""


@dataclass(frozen=True, slots=True)
class Pass:
    """Compute this now: one request, or those of several clients as one batch, all forward or all backward."""

    asks: tuple[Ask, ...]


@dataclass(frozen=True, slots=True)
class Average:
    """Give every copy of B's adapters their mean, by how many sequences each has learnt from since the last mean."""


Due = Pass | Average


class Course(Protocol):
    """How steps follow each other in one mode."""

    def ask(self, ask: Ask, now: float) -> list[Due]:
        """A client asks for a forward pass of a batch, or brings a gradient.

        Raises:
            RemoteProtocolError: SS-4025 for a second step while the first one waits; SS-4014 for a gradient of nothing.
        """

    def done(self, ask: Ask, now: float) -> list[Due]:
        """A request has been answered."""

    def rests(self, name: str, now: float) -> list[Due]:
        """A client has no more steps before the next secure sum."""

    def leaves(self, name: str, now: float) -> list[Due]:
        """A client has said goodbye."""

    def lost(self, connection: int, now: float) -> list[Due]:
        """A connection is gone, with all that it asked for."""

    def begins(self, now: float) -> list[Due]:
        """A secure sum begins, with or without those who owe a step."""

    def rise(self) -> None:
        """A secure sum is over."""

    def tick(self, now: float) -> tuple[tuple[int, ...], list[Due]]:
        """Connections that hold up others beyond the patience, and what is due without those who are missing."""

    def move(self, old: int, new: int) -> None:
        """A client has come back over another connection: what it held it holds; what it had asked it will ask again."""

    def hold(self, ask: Ask, now: float) -> None:
        """A client's step is under way since before this server was started: it has its turn, or its patience begins anew."""

    def recall(self, steps: Mapping[str, int], order: Sequence[str]) -> None:
        """What was so before this server was started.

        Args:
            steps: of each client since the last mean.
            order: clients by when they last learnt, the latest last.
        """

    def learns(self, connection: int) -> bool:
        """Whether a graph waits for this connection's gradient."""
