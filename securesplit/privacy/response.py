"""Randomised response: a label that may leave, because it is often another one.

With probability ``e^epsilon / (e^epsilon + K - 1)`` the label is kept, else it is one of the other K - 1, each as likely
(Warner 1965; Kairouz, Bonawitz and Ramage 2016, arXiv:1602.07387). That is epsilon-DP for the label, for every epsilon
with delta = 0, and counts ``pure_mu(epsilon)`` in the ledger. A record's label is answered once and the answer kept: two
answers cost twice, and every gradient made from the kept one is free.

What this does not protect: the text, or a label that the text gives away; and of a causal language model, whose labels are
the text, nothing useful would be left.
"""

from __future__ import annotations

import math
import os
import secrets
from decimal import ROUND_FLOOR, Decimal, localcontext
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_BITS = 128
LEAST, MOST = 1e-6, 600.0  # Epsilons for which the rounding below is on the safe side and a mu exists.


def keep_probability(epsilon: float, classes: int) -> float:
    """``e^epsilon / (e^epsilon + K - 1)``, to a double's precision.

    Raises:
        ValueError: for fewer than two classes, or epsilon outside [LEAST, MOST].
    """
    _check(epsilon, classes)
    return 1 / (1 + (classes - 1) * math.exp(-epsilon))


def respond(label: int, classes: int, epsilon: float) -> int:
    """Answer for one record, once.

    128 bits from the operating system are compared, as an integer, with the keep probability's 2^128th part, rounded down;
    so that the ratio of two labels' probabilities is at most e^epsilon, exactly. Both the coin and the other label are
    drawn in every call, and neither takes time that depends on the label.

    Args:
        label: 0 to classes - 1.
        classes: K, public.
        epsilon: of the label.

    Returns:
        A label, 0 to classes - 1.

    Raises:
        ValueError: for a label that does not exist, or as :func:`keep_probability`.
    """
    threshold = _threshold(epsilon, classes)
    if not 0 <= label < classes:
        raise ValueError("the label must be one of the classes")
    kept = int(int.from_bytes(os.urandom(_BITS // 8), "little") < threshold)
    other = (label + 1 + secrets.randbelow(classes - 1)) % classes
    return kept * label + (1 - kept) * other


def debiasing(epsilon: float, classes: int) -> npt.NDArray[np.float64]:
    """The matrix that undoes the answers' bias on average: the inverse of ``P[y, z] = P(answer z | label y)``.

    A learner that holds answer z uses ``sum_y M[z, y] loss(y)``; its mean over the answers is the true label's loss. Entries
    are negative and grow as epsilon falls; variance is what the label's privacy costs.

    Returns:
        (K, K) float64, rows add up to 1.
    """
    keep = keep_probability(epsilon, classes)
    other = math.exp(-epsilon) * keep
    gap = -math.expm1(-epsilon) * keep  # keep - other, without cancellation
    return (np.eye(classes) - other) / gap


@lru_cache(maxsize=64)
def _threshold(epsilon: float, classes: int) -> int:
    """The largest integer t with ``t / 2^128 <= e^epsilon / (e^epsilon + K - 1)``, or one less."""
    _check(epsilon, classes)
    with localcontext() as context:
        context.prec = 400  # e^-600 takes 261 digits to tell from 0 beside 1.
        keep = 1 / (1 + (classes - 1) * (-Decimal(epsilon)).exp())
        exact = (keep * (1 << _BITS)).to_integral_value(rounding=ROUND_FLOOR)
    return min(int(exact), (1 << _BITS) - 1)


def _check(epsilon: float, classes: int) -> None:
    if classes < 2 or not LEAST <= epsilon <= MOST:
        raise ValueError(f"there must be two classes, and epsilon between {LEAST} and {MOST:g}")
