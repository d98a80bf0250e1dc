"""Do two released rows share their noise? Every pair is looked at, whichever rows and releases they come from.

Rows ``a = x + z`` and ``b = x' + z'`` in units of their own sigma, with fresh standard normal z: whatever x and x' are,
``|a - b|^2 / 2`` and ``|a + b|^2 / 2`` are noncentral chi-square with D degrees, so at least as large as a central one. Rows
that share their noise, or carry it with the other sign, come closer than that.

All pairs of many rows are too many to compare on all coordinates. Then 64 fixed orthonormal directions say which pairs are
close, and only those are compared in full; a test on some of the pairs accuses no more often than one on all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["ROWS", "Closest", "across", "between", "within"]

ROWS = 1 << 15  # Rows that are compared with one another: 5e8 pairs, some ten seconds on one core.
_VALUES = 1 << 26  # Numbers in these rows.
_WORK = 2e10  # Multiplications up to which pairs are compared on all coordinates at once.
_PAIRS = 1 << 30  # Pairs within releases.
_BLOCK = 2048
_SKETCH = 64
_FEW = 1e-4  # The share of honest pairs that is compared in full.
_MOST = 2048  # Of them, in one block.

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Closest:
    """The closest pair.

    Attributes:
        least: smallest ``|a -+ b|^2 / 2``, in squares of sigma.
        width: D, coordinates of a row.
        tests: how many pairs and signs it is the smallest of.
    """

    least: float
    width: int
    tests: int


def within(releases: Sequence[Rows]) -> Closest | None:
    """All pairs of rows of one release, release after release, up to 2^30 pairs; None where no release has two rows.

    Args:
        releases: (T, D) each, in units of sigma.
    """
    chosen: list[Rows] = []
    seen = 0
    for rows in releases:
        if len(rows) > 1:
            seen += len(rows) ** 2
            if chosen and seen > _PAIRS:
                break
            chosen.append(rows)
    if not chosen:
        return None
    project = _directions(chosen[0].shape[1], sum(len(rows) ** 2 for rows in chosen))
    least = min(_least(rows, np.arange(len(rows)), rows, np.arange(len(rows)), project) for rows in chosen)
    return Closest(least, chosen[0].shape[1], sum(len(rows) * (len(rows) - 1) for rows in chosen))


def between(releases: Sequence[Rows]) -> Closest | None:
    """All pairs of rows of two releases; None for fewer than two releases. At most :data:`ROWS` rows: see :func:`_some`."""
    if len(releases) < 2:
        return None
    rows, owners = _some(releases, ROWS)
    least = _least(rows, owners, rows, owners, _directions(rows.shape[1], len(rows) ** 2))
    same = int(np.square(np.bincount(owners)).sum())
    return Closest(least, rows.shape[1], len(rows) ** 2 - same)


def across(left: Sequence[Rows], right: Sequence[Rows]) -> Closest | None:
    """All pairs of a row of one channel and a row of another; None where a side is empty or the widths differ."""
    if not left or not right or left[0].shape[1] != right[0].shape[1]:
        return None
    (a, _), (b, _) = _some(left, ROWS // 2), _some(right, ROWS // 2)
    project = _directions(a.shape[1], len(a) * len(b))
    least = _least(a, np.zeros(len(a), np.int64), b, np.ones(len(b), np.int64), project)
    return Closest(least, a.shape[1], 2 * len(a) * len(b))


def _some(releases: Sequence[Rows], most: int) -> tuple[Rows, npt.NDArray[np.int64]]:
    """At most so many rows, and which release each is of.

    All of them where they fit. Else the first releases whole, up to half, and from each of the others equally many of its
    first rows, so that noise that is used again from release to release shows wherever it begins.
    """
    most = min(most, _VALUES // releases[0].shape[1])
    if sum(map(len, releases)) <= most:
        return np.concatenate(releases), np.repeat(np.arange(len(releases)), [len(r) for r in releases])
    whole, taken = 0, 0
    while whole < len(releases) and taken + len(releases[whole]) <= most // 2:
        taken += len(releases[whole])
        whole += 1
    rest = releases[whole : whole + most - taken]
    first = max(1, (most - taken) // len(rest))
    parts = [*releases[:whole], *(r[:first] for r in rest)]
    return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(p) for p in parts])


def _directions(width: int, pairs: int) -> npt.NDArray[np.float32] | None:
    """(D, 64) orthonormal columns, the same on every call; None where comparing on all coordinates is cheap."""
    if width <= _SKETCH or width * pairs <= _WORK:
        return None
    drawn = np.random.default_rng(20261123).standard_normal((width, _SKETCH))
    return np.asarray(np.linalg.qr(drawn)[0], dtype=np.float32)


def _least(
    a: Rows, owners_a: npt.NDArray[np.int64], b: Rows, owners_b: npt.NDArray[np.int64],
    project: npt.NDArray[np.float32] | None,
) -> float:  # fmt: skip
    """The smallest ``|a -+ b|^2 / 2`` over pairs of different owners that were compared in full."""
    short_a, short_b = (a, b) if project is None else (a @ project, b @ project)
    near = 2 * float(stats.chi2.ppf(_FEW, short_a.shape[1]))
    size_a, size_b = (np.square(rows.astype(np.float64)).sum(1).astype(np.float32) for rows in (short_a, short_b))
    least = np.inf
    for i in range(0, len(a), _BLOCK):
        # Of a set against itself one half says everything.
        for j in range(i if a is b else 0, len(b), _BLOCK):
            one, two = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
            apart = size_a[one, None] + size_b[None, two] - 2 * np.abs(short_a[one] @ short_b[two].T)
            apart[owners_a[one, None] == owners_b[None, two]] = np.inf
            flat = apart.ravel()
            close = np.flatnonzero(flat < near)
            if len(close) > _MOST:
                close = close[np.argpartition(flat[close], _MOST)[:_MOST]]
            close = np.append(close, flat.argmin())
            close = close[np.isfinite(flat[close])]
            if len(close):
                first, second = np.unravel_index(close, apart.shape)
                x, y = a[i + first].astype(np.float64), b[j + second].astype(np.float64)
                least = min(least, float(np.square(x - y).sum(1).min()), float(np.square(x + y).sum(1).min()))
    return least / 2
