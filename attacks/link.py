"""Linking the fresh releases of one record across passes, when the sender shuffles the records in each pass.

Averaging K releases of a record needs to know which they are. A client that keeps its order gives that away
(:func:`link_by_order`); a client that shuffles leaves the content. Rows are taken as ``x_t + sigma z_t`` with
a Gaussian signal x, whose covariance shows in the recording itself: the covariance of all rows is its own plus sigma^2.
In the eigenbasis, with signal variance l_j, rho_j = l_j / (l_j + sigma^2) and v_j = l_j + sigma^2, two releases a and b of
one record, against two of different records, have the log-likelihood ratio

    sum_j rho_j / ((1 - rho_j^2) v_j) a_j b_j  +  terms that no choice of pairs changes,

so that the best pairing of two passes is an assignment problem (Kuhn-Munkres). More passes are linked by alternating:
each pass is assigned to the sums of the others until nothing moves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

__all__ = ["link_by_content", "link_by_order", "link_releases"]

Rows = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
# Features (passes, n, F) of the releases of one length to (passes, n): which release of each pass shows record i.
Assign = Callable[[Matrix], npt.NDArray[np.intp]]

_SWEEPS = 10
# Releases of one record differ by more than the noise where adapters train between passes: a part of the mean variance.
_DRIFT = 1e-3


def link_by_order(digests: Sequence[str], passes: int) -> list[list[int]]:
    """Which releases of one sender show the same record, if each pass goes over its records in the same order.

    A memoised release is resent as the same bytes; it counts once, since nothing is gained by averaging it. When the
    number of distinct releases is no multiple of ``passes``, nothing is linked. A client that shuffles every pass makes
    the links wrong; then the averaged attack is a weak one and the others stand.

    Args:
        digests: one per release, in the order seen.
        passes: how many fresh releases each record has.

    Returns:
        For every release the indices of one release from each pass, itself or its first copy included.
    """
    first: dict[str, int] = {}
    for index, digest in enumerate(digests):
        first.setdefault(digest, index)
    distinct = list(first.values())
    if passes < 2 or len(distinct) % passes:
        return [[first[digest]] for digest in digests]
    stride = len(distinct) // passes
    place = {index: number for number, index in enumerate(distinct)}
    return [[distinct[place[first[d]] % stride + stride * k] for k in range(passes)] for d in digests]


def link_by_content(rows: Sequence[Rows], passes: int, *, sigma: float = 0.0) -> list[list[int]]:
    """Which releases of one sender show the same record, whatever their order within a pass.

    A release that was resent as the same bytes counts once. When the number of distinct releases, or of those of one
    length, is not the same in every pass, those are not linked. Where the noise hides the content the links are at chance.

    Args:
        rows: one (T, D) array per release, in the order seen: pass by pass, in any order within a pass.
        passes: how many fresh releases each record has.
        sigma: of the noise per coordinate, from the policy.

    Returns:
        For every release the indices of one release from each pass, in the order of the passes, itself or its first copy
        included; itself or its first copy alone where it is not linked.
    """
    return _linked(rows, passes, sigma, _by_content)


def link_releases(rows: Sequence[Rows], passes: int, *, sigma: float = 0.0) -> list[list[int]]:
    """By order or by content, whichever explains the releases better; arguments and result as in :func:`link_by_content`.

    Links by content always explain more, since they were chosen to. They are believed when their log-likelihood ratio to
    the links by order exceeds the logarithm of the number of pairings, log n!, that they were chosen from: by Markov's
    inequality links by order that are right are then given up about once in e^3 times.
    """

    def better(features: Matrix) -> npt.NDArray[np.intp]:
        order = np.tile(np.arange(features.shape[1]), (len(features), 1))
        content = _by_content(features)
        gain = _explained(features, content) - _explained(features, order)
        freedom = (len(features) - 1) * math.lgamma(features.shape[1] + 1) + 3
        return content if gain > freedom else order

    return _linked(rows, passes, sigma, better)


def _linked(rows: Sequence[Rows], passes: int, sigma: float, assign: Assign) -> list[list[int]]:
    copies: dict[bytes, int] = {}
    first = [copies.setdefault(hashlib.sha256(one.tobytes()).digest(), i) for i, one in enumerate(rows)]
    distinct = list(copies.values())
    groups = {index: [index] for index in distinct}
    if passes > 1 and distinct and len(distinct) % passes == 0:
        blocks = np.asarray(distinct).reshape(passes, -1)
        for length in sorted({rows[index].shape for index in distinct}):
            same = [[int(index) for index in block if rows[index].shape == length] for block in blocks]
            if len({len(indices) for indices in same}) == 1:
                stacked = np.stack([[rows[index] for index in indices] for indices in same])
                places = assign(_features(stacked, sigma))
                for record in range(len(same[0])):
                    group = [indices[places[k, record]] for k, indices in enumerate(same)]
                    groups.update(dict.fromkeys(group, group))
    return [groups[index] for index in first]


def _features(rows: npt.NDArray[np.float32], sigma: float) -> Matrix:
    """Rows (passes, n, T, D) to features (passes, n, F) whose inner products are log-likelihood ratios."""
    passes, count, length, width = rows.shape
    centred = (rows - rows.mean(axis=(0, 1), dtype=np.float64)).reshape(-1, width)
    variances, basis = np.linalg.eigh(centred.T @ centred / len(centred))
    noise = max(sigma**2, _DRIFT * float(variances.mean()), 1e-30)
    signal = np.clip(variances - noise, 0, None)
    rho = signal / (signal + noise)
    weight = rho / ((1 - rho**2) * (signal + noise))
    features: Matrix = (centred @ basis * np.sqrt(weight)).reshape(passes, count, length * width)
    return features


def _by_content(features: Matrix) -> npt.NDArray[np.intp]:
    """Each pass against the first, then each against the sum of the others until nothing moves."""
    places = np.tile(np.arange(features.shape[1]), (len(features), 1))
    total = features[0].copy()
    for k in range(1, len(features)):
        places[k] = _match(total, features[k])
        total += features[k][places[k]]
    for _ in range(_SWEEPS if len(features) > 2 else 0):
        before = places.copy()
        for k in range(1, len(features)):
            total -= features[k][places[k]]
            places[k] = _match(total, features[k])
            total += features[k][places[k]]
        if np.array_equal(before, places):
            break
    return places


def _match(anchors: Matrix, others: Matrix) -> npt.NDArray[np.intp]:
    """For each anchor the row of ``others`` in the pairing with the largest sum of inner products."""
    chosen: npt.NDArray[np.intp] = linear_sum_assignment(anchors @ others.T, maximize=True)[1]
    return chosen


def _explained(features: Matrix, places: npt.NDArray[np.intp]) -> float:
    """Log-likelihood ratio of links, each pass paired with the first."""
    return sum(float((features[0] * features[k][places[k]]).sum()) for k in range(1, len(features)))
