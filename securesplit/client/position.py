"""Where a client's run stands: all that its next step depends on besides the adapters, and what its end will tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from securesplit.aggregate.fixedpoint import Words
from securesplit.client.pace import Pace
from securesplit.client.units import Added, Units
from securesplit.model.descent import Descent, NamedTensor
from securesplit.model.sketch import Residual

__all__ = ["Begun", "Position", "RoundRecord"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What this site keeps of a round. All of it stays here.

    Attributes:
        number: of the round.
        losses: of each local step, nats per token.
        survivors: clients whose updates are in the sum.
        total_weight: sum of their weights.
        contribution: this client's quantised part of the ring sum.
        ring_sum: the opened sum.
        residual: what averaging two factors apart got wrong; None where the sum is exact.
    """

    number: int
    losses: tuple[float, ...]
    survivors: tuple[str, ...]
    total_weight: int
    contribution: Words
    ring_sum: Words
    residual: Residual | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """What was true when a round began, and must be said at its end.

    Attributes:
        frozen, alike, origin: the digests of :class:`securesplit.client.client.Client`.
        start: values of what is summed, (d,).
        before: values of all adapters, by :meth:`securesplit.client.client.Client.snapshot`.
    """

    frozen: str
    alike: bytes
    origin: bytes
    start: Floats = field(repr=False)
    before: tuple[Floats, ...] = field(repr=False)


@dataclass(slots=True, eq=False)
class Position:
    """See the module.

    Attributes:
        run: the run's name, 16 bytes; empty for one that cannot be interrupted.
        steps: local steps so far.
        moves, rate: of the optimiser, in all rounds that are over, and the highest learning rate of the last one.
        pace: held-out losses inside the rounds.
        done: rounds that are over, with this client or without it.
        missed: numbers of those without it.
        curve: held-out losses so far.
        looked: how many rounds were over at the last of them; -1 before the first.
        rounds: what the secure sums gave; none in a mode without them.
        heard: of the last sum.
        begun: of the round that is under way; None between rounds.
        losses: of the steps in that round.
        optimiser: of that round, where steps move something; in a mode without sums, of the run.
        moments: its state, when it comes from a snapshot and has not been taken over yet.
        units: gradients that are being added up, in regime ``round``.
        added: what they were, when it comes from a snapshot and has not been taken over yet.
    """

    pace: Pace
    run: bytes = b""
    steps: int = 0
    moves: int = 0
    rate: float = 0.0
    done: int = 0
    missed: list[int] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    looked: int = -1
    rounds: list[RoundRecord] = field(default_factory=list)
    heard: bytes = b""
    begun: Begun | None = None
    losses: list[float] = field(default_factory=list)
    optimiser: Descent | None = None
    moments: Sequence[NamedTensor] = ()
    units: Units | None = None
    added: Added | None = None

    @property
    def moment(self) -> str:
        """A name for now; see :meth:`securesplit.privacy.gate.Gate.remember`."""
        return f"{self.run.hex()}:{self.done}:{len(self.losses)}"

    def ended(self) -> None:
        """The round is over."""
        self.begun, self.losses, self.optimiser, self.moments = None, [], None, ()
        self.units, self.added = None, None
