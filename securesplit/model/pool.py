"""Many rows to a few latent vectors, before the cut: what a sequence-level task needs to send.

A release of ``m`` vectors costs the same mu as a release of T rows under the same Frobenius bound, but its noise has
``m D`` coordinates instead of ``T D``, and its shape is public: the number of vectors hides the number of tokens. The
*values* of a mean or a maximum still depend on the length, as on everything else in the record; clip and noise at the
gate are what protects them. Pooling alone protects nothing.

A public sentinel row in front (whose norm is ten times a token's in some models) has to be cut off by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Pooling", "pool_rows"]

Pooling = Literal["mean", "last", "max"]


def pool_rows(hidden: Tensor, lengths: Sequence[int], how: Pooling = "mean", vectors: int = 1) -> Tensor:
    """Pool each sequence's real rows into ``vectors`` latent vectors.

    The real rows are cut into ``vectors`` runs in their order, run i being rows ``floor(i n / m)`` to
    ``ceil((i + 1) n / m)``: together they cover every row, none is empty, and rows are shared between neighbours where n
    is not a multiple of m. Padding never enters.

    Args:
        hidden: (B, T, D), padded on the right, any float type.
        lengths: real rows of each sequence, 1 to T.
        how: the mean of a run's rows, its last row, or the largest value of each coordinate.
        vectors: m, at least 1. It is public, and may exceed a sequence's length.

    Returns:
        (B, m, D) in ``hidden``'s type, differentiable in ``hidden``.

    Raises:
        ValueError: for lengths that do not fit ``hidden``, or m below 1.
    """
    count, width = hidden.shape[0], hidden.shape[1]
    if len(lengths) != count or any(not 1 <= length <= width for length in lengths) or vectors < 1:
        raise ValueError("lengths must be one per sequence, between 1 and T, and there must be a vector at least")
    real = torch.tensor(list(lengths), device=hidden.device)[:, None]
    run = torch.arange(vectors, device=hidden.device)[None]
    start = run * real // vectors  # (B, m)
    stop = -(-(run + 1) * real // vectors)  # Rounded up, so that no run is empty even when n < m.
    if how == "last":
        return hidden.gather(1, (stop - 1)[..., None].expand(-1, -1, hidden.shape[2]))
    row = torch.arange(width, device=hidden.device)
    inside = (row >= start[..., None]) & (row < stop[..., None])  # (B, m, T)
    if how == "max":
        spread = hidden[:, None].masked_fill(~inside[..., None], float("-inf"))
        return spread.amax(dim=2)
    # Padding is zeroed before the product: 0 x NaN is NaN, and padding may hold anything.
    padded = hidden.masked_fill((row >= real)[..., None], 0)
    weights = inside.to(hidden.dtype) / (stop - start)[..., None].to(hidden.dtype)
    return weights @ padded
