"""A measure and how sure of it a test set of this size lets us be: the cluster bootstrap.

Examples that share a passage stand or fall together, so what is drawn again, with replacement, are whole groups, never
single examples (Efron and Tibshirani 1993, section 8; Cameron, Gelbach and Miller 2008). Every measure here is a function
of sums over examples: a row of counts for each example, and a function of the rows' sum. One draw of groups is then one
product of small matrices, and a measure that is no mean, such as F1 or BLEU, costs no more than one that is.

What an interval does not say: how another training run, another prompt or other data would come out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["LEVEL", "RESAMPLES", "Estimate", "Value", "estimate", "mean"]

RESAMPLES = 2000
LEVEL = 0.95
# Public, so that anybody gets the same interval from the same predictions.
_SEED = 20261122
_CHUNK_CELLS = 1 << 22

Value = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
"""Sums of rows, (R, k), to the measure of each, (R,)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One measure of one set of predictions.

    Attributes:
        value: on the whole set.
        low, high: of the interval, from the percentiles of the draws; None where one group alone can say nothing.
        groups: how many groups were drawn from.
    """

    value: float
    low: float | None
    high: float | None
    groups: int


def estimate(
    rows: Sequence[Sequence[float]],
    groups: Sequence[str],
    value: Value,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Estimate:
    """The measure and its interval.

    Args:
        rows: what each example adds to the sums, (N, k).
        groups: the group of each example, (N,).
        value: from sums to the measure.
        resamples: draws of groups, R.
        level: how much of the draws the interval holds, 0 to 1.
    """
    table = np.asarray(rows, dtype=np.float64)
    if table.ndim != 2 or len(table) != len(groups) or not len(table):
        raise ValueError("one row and one group for each of at least one example")
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    member = np.fromiter((names[name] for name in groups), dtype=np.int64, count=len(groups))
    sums = np.zeros((len(names), table.shape[1]))
    np.add.at(sums, member, table)
    point = float(value(sums.sum(axis=0, keepdims=True))[0])
    if len(names) < 2:
        return Estimate(point, None, None, len(names))
    draws = np.concatenate([value(drawn) for drawn in _draws(sums, resamples)])
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(point, float(low), float(high), len(names))


def mean(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean of a score whose rows are ``(score, 1)``."""
    found: npt.NDArray[np.float64] = sums[:, 0] / sums[:, 1]
    return found


def _draws(sums: npt.NDArray[np.float64], resamples: int) -> list[npt.NDArray[np.float64]]:
    """Sums over drawn groups, (R, k) in pieces that fit into little memory."""
    count = len(sums)
    generator = np.random.default_rng(_SEED)
    piece = max(1, min(resamples, _CHUNK_CELLS // count))
    shares = np.full(count, 1 / count)
    return [
        generator.multinomial(count, shares, size=min(piece, resamples - start)) @ sums
        for start in range(0, resamples, piece)
    ]
