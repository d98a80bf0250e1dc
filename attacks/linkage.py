"""Which releases show one record: by equal bytes, by the order of passes, and by content through the noise (O7).

Two fresh releases of one record differ by noise alone, while releases of two records also differ by their rows. With
clean rows spread as N(m, L) in the eigenbasis of public text, and noise of variance w, the exact log-likelihood ratio of
"one record" against "two" is quadratic in the pair (the two-covariance model of speaker verification, PLDA):

    sum_i  log (l + w) - log((2 l + w) w) / 2 + l x y / ((2 l + w) w) - l^2 (x^2 + y^2) / (2 (2 l + w) w (l + w)),

x and y about m, l and w by direction. It uses what the two share, not how far apart they are alone, and so still sees
something where the difference is buried. Besides, the difference must be noise: a chi-square test over all rows, and one
over each, because records of one template agree almost everywhere.

Not modelled: that rows of one sequence hang together, and that records resemble each other in kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Spread", "Verdicts", "assign", "compare", "group", "match_passes", "spread_of"]

Matrix = npt.NDArray[np.float64]

# Deviations of the chi-square statistic beyond which a difference is more than noise.
_ALIKE = 6.0
# Clean rows of one record may differ by so much of the spread: adapters move between passes, codecs round.
_DRIFT = 0.01
# Directions that carry this part of the evidence are kept.
_KEPT = 0.99


@dataclass(frozen=True, slots=True)
class Spread:
    """Clean rows in their own directions.

    Attributes:
        basis: (D, r). variance: (r,) of clean rows along it. error: (r,) of one release about its clean row.
    """

    basis: Tensor
    variance: Tensor
    error: Tensor


@dataclass(frozen=True, slots=True)
class Verdicts:
    """All pairs of N releases of one length.

    Attributes:
        ratio: (N, N) log-likelihood ratio, higher for one record. alike: (N, N) bool, the difference may be noise.
    """

    ratio: Matrix
    alike: npt.NDArray[np.bool_]


def spread_of(rows: Tensor, sigma: float) -> Spread:
    """Directions and variances from clean public rows, (M, D), at a noise level.

    Kept are the directions that together give 99 % of the evidence a pair can be expected to give at that noise.
    """
    centred = (rows - rows.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(rows)))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    error = sigma**2 + _DRIFT * values + 1e-6 * float(values.mean()) + 1e-30
    evidence = torch.cumsum((values / (values + error)).square(), 0)
    kept = int((evidence < _KEPT * evidence[-1]).sum()) + 1
    return Spread(vectors[:, :kept], values[:kept], error[:kept])


def compare(rows: Tensor, first: Spread, later: Spread, errors: Sequence[float]) -> Verdicts:
    """Compare all pairs of releases.

    Args:
        rows: (N, T, D) about the mean row of each position.
        first, later: of position 0, whose states are like no others, and of the rest.
        errors: (N,) by which factor each row's error variance is smaller; 1 / K for a mean of K releases.
    """
    scale = torch.tensor(list(errors), dtype=torch.float64)
    ratio = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    worst = torch.full_like(ratio, -math.inf)
    total, places = torch.zeros_like(ratio), 0
    for position in range(rows.shape[1]):
        spread = first if position == 0 else later
        x = rows[:, position].double() @ spread.basis
        ratio += _ratio(x, spread, scale)
        both = (scale[:, None] + scale[None, :]).clamp_min(1e-30)
        far = _squares(x / spread.error.sqrt()) / both
        count = len(spread.error)
        worst = torch.maximum(worst, (far - count) / math.sqrt(2 * count))
        total, places = total + far, places + count
    whole = (total - places) / math.sqrt(2 * max(1, places))
    return Verdicts(ratio.numpy(), ((whole < _ALIKE) & (worst < _ALIKE + 2)).numpy())


def _squares(x: Tensor) -> Tensor:
    """(N, r) to (N, N) squared distances."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()


def _ratio(x: Tensor, spread: Spread, scale: Tensor) -> Tensor:
    """(N, N) log-likelihood ratio of one row, errors of the two sides taken as their mean where they differ."""
    levels = sorted(set(scale.tolist()))
    if len(levels) > 1:
        found = torch.empty(len(x), len(x), dtype=torch.float64)
        for a in levels:
            for b in levels:
                left, right = scale == a, scale == b
                found[left.nonzero(), right.nonzero()[:, 0]] = _even(x[left], x[right], spread, (a + b) / 2)
        return found
    return _even(x, x, spread, levels[0])


def _even(x: Tensor, y: Tensor, spread: Spread, scale: float) -> Tensor:
    between, within = spread.variance, spread.error * scale
    shared = (2 * between + within) * within
    constant = (torch.log(between + within) - torch.log(shared) / 2).sum()
    cross = (x * (between / shared)) @ y.T
    weight = between.square() / (2 * shared * (between + within))
    return constant + cross - (x.square() @ weight)[:, None] - (y.square() @ weight)[None, :]


def group(verdicts: Verdicts, threshold: float) -> list[int]:
    """Groups without knowing how many releases a record has: the best pairs first, all pairs of a group must agree.

    Args:
        threshold: mean log-likelihood ratio between two groups that joins them; log of the number of rivals, at least.

    Returns:
        A group for each release, numbered from 0 by first appearance.
    """
    members: dict[int, list[int]] = {i: [i] for i in range(len(verdicts.ratio))}
    home = list(range(len(verdicts.ratio)))
    left, right = np.nonzero(np.triu(verdicts.alike & (verdicts.ratio > threshold), 1))
    for pair in np.argsort(-verdicts.ratio[left, right], kind="stable"):
        a, b = home[left[pair]], home[right[pair]]
        if a == b:
            continue
        block = np.ix_(members[a], members[b])
        if verdicts.alike[block].all() and verdicts.ratio[block].mean() > threshold:
            for index in members[b]:
                home[index] = a
            members[a] += members.pop(b)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(h, len(numbers)) for h in home]


def match_passes(rows: Tensor, passes: Sequence[Sequence[int]], first: Spread, later: Spread) -> list[int]:
    """Groups when every pass releases every record once: each pass is matched to the mean of those before it.

    Args:
        rows: (N, T, D) about the mean row of each position.
        passes: indices of the releases of each pass; all of one number.

    Returns:
        A group for each release, (N,), numbered by its place in the first pass.
    """
    home = [0] * len(rows)
    means = rows[list(passes[0])].double()
    for place, index in enumerate(passes[0]):
        home[index] = place
    for done, indices in enumerate(passes[1:], 1):
        here = rows[list(indices)].double()
        count = len(indices)
        verdicts = compare(torch.cat((means, here)), first, later, [1 / done] * count + [1.0] * count)
        chosen = assign(-verdicts.ratio[:count, count:])
        for place, column in enumerate(chosen):
            home[indices[column]] = place
        means = (means * done + here[chosen]) / (done + 1)
    return home


def assign(cost: Matrix) -> list[int]:
    """The one-to-one assignment of least total cost: (n, n) to each row's column.

    Shortest augmenting paths with potentials (Jonker and Volgenant 1987), O(n^3). Column n is a stand-in that holds the
    row which is being placed.
    """
    size = len(cost)
    of_row, of_column = np.zeros(size + 1), np.zeros(size + 1)
    held = np.full(size + 1, size)
    for row in range(size):
        held[size], column = row, size
        reach, before = np.full(size, np.inf), np.full(size, size)
        visited = np.zeros(size + 1, dtype=bool)
        while held[column] < size:
            visited[column] = True
            free = ~visited[:size]
            slack = cost[held[column]] - of_row[held[column]] - of_column[:size]
            nearer = free & (slack < reach)
            reach[nearer], before[nearer] = slack[nearer], column
            nearest = int(np.argmin(np.where(free, reach, np.inf)))
            step = reach[nearest]
            of_row[held[visited]] += step
            of_column[visited] -= step
            reach[free] -= step
            column = nearest
        while column != size:
            held[column], column = held[before[column]], int(before[column])
        held[size] = size
    chosen = [0] * size
    for column in range(size):
        chosen[held[column]] = column
    return chosen
