"""From counts to what they prove: exact binomial limits, a lower bound of mu, and of epsilon from one run.

Everything here is distribution-free but for the claim that is tested: the limits are Clopper and Pearson's, which hold for
every n, and the one-run bound is that of Steinke, Nasr and Jagielski (2023, arXiv:2305.08846). A lower bound proves a
fault where it exceeds a claim; where it does not, nothing is proved.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

_NORMAL = NormalDist()
_HALVINGS = 80


@lru_cache(maxsize=8)
def _log_factorials(n: int) -> npt.NDArray[np.float64]:
    logs = np.zeros(n + 1)
    np.cumsum(np.log(np.arange(1, n + 1)), out=logs[1:])
    logs.setflags(write=False)
    return logs


def binomial(n: int, p: float) -> npt.NDArray[np.float64]:
    """P[Bin(n, p) = k] for k = 0..n, (n+1,)."""
    if p <= 0 or p >= 1:
        sure = np.zeros(n + 1)
        sure[n if p >= 1 else 0] = 1.0
        return sure
    logs, k = _log_factorials(n), np.arange(n + 1)
    mass: npt.NDArray[np.float64] = np.exp(logs[n] - logs - logs[::-1] + k * math.log(p) + (n - k) * math.log1p(-p))
    return mass


def at_least(n: int, p: float, k: int) -> float:
    """P[Bin(n, p) >= k]."""
    return 1.0 if k <= 0 else float(binomial(n, p)[k:].sum())


def rate_at_least(hits: int, n: int, error: float) -> float:
    """The Clopper-Pearson lower limit of a rate: wrong with probability at most ``error``."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS if hits else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if at_least(n, middle, hits) <= error else (low, middle)
    return low


def rate_at_most(hits: int, n: int, error: float) -> float:
    """The Clopper-Pearson upper limit of a rate."""
    return 1.0 - rate_at_least(n - hits, n, error)


def mu_at_least(hits: int, alarms: int, n: int, error: float) -> float:
    """A lower bound of mu from one test with a threshold fixed in advance.

    ``Phi^-1(TPR) - Phi^-1(FPR) <= mu`` for every test of a mu-GDP mechanism (Dong, Roth, Su 2022), hence also for the
    limits ``TPR_low`` and ``FPR_up``, but with probability ``error``.

    Args:
        hits, alarms: how often the test said "world u", of ``n`` trials in world u and of ``n`` in world v.
        n: trials in each world.
        error: of both limits together.

    Returns:
        The bound, which may be negative; minus infinity when nothing is known of one rate.
    """
    low, up = rate_at_least(hits, n, error / 2), rate_at_most(alarms, n, error / 2)
    if low <= 0 or up >= 1:
        return -math.inf
    return _NORMAL.inv_cdf(low) - _NORMAL.inv_cdf(up)


def pure_epsilon_at_least(hits: int, alarms: int, n: int, error: float) -> float:
    """A lower bound of epsilon at delta = 0: ``log(TPR / FPR)``; arguments as in :func:`mu_at_least`."""
    low, up = rate_at_least(hits, n, error / 2), rate_at_most(alarms, n, error / 2)
    return math.log(low / up) if low > 0 else -math.inf


def one_run_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are, at most, if the mechanism is (epsilon, delta)-DP.

    ``beta + 2 m delta alpha`` with ``beta = P[X >= v]``, ``alpha = max_i P[v > X >= v - i] / i`` and
    ``X ~ Bin(r, e^epsilon / (1 + e^epsilon))``: Steinke, Nasr, Jagielski 2023, theorem 5.2.

    Args:
        canaries: m, each placed by an independent fair coin.
        guesses: r, on the rest the auditor abstains.
        correct: v of them were right.
        epsilon, delta: the claim.
    """
    mass = binomial(guesses, 1 / (1 + math.exp(-epsilon)))
    beta = float(mass[correct:].sum())
    if delta == 0 or correct == 0:
        return min(1.0, beta)
    below = np.cumsum(mass[:correct][::-1])  # P[v > X >= v - i] for i = 1..v.
    alpha = float((below / np.arange(1, correct + 1)).max())
    return min(1.0, beta + 2 * canaries * delta * alpha)


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, error: float) -> float:
    """The largest epsilon that the guesses refute at confidence ``1 - error``; 0 when they refute none."""
    low, high = 0.0, 1.0
    if one_run_p_value(canaries, guesses, correct, 0.0, delta) >= error:
        return 0.0
    while high < 64 and one_run_p_value(canaries, guesses, correct, high, delta) < error:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        refuted = one_run_p_value(canaries, guesses, correct, middle, delta) < error
        low, high = (middle, high) if refuted else (low, middle)
    return low


def quantile(error: float) -> float:
    """z with P[|N(0,1)| > z] = error."""
    return -_NORMAL.inv_cdf(error / 2)


def chi_square_z(statistic: float, freedom: int) -> float:
    """A chi-square statistic as a standard normal one (Wilson and Hilferty 1931; good to 1 % of the tail from 30 on)."""
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))
