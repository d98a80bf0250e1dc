"""MultiRC's official measures (Khashabi et al. 2018): F1m, F1a, EM0 and EM1 over questions with any number of right answers.

Of one question, with the right answers R among its candidates and those that were called right, P:

    precision = |R and P| / |P|     1 where nothing was called right
    recall    = |R and P| / |R|     1 where nothing is right
    EMd       = 1 if at most d candidates are judged wrongly

F1m is the harmonic mean of the mean precision and the mean recall over questions. It is *not* the mean of the questions'
F1, which some toolkits print under the same name. F1a is the F1 of all candidates of the data set taken together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["em0", "em1", "f1a", "f1m", "question_row"]

_Sums = npt.NDArray[np.float64]
_PRECISION, _RECALL, _ONE, _AGREED, _CALLED, _RIGHT, _EM0, _EM1 = range(8)


def question_row(gold: Sequence[bool], given: Sequence[bool]) -> tuple[float, ...]:
    """What one question adds to the sums, (8,).

    Args:
        gold: of each candidate, whether it is right.
        given: of each candidate, whether it was called right.
    """
    agreed = sum(g and p for g, p in zip(gold, given, strict=True))
    called, right = sum(given), sum(gold)
    wrong = sum(g != p for g, p in zip(gold, given, strict=True))
    return (
        agreed / called if called else 1.0, agreed / right if right else 1.0, 1.0, float(agreed), float(called),
        float(right), float(wrong == 0), float(wrong <= 1),
    )  # fmt: skip


def f1m(sums: _Sums) -> _Sums:
    """Harmonic mean of mean precision and mean recall, (R, 8) to (R,)."""
    return _harmonic(sums[:, _PRECISION] / sums[:, _ONE], sums[:, _RECALL] / sums[:, _ONE])


def f1a(sums: _Sums) -> _Sums:
    """F1 over all candidates, (R, 8) to (R,); precision or recall without a denominator is 1, as in the official script."""
    agreed = sums[:, _AGREED]
    return _harmonic(_share(agreed, sums[:, _CALLED]), _share(agreed, sums[:, _RIGHT]))


def em0(sums: _Sums) -> _Sums:
    """Share of questions with every candidate judged rightly, (R, 8) to (R,)."""
    found: _Sums = sums[:, _EM0] / sums[:, _ONE]
    return found


def em1(sums: _Sums) -> _Sums:
    """Share of questions with at most one candidate judged wrongly, (R, 8) to (R,)."""
    found: _Sums = sums[:, _EM1] / sums[:, _ONE]
    return found


def _share(part: _Sums, whole: _Sums) -> _Sums:
    return np.divide(part, whole, out=np.ones_like(part), where=whole > 0)


def _harmonic(precision: _Sums, recall: _Sums) -> _Sums:
    """0 where both are 0, for which the official script has no answer."""
    total = precision + recall
    return np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)
