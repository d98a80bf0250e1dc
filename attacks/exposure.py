"""Exposure of a canary: how far a string that was trained on stands out among its siblings. Pure; the scorer's.

The measure of Carlini, Liu, Erlingsson, Kos and Song, "The Secret Sharer", USENIX Security 2019, arXiv 1802.08232.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from securesplit.errors import CheckFailed

__all__ = ["exposure", "sampled_exposure"]

Scores = Sequence[float]
# Below so many references that beat a canary, counting them says too little and a fitted tail speaks instead.
_COUNTED = 20


def sampled_exposure(score: float, references: Scores, space: int) -> float:
    """Exposure in bits by counting: ``log2 |R| - log2 rank``, the rank estimated from sampled siblings.

    References do not hold the canary. With all other |R| - 1 siblings it is the exact exposure; with n of them it cannot
    exceed ``log2(n + 1)`` and is a lower bound near that. Equal scores count against the canary by half.
    """
    _require(score, references, space)
    better = sum((other > score) + 0.5 * (other == score) for other in references)
    if len(references) == space - 1:
        return math.log2(space) - math.log2(better + 1)
    return math.log2(len(references) + 1) - math.log2(better + 1)


def exposure(score: float, references: Scores, space: int) -> float:
    """Exposure of a canary in bits (Carlini et al. 2019, "The Secret Sharer", arXiv 1802.08232, sections 4.2 to 4.4).

    About 1 for a canary that was never seen, ``log2 |R|`` for one that beats all its siblings. Counting is used while it
    can tell: all siblings are given, or at least 20 of them beat the canary. Else a skew normal distribution is fitted to
    the siblings' scores by moments, and its tail beyond the canary is the rank: that is an extrapolation, as good as the
    fit. (The paper fits by likelihood.) It never exceeds ``log2 |R|``.

    Args:
        score: of the canary, higher for "was trained on", such as a log-likelihood.
        references: scores of siblings drawn at random from the same format, the canary not among them.
        space: |R|, how many strings the format has.

    Raises:
        CheckFailed: SS-1571 for NaN or without references.
        ValueError: when the space has no room for them.
    """
    _require(score, references, space)
    better = sum(other >= score for other in references)
    if len(references) == space - 1 or better >= _COUNTED or len(references) < 2:
        return sampled_exposure(score, references, space)
    values = np.asarray(references, dtype=np.float64)
    if not values.std() > 0:
        return sampled_exposure(score, references, space)
    return max(0.0, min(math.log2(space), -_log_tail(score, values) / math.log(2)))


def _require(score: float, references: Scores, space: int) -> None:
    if not len(references) or math.isnan(score) or any(math.isnan(other) for other in references):
        raise CheckFailed("SS-1571", "an exposure needs scores of siblings", hint="Give more candidates of one format.")
    if len(references) >= space:
        raise ValueError("more siblings were scored than the format has")


def _log_tail(score: float, values: npt.NDArray[np.float64]) -> float:
    """ln P[X >= score] of the skew normal with the sample's mean, deviation and skewness.

    Moments: Azzalini 1985; the skewness is held within what the family has, |g| < 0.995. The tail is integrated in
    logarithms, because a canary that was learnt stands dozens of deviations away.
    """
    import torch

    mean, std = float(values.mean()), float(values.std(ddof=1))
    skew = float(np.clip((((values - mean) / std) ** 3).mean(), -0.95, 0.95))
    part = abs(skew) ** (2 / 3)
    delta = math.copysign(math.sqrt(math.pi / 2 * part / (part + ((4 - math.pi) / 2) ** (2 / 3))), skew)
    alpha = delta / math.sqrt(1 - delta * delta)
    omega = std / math.sqrt(1 - 2 * delta * delta / math.pi)
    start = (score - (mean - omega * delta * math.sqrt(2 / math.pi))) / omega
    # Beyond `start` the density falls at least as fast as a normal's; from far below all of it is summed.
    grid = torch.linspace(max(start, -40.0), max(start, -40.0) + 60.0, 200_001, dtype=torch.float64)
    log_density = math.log(2) - grid.square() / 2 - math.log(2 * math.pi) / 2 + torch.special.log_ndtr(alpha * grid)
    return float(torch.logsumexp(log_density, 0)) + math.log(60.0 / 200_000)
