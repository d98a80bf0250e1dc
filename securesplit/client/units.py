"""Adds up gradients by unit of privacy, and hands each unit to a sum once: when the last of its records is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from securesplit.privacy.clipped_sum import ClippedSum

__all__ = ["Added", "Units"]


@dataclass(frozen=True, slots=True, eq=False)
class Added:
    """What was added up before a crash.

    Attributes:
        steps, records: of the sum.
        met: as in :class:`Units`.
    """

    steps: npt.NDArray[np.int64] = field(repr=False)
    records: tuple[str, ...]
    met: Mapping[str, Tensor] = field(repr=False)


class Units:
    """See the module.

    A user's records may stand in several batches. Only users who have been met and are not complete take memory, one
    gradient each; batches are not sorted by user, because the server would see who belongs together.

    Args:
        total: clips each unit as it is complete.
        keys: the ledger key of every record to come.

    Attributes:
        met: the sums of the units that are not complete.
    """

    def __init__(self, total: ClippedSum, keys: Iterable[str]) -> None:
        self.total = total
        self._left = Counter(keys)
        self.met: dict[str, Tensor] = {}

    def add(self, gradients: Tensor, keys: Sequence[str]) -> None:
        """Take in one batch, (B, d)."""
        for gradient, key in zip(gradients, keys, strict=True):
            self._left[key] -= 1
            known = self.met.pop(key, None)
            summed = gradient if known is None else known + gradient
            if self._left[key]:
                self.met[key] = summed.clone()  # A row of its own, not a view that would keep the whole batch.
            else:
                self.total.add(summed, key)

    def resume(self, done: Iterable[str], added: Added) -> None:
        """Go on behind the batches whose records are ``done``, with what they gave.

        Raises:
            ValueError: when the sum is not empty, or has another size.
        """
        self.total.restore(added.steps, added.records)
        self._left.subtract(done)
        self.met = dict(added.met)
