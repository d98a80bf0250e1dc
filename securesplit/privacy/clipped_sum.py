"""A sum of per-record gradients of bounded sensitivity, before its noise."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from securesplit.privacy.clip import clip_tokens


class ClippedSum:
    """A sum of per-record gradients, each clipped to L2 norm C before it is added, so that one record moves it by 2C.

    Args:
        dim: d.
        bound: C, over all coordinates of one record's gradient together.
    """

    def __init__(self, dim: int, bound: float) -> None:
        self.vector = np.zeros(dim)
        self.bound = bound
        self.records: list[str] = []

    def add(self, gradient: Tensor, record: str) -> None:
        """Clip one record's gradient (d,) and add it.

        A gradient with NaN or infinity counts as zero, silently: a server that provokes an overflow must not learn from a
        client's stopping for whom it happened.

        Raises:
            ValueError: when the record is in the sum already; twice would move it by 4C.
        """
        if record in self.records:
            raise ValueError("a record enters a round's sum once")
        if bool(torch.isfinite(gradient).all()):
            self.vector += clip_tokens(gradient[None, None], self.bound)[0, 0].double().numpy()
        self.records.append(record)
