"""How well scores tell members from others, links from strangers, lengths from buckets.

Pure functions on numbers that the scorer has; no attack needs them. A metric that cannot be computed raises SS-1571, and
the run fails with it: nothing is replaced by 0 or 0.5.

Why not accuracy or AUC alone: an attack that names one record in a thousand for certain, and guesses about the others, is
worse for that one than AUC 0.5x says. So the share of members found at a false-positive rate of 1 % and 0.1 % stands
beside it (Carlini et al. 2022, arXiv 2112.03570), and with it whether there were enough non-members to say so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from attacks.metrics import wilson
from securesplit.errors import CheckFailed

__all__ = [
    "AtRate", "Extraction", "Lengths", "Pairs", "Roc", "auc", "auc_interval", "extraction", "length_errors", "log_points",
    "pairwise", "roc", "tpr_at", "wilson",
]  # fmt: skip

Scores = Sequence[float]


@dataclass(frozen=True, slots=True)
class Roc:
    """Every operating point of a score, from "nobody is a member" to "all are"; equal scores are one step.

    Attributes:
        false: false-positive rates, rising, 0 first and 1 last. true: true-positive rates at the same thresholds.
        thresholds: a candidate is called a member when its score is at least this; infinity first.
    """

    false: tuple[float, ...]
    true: tuple[float, ...]
    thresholds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AtRate:
    """Members found at a bounded false-positive rate.

    Attributes:
        rate: the bound that was asked for.
        recall: share of members found at the loosest threshold within the bound. low, high: its 95 % Wilson interval.
        reached: the false-positive rate there, at most ``rate``. reached_high: the upper end of its Wilson interval; with
            no false positive among n others it is still 3.84 / (n + 3.84).
        resolved: whether there are 1 / rate non-members. When not, no false positive was allowed at all, and the figure
            is the one at a stricter rate than the name says.
    """

    rate: float
    recall: float
    low: float
    high: float
    reached: float
    reached_high: float
    resolved: bool


@dataclass(frozen=True, slots=True)
class Pairs:
    """Claimed links against true ones, counted over unordered pairs of releases.

    Attributes:
        common, claimed, true: numbers of pairs.
        precision: None when nothing was claimed. recall: None when no two releases belong together.
        f1: 2 common / (claimed + true); None when both are 0.
    """

    common: int
    claimed: int
    true: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True, slots=True)
class Lengths:
    """Estimated token counts against true ones.

    Attributes:
        mean_error: mean absolute error in tokens. exact: share that is exactly right. count: sequences.
    """

    mean_error: float
    exact: float
    count: int


@dataclass(frozen=True, slots=True)
class Extraction:
    """Extracted pieces against the true ones, each counted once, compared after folding white space.

    Attributes:
        hits: named pieces that are true. named: different pieces that were named. pieces: different true ones.
        precision: hits / named; None when nothing was named. recall: hits / pieces.
    """

    hits: int
    named: int
    pieces: int
    precision: float | None
    recall: float


def _checked(members: Scores, others: Scores) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x, y = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if not x.size or not y.size:
        raise CheckFailed(
            "SS-1571",
            "membership cannot be scored without members and non-members",
            hint="Give candidates of both kinds.",
        )
    if np.isnan(x).any() or np.isnan(y).any():
        raise CheckFailed("SS-1571", "a membership score is no number", hint="This is a bug of the attack.")
    return x, y


def roc(members: Scores, others: Scores) -> Roc:
    """The ROC curve. O((m + n) log(m + n)).

    Raises:
        CheckFailed: SS-1571 without members or without others, or for NaN.
    """
    x, y = _checked(members, others)
    thresholds = np.unique(np.concatenate((x, y)))[::-1]
    x, y = np.sort(x), np.sort(y)
    true = (len(x) - np.searchsorted(x, thresholds, side="left")) / len(x)
    false = (len(y) - np.searchsorted(y, thresholds, side="left")) / len(y)
    return Roc((0.0, *false.tolist()), (0.0, *true.tolist()), (math.inf, *thresholds.tolist()))


def _placements(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """For every x the share of y below it, equal ones by half."""
    y = np.sort(y)
    twice = np.searchsorted(y, x, "left") + np.searchsorted(y, x, "right")
    return np.asarray(twice / (2 * len(y)), dtype=np.float64)


def auc(members: Scores, others: Scores) -> float:
    """Chance that a member scores above a non-member, ties by half (Mann and Whitney); the area under :func:`roc`."""
    x, y = _checked(members, others)
    return float(_placements(x, y).mean())


def auc_interval(members: Scores, others: Scores, *, alarm: float = 0.05) -> tuple[float, float]:
    """95 % interval of :func:`auc`, or at another two-sided error.

    The variance is DeLong's (1988), on the logit scale, which keeps the interval within 0 and 1. A perfect separation has
    no variance; then the bound is the exact one of k = min(m, n) disjoint pairs that all came out right, ``(alarm / 2)^(1/k)``,
    which assumes no distribution. One member or one non-member alone says nothing of spread: 0 to 1.
    """
    x, y = _checked(members, others)
    area, fewest = auc(members, others), min(len(x), len(y))
    if area in {0.0, 1.0}:
        edge = (alarm / 2) ** (1 / fewest)
        return (edge, 1.0) if area == 1.0 else (0.0, 1 - edge)
    if fewest < 2:
        return 0.0, 1.0
    variance = _placements(x, y).var(ddof=1) / len(x) + _placements(y, x).var(ddof=1) / len(y)
    reach = NormalDist().inv_cdf(1 - alarm / 2) * math.sqrt(variance) / (area * (1 - area))
    middle = math.log(area / (1 - area))
    return _logistic(middle - reach), _logistic(middle + reach)


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def tpr_at(members: Scores, others: Scores, rate: float) -> AtRate:
    """Members found while at most ``rate`` of the others are called members. No interpolation between points.

    For a mu-GDP mechanism it is bounded by ``Phi(Phi^-1(rate) + mu)``, that is ``attacks.bounds.ceiling(rate, mu)``.

    Raises:
        ValueError: for a rate outside 0 to 1.
        CheckFailed: SS-1571 as :func:`roc`.
    """
    if not 0 <= rate <= 1:
        raise ValueError("a rate lies between 0 and 1")
    curve = roc(members, others)
    # The last point within the bound; a rate of 0.01 of 100 others must allow one, whatever binary fractions say.
    point = max(i for i, false in enumerate(curve.false) if false <= rate * (1 + 1e-12))
    found, wrong = round(curve.true[point] * len(members)), round(curve.false[point] * len(others))
    low, high = wilson(found, len(members))
    return AtRate(
        rate=rate, recall=curve.true[point], low=low, high=high, reached=curve.false[point],
        reached_high=wilson(wrong, len(others))[1], resolved=rate > 0 and len(others) * rate >= 1 - 1e-9,
    )  # fmt: skip


def log_points(curve: Roc) -> tuple[tuple[float, float], ...]:
    """Corners of the curve for axes that are both logarithmic: (false, true), both positive, in order.

    Of points with one false-positive rate the highest is kept. What was found without any false positive has no place on
    such an axis; it shows at the smallest rate that was measured, and :func:`tpr_at` says it.
    """
    best: dict[float, float] = {}
    for false, true in zip(curve.false, curve.true, strict=True):
        if false > 0 and true > 0:
            best[false] = max(true, best.get(false, 0.0))
    return tuple(sorted(best.items()))


def pairwise(true: Sequence[int], claimed: Sequence[int]) -> Pairs:
    """Precision, recall and F1 over pairs, from two groupings of the same releases.

    Args:
        true, claimed: a group for each release, in one order; the numbers themselves say nothing.
    """
    both, left, right = Counter(zip(true, claimed, strict=True)), Counter(true), Counter(claimed)
    common, of_true, of_claimed = (sum(n * (n - 1) // 2 for n in c.values()) for c in (both, left, right))
    return Pairs(
        common=common, claimed=of_claimed, true=of_true,
        precision=common / of_claimed if of_claimed else None,
        recall=common / of_true if of_true else None,
        f1=2 * common / (of_true + of_claimed) if of_true + of_claimed else None,
    )  # fmt: skip


def length_errors(true: Sequence[int], claimed: Sequence[int]) -> Lengths:
    """How far off claimed lengths are.

    Raises:
        CheckFailed: SS-1571 without a sequence.
    """
    off = [abs(a - b) for a, b in zip(true, claimed, strict=True)]
    if not off:
        raise CheckFailed("SS-1571", "there is no length to score", hint="Give truth for sequences of the recording.")
    return Lengths(sum(off) / len(off), sum(d == 0 for d in off) / len(off), len(off))


def extraction(named: Iterable[str], pieces: Iterable[str]) -> Extraction:
    """Compare extracted pieces with the true ones: whole pieces only, nothing by part or by similarity.

    Args:
        named: what an attack named; for precision among its first k give those alone.
        pieces: every piece of the training data that identifies somebody.

    Raises:
        CheckFailed: SS-1571 when there is no true piece.
    """
    guess, truth = ({" ".join(piece.split()) for piece in side} - {""} for side in (named, pieces))
    if not truth:
        raise CheckFailed("SS-1571", "there is no piece to extract", hint="Give truth with labelled pieces.")
    hits = len(guess & truth)
    return Extraction(hits, len(guess), len(truth), hits / len(guess) if guess else None, hits / len(truth))
