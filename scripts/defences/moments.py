"""Public statistics of states: clips, directions, scales, and how far two samples depend on each other."""

from __future__ import annotations

import torch
from torch import Tensor


def quantile_norm(rows: Tensor, share: float) -> float:
    """The norm that this share of public rows (..., k) does not exceed: the clip."""
    return float(rows.flatten(0, -2).norm(dim=-1).quantile(share))


def principal(hidden: Tensor, k: int, *, whiten: bool) -> tuple[Tensor, Tensor]:
    """The mean (D,) and the first k principal directions (D, k) of public states (N, T, D).

    The longest hundredth of the rows is left out: a few rows are ten times as long as the others and would be all that the
    directions see. Whitened directions are divided by their standard deviation.
    """
    rows = hidden.flatten(0, 1).double()
    norms = rows.norm(dim=1)
    rows = rows[norms <= norms.quantile(0.99)]
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    basis = vectors[:, -k:] / values[-k:].sqrt() if whiten else vectors[:, -k:]
    return mean.float(), basis.float()


def standardised(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Public mean and standard deviation of every coordinate, (D,) each, without the longest hundredth of the rows."""
    rows = hidden.flatten(0, 1)
    norms = rows.norm(dim=1)
    rows = rows[norms <= norms.quantile(0.99)]
    return rows.mean(0), rows.std(0).clamp_min(1e-6)


def distance_correlation(x: Tensor, y: Tensor) -> Tensor:
    """The distance correlation of two samples (M, a) and (M, b), in [0, 1] (Szekely, Rizzo and Bakirov 2007), biased form.

    What NoPeek (Vepakomma et al. 2020) adds to the loss.
    """

    def centred(v: Tensor) -> Tensor:
        # A floor under the square keeps the gradient of the root finite on the diagonal.
        square = (v @ v.T) * -2 + v.square().sum(1) + v.square().sum(1)[:, None]
        apart = square.clamp_min(1e-9).sqrt()
        return apart - apart.mean(0) - apart.mean(1)[:, None] + apart.mean()

    a, b = centred(x), centred(y)
    covariance = (a * b).mean().clamp_min(0)
    return (covariance / ((a * a).mean() * (b * b).mean()).sqrt().clamp_min(1e-12)).sqrt()
