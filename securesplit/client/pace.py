"""Held-out loss inside the rounds: when it is measured, when a client has learnt enough, and which adapters were the best.

All of it is this client's own affair. Nobody is asked and nobody is told: a client that has stopped takes no more local
steps and sends nothing between the sums, and its updates to the sums are zero, because the others cannot do without it.
Its adapters go on with the sums, so a later sum can still make its loss better or worse; it does not start again.

What leaves: each measurement is a release of every held-out record, charged like any other. In regime ``frozen`` A never
changes and the same bytes go out, at no charge. Regime ``step`` pays for each, and a run that could not is refused before
anything is sent. That a client stopped shows in the server's traffic, and follows from held-out text without noise: so
regimes ``round`` and ``step`` refuse ``patience`` and ``keep_best`` (securesplit/suited.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from securesplit.client.client import Client
from securesplit.client.releases import looks
from securesplit.data.batches import Batch
from securesplit.errors import InputError
from securesplit.model.descent import NamedTensor

__all__ = ["Best", "Measured", "Pace", "require_affordable"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement of the held-out loss inside a round.

    Attributes:
        moves: optimiser steps of this client before it, in the whole job.
        loss: nats per token.
    """

    moves: int
    loss: float


@dataclass(frozen=True, slots=True, eq=False)
class Best:
    """The lowest held-out loss so far, with every adapter that gave it.

    Attributes:
        moves: optimiser steps before it.
        loss: nats per token.
        values: by :meth:`securesplit.client.client.Client.snapshot`.
        middle: name of the state of B's adapters that belongs to them; see :meth:`securesplit.client.client.Client.mark`.
    """

    moves: int
    loss: float
    values: tuple[npt.NDArray[np.float32], ...]
    middle: str = ""


class Pace:
    """Keeps the measurements of one client's run.

    Args:
        client: whose.
        measure: the held-out loss now, in nats per token.

    Attributes:
        measured: inside the rounds, in order.
        best: with ``keep_best``; None before the first measurement or without it.
        stopped: whether this client takes no more local steps.
    """

    def __init__(self, client: Client, measure: Callable[[], float]) -> None:
        self.measured: list[Measured] = []
        self.best: Best | None = None
        self.stopped = False
        self._client = client
        self._measure = measure
        self._lowest = math.inf
        self._worse = 0
        self._inside = False  # Whether a measurement is of a round that is under way.

    def moved(self, moves: int) -> None:
        """After a local optimiser step: measure, where it is time."""
        every = self._client.job.schedule.evaluate_every
        if every is not None and moves % every == 0:
            loss = self._measure()
            self.measured.append(Measured(moves, loss))
            self._inside = True
            self.saw(moves, loss)
            self._inside = False

    def saw(self, moves: int, loss: float) -> None:
        """Take in a measurement, inside a round or between two."""
        schedule = self._client.job.schedule
        if loss < self._lowest:
            self._lowest, self._worse = loss, 0
            if schedule.keep_best:
                self.best = Best(moves, loss, self._client.snapshot(), self._mark())
            return
        ended = not self._inside and not self._client.job.mode.summed
        if ended and self.measured and self.measured[-1].moves == moves:
            return  # Of the very adapters that were measured when they came about.
        self._worse += 1
        if schedule.patience is not None and self._worse >= schedule.patience:
            self.stopped = True

    def _mark(self) -> str:
        """Let the server keep its part for the best: that of the last sum's end, or inside a round, or before any sum, the present."""
        ended = self._client.job.mode.summed and not self._inside
        return (self._client.mark(ended=True) if ended else "") or self._client.mark()

    def state(self) -> tuple[NamedTensor, ...]:
        """All that the next measurement depends on, and what was measured; copies."""
        double = torch.float64
        kept = [
            NamedTensor("lowest", torch.tensor([self._lowest, self._worse, self.stopped], dtype=double)),
            NamedTensor(
                "measured", torch.tensor([(m.moves, m.loss) for m in self.measured], dtype=double).reshape(-1, 2)
            ),
        ]
        if self.best is not None:
            kept.append(NamedTensor("best", torch.tensor([self.best.moves, self.best.loss], dtype=double)))
            kept += [NamedTensor(f"best.{i}", torch.from_numpy(v.copy())) for i, v in enumerate(self.best.values)]
            name = np.frombuffer(bytes.fromhex(self.best.middle), dtype=np.uint8)
            kept += [NamedTensor("middle", torch.from_numpy(name.copy()))] if len(name) else []
        return tuple(kept)

    def restore(self, state: Sequence[NamedTensor]) -> None:
        """Go on from what :meth:`state` gave.

        Raises:
            InputError: SS-1250 when it is no such state.
        """
        held = {piece.name: piece.value for piece in state}
        values = [held[name] for name in sorted(held) if name.startswith("best.")]
        if "lowest" not in held or "measured" not in held or (len(values) != 3 and "best" in held):
            raise InputError(
                "SS-1250", "the kept state has no measurements", hint="Resume with the job it was kept under."
            )
        lowest, worse, stopped = held["lowest"].tolist()
        self._lowest, self._worse, self.stopped = lowest, int(worse), bool(stopped)
        self.measured = [Measured(int(moves), loss) for moves, loss in held["measured"].tolist()]
        self.best = None
        if "best" in held:
            moves, loss = held["best"].tolist()
            middle = held["middle"].numpy().tobytes().hex() if "middle" in held else ""
            self.best = Best(int(moves), loss, tuple(value.numpy().copy() for value in values), middle)


def require_affordable(client: Client, batches: int, held_out: Sequence[Batch]) -> None:
    """Before anything is sent: can the policy pay for what the job measures of each held-out record?

    Args:
        client: with job and policy.
        batches: of one epoch.
        held_out: all held-out data.

    Raises:
        InputError: SS-1252.
    """
    schedule, plan = client.job.schedule, client.gate.plan
    wants = schedule.evaluate_every is not None or schedule.patience is not None or schedule.keep_best
    if wants and not held_out:
        raise InputError("SS-1252", "the job measures held-out loss, and nothing is held out", hint="Use --held-out.")
    if plan is None or client.regime != "step" or schedule.evaluate_every is None:
        return
    # Under unit ``user`` a person pays for each of theirs.
    most = max(Counter(key for batch in held_out for key in batch.records).values(), default=0)
    needed = most * looks(client.job, batches, name=client.link.name)
    if needed > plan.cut.releases:
        raise InputError(
            "SS-1252",
            f"the job would release each held-out record {needed} times, and the policy allows {plan.cut.releases}",
            hint="Ask for a larger schedule.evaluate_every, or take it out.",
        )
