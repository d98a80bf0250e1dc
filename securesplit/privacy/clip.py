"""Bounding what one record can contribute, before noise. Pure functions on tensors.

The norm is taken in float64 after division by the largest absolute value, so that neither half precision nor large
entries overflow; NaN and infinity are refused before, because both survive clamping and would carry a record out
unclipped. Clipping alone protects nothing: it keeps the direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from securesplit.errors import CheckFailed

# Rounding to float32 may lengthen a row by 2^-24, and a computed norm may be short by 2^-45 or so; aiming 2^-22 below the
# bound, for every row that is not shorter anyway, keeps the exact norm of the result inside the bound.
_MARGIN = 1 - 2.0**-22


def refuse_non_finite(hidden: Tensor) -> None:
    """Raise when any entry is NaN or infinite.

    Raises:
        CheckFailed: SS-1510. The message says nothing of where.
    """
    if not bool(torch.isfinite(hidden).all()):
        raise CheckFailed(
            "SS-1510",
            "a tensor that was to be released holds NaN or infinity",
            hint="Nothing was sent. Lower the learning rate or use float32.",
        )


def _scaled(hidden: Tensor, bound: float, dims: tuple[int, ...]) -> Tensor:
    if not 0 < bound < float("inf"):
        raise ValueError("the bound must be positive and finite")
    refuse_non_finite(hidden)
    if not hidden.numel():
        return hidden.float()
    wide, aim = hidden.double(), bound * _MARGIN
    # A row of zeros is divided by the smallest normal number; its norm is zero either way.
    peak = wide.detach().abs().amax(dim=dims, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    norm = torch.linalg.vector_norm(wide / peak, dim=dims, keepdim=True) * peak
    clipped: Tensor = wide * (aim / norm.clamp_min(aim))  # The factor is exactly 1 where the row is short enough.
    return clipped.float()


def clip_sequence(hidden: Tensor, bound: float) -> Tensor:
    """Scale each sequence down to Frobenius norm ``bound`` where it is longer.

    Args:
        hidden: (B, T, D), any float type.
        bound: C; over all T positions, padding included.

    Returns:
        (B, T, D) float32, each ``||.||_F <= bound``. Differentiable.

    Raises:
        CheckFailed: SS-1510 for NaN or infinity.
    """
    return _scaled(hidden, bound, (-2, -1))


def clip_tokens(hidden: Tensor, bound: float) -> Tensor:
    """Scale each row down to L2 norm ``bound`` where it is longer.

    Not a sequence-level bound: T rows clipped at C have Frobenius norm up to ``C sqrt(T)``.

    Args:
        hidden: (B, T, D), any float type.
        bound: C per row.

    Returns:
        (B, T, D) float32, each row's norm at most ``bound``. Differentiable.

    Raises:
        CheckFailed: SS-1510 for NaN or infinity.
    """
    return _scaled(hidden, bound, (-1,))
