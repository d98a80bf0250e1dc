"""A sum of per-unit gradients of bounded sensitivity, on the lattice, before its noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from securesplit.privacy.clip import clip_tokens
from securesplit.privacy.lattice import quantise


class ClippedSum:
    """A sum of gradients, one per unit of privacy, each clipped to L2 norm C and put on the lattice *before* it is added.

    Putting the finished sum on the lattice would not do: rounding a sum can move by a step per coordinate when one of its
    parts changes. Rounded parts of norm at most C move the sum by at most 2C, exactly.

    Args:
        dim: d.
        bound: C, over all coordinates of one unit's gradient together.
        step: the lattice step, in the gradient's units.

    Attributes:
        steps: (d,) int64, the sum in lattice steps.
        records: whose gradients are in it, in the order of their coming.
    """

    def __init__(self, dim: int, bound: float, step: float) -> None:
        self.steps: npt.NDArray[np.int64] = np.zeros(dim, dtype=np.int64)
        self.bound = bound
        self.step = step
        self.records: list[str] = []
        self._seen: set[str] = set()

    def restore(self, steps: npt.NDArray[np.int64], records: Sequence[str]) -> None:
        """Go on from another sum's ``steps`` and ``records``, of the same kind, as a run does that was interrupted.

        Raises:
            ValueError: when this one is not empty, or has another size.
        """
        if self.records or steps.shape != self.steps.shape or steps.dtype != np.int64:
            raise ValueError("only an empty sum of the same size can go on from another one")
        self.steps = steps.copy()
        self.records = list(records)
        self._seen = set(records)

    def add(self, gradient: Tensor, record: str) -> None:
        """Clip one unit's gradient (d,) and add it.

        A gradient with NaN or infinity counts as zero, silently: a server that provokes an overflow must not learn from a
        client's stopping for whom it happened.

        Args:
            gradient: (d,); under unit ``user`` the sum over all records of the user.
            record: the ledger's name of the unit that pays.

        Raises:
            ValueError: when the unit is in the sum already; twice would move it by 4C.
        """
        if record in self._seen:
            raise ValueError("a unit of privacy enters a sum once")
        if bool(torch.isfinite(gradient).all()):
            clipped = clip_tokens(gradient.detach()[None, None], self.bound)[0, 0].cpu().numpy()
            self.steps += quantise(clipped, self.step, self.bound)
        self.records.append(record)
        self._seen.add(record)
