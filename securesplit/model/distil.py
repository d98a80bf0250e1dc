"""One short public code per sequence, chosen by what the deep model sees in public text.

A release has half a bit at epsilon 8, whatever its width, and its noise grows with every number in it. A sequence-level
task must therefore be squeezed into a handful of numbers *before* anybody has seen a label. Principal components of A's
pooled rows spend them on what varies most in shallow layers (length, style). The server can do better without any
record: it runs the whole model on public text and finds the directions of A's rows from which the deep layers' rows are
best predicted. That is a reduced-rank regression (Izenman 1975): ridge regression of deep on shallow rows, then the
principal components of the *predictions*. Clients apply it to their own rows with one matrix product.

Everything here is public, and fitted on public text only: fitting it on private records would be a release that nobody
charges. A code protects nothing; the clip and noise of the gate, after it, do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SequenceCode", "fit_sequence_code"]

_FLOOR = 1e-6  # A coordinate that is constant in public text is centred and not blown up.


@dataclass(frozen=True, slots=True, eq=False)
class SequenceCode:
    """An affine map from pooled rows to a vector of unit norm.

    Attributes:
        mean, scale: (D,) of public text.
        axes: (D, r).
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor

    @property
    def width(self) -> int:
        """Numbers in a code: r axes and the constant."""
        return self.axes.shape[1] + 1

    def encode(self, pooled: Tensor) -> Tensor:
        """Pooled rows to codes.

        The norm is made 1 for every record rather than clipped: no budget is left unused, and whether a record was
        clipped is no longer in its code. A constant 1 is appended before, so that a linear head on the code has an
        intercept.

        Args:
            pooled: (N, D), finite.

        Returns:
            (N, r + 1) float64, every row's norm 1 up to rounding; the gate clips all the same.
        """
        axes = (pooled.double() - self.mean) / self.scale @ self.axes
        codes = torch.cat([axes, axes.new_ones(len(axes), 1)], dim=1)
        unit: Tensor = codes / torch.linalg.vector_norm(codes, dim=1, keepdim=True)
        return unit

    def second_moment(self, public: Tensor) -> Tensor:
        """(D,) public pooled rows (N, D) to E[code code^T], (r + 1, r + 1): what a head needs and no client sends."""
        codes = self.encode(public)
        return codes.mT @ codes / len(codes)


def fit_sequence_code(
    shallow: Tensor, deep: Tensor | None, rank: int, *, ridge: float = 0.05, power: float = 0.5
) -> SequenceCode:
    """Fit a code on public text.

    Args:
        shallow: (N, D) pooled rows of A, what a client can compute.
        deep: (N, E) rows of the whole model on the same texts; None for plain principal components of ``shallow``.
        rank: r, at most min(N, D, E).
        ridge: penalty of the regression as a share of the mean eigenvalue of ``shallow``'s kernel.
        power: axis j of public standard deviation s_j is scaled to ``(s_j / s_1)^power``: 0 gives every axis the same
            part of the norm, 1 leaves them as they are.

    Raises:
        ValueError: for a rank that the texts cannot carry, or rows that do not match.
    """
    count = len(shallow)
    if deep is not None and len(deep) != count:
        raise ValueError("shallow and deep rows must be of the same texts")
    wide = shallow.double()
    mean, scale = wide.mean(0), wide.std(0, correction=0).clamp_min(_FLOOR)
    rows = (wide - mean) / scale
    if deep is None:
        map_, seen = None, rows
    else:
        target = deep.double()
        target = (target - target.mean(0)) / target.std(0, correction=0).clamp_min(_FLOOR)
        # In the dual: with 2 000 public texts the N x N kernel is as cheap as D x D, and it is never singular.
        kernel = rows @ rows.mT
        kernel.diagonal().add_(ridge * float(kernel.diagonal().mean()))
        map_ = rows.mT @ torch.linalg.solve(kernel, target)
        seen = rows @ map_
    _, values, right = torch.linalg.svd(seen, full_matrices=False)
    if not 1 <= rank <= len(values) or float(values[rank - 1]) <= _FLOOR * float(values[0]):
        raise ValueError("the public texts do not span that many axes")
    spread = values[:rank] / math.sqrt(count)
    axes = right[:rank].mT if map_ is None else map_ @ right[:rank].mT
    return SequenceCode(mean, scale, axes / spread * (spread / spread[0]) ** power)
