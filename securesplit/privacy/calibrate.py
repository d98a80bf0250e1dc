"""How much noise a budget needs, and what budget a noise costs. Pure functions on floats.

The currency is mu of Gaussian differential privacy (Dong, Roth, Su 2022): releasing ``x + N(0, sigma^2 I)`` costs
``mu = sensitivity / sigma``, exactly; several releases, even adaptively chosen, cost ``sqrt(sum mu_i^2)``. Epsilon is
derived from mu, for display and for reading a policy. No sampling amplification appears here, because the server sees
every message; and the classical ``sqrt(2 ln(1.25/delta)) / epsilon`` appears nowhere, because it is false above
epsilon = 8 at delta = 1e-5.
"""

from __future__ import annotations

import math

_STEPS = 200  # Bisection halves a double's interval; 200 halvings end at neighbouring doubles.


def _erfcx(x: float) -> float:
    """exp(x^2) erfc(x) for x >= 0, without overflow.

    Beyond 20 the asymptotic series (Abramowitz and Stegun 7.1.23) is exact to double precision after eight terms.
    """
    if x < 20:
        return math.exp(x * x) * math.erfc(x)
    term, total, inverse = 1.0, 1.0, 1 / (2 * x * x)
    for k in range(1, 9):
        term *= -(2 * k - 1) * inverse
        total += term
    return total / (x * math.sqrt(math.pi))


def delta_for(mu: float, epsilon: float) -> float:
    """The smallest delta at which a mu-GDP release is (epsilon, delta)-DP.

    ``delta = Phi(-epsilon/mu + mu/2) - e^epsilon Phi(-epsilon/mu - mu/2)``: Balle and Wang 2018 (arXiv:1805.06530),
    eq. 6, with mu for sensitivity/sigma. The second term is written with erfcx, so that no factor overflows.

    Args:
        mu: at least 0.
        epsilon: at least 0.

    Raises:
        ValueError: for a negative or non-finite argument.
    """
    if not (math.isfinite(mu) and math.isfinite(epsilon) and mu >= 0 and epsilon >= 0):
        raise ValueError("mu and epsilon must be finite and not negative")
    if mu == 0:
        return 0.0
    near, far = epsilon / mu - mu / 2, epsilon / mu + mu / 2  # far^2/2 - near^2/2 = epsilon
    exponent = -near * near / 2
    second = 0.5 * math.exp(exponent) * _erfcx(far / math.sqrt(2)) if exponent > -745 else 0.0
    return max(0.0, 0.5 * math.erfc(near / math.sqrt(2)) - second)


def epsilon_for(mu: float, delta: float) -> float:
    """The smallest epsilon at which mu-GDP is (epsilon, delta)-DP, rounded up by at most one part in 10^14.

    Args:
        mu: total mu, at least 0; 0 gives 0.
        delta: in (0, 1).

    Raises:
        ValueError: for arguments out of range.
    """
    if not (math.isfinite(mu) and mu >= 0 and 0 < delta < 1):
        raise ValueError("mu must be finite and not negative, delta between 0 and 1")
    if delta_for(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_for(mu, high) > delta:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if delta_for(mu, middle) > delta else (low, middle)
    return high


def mu_for(epsilon: float, delta: float) -> float:
    """The largest mu that is (epsilon, delta)-DP, rounded down.

    Args:
        epsilon: greater than 0.
        delta: in (0, 1).

    Raises:
        ValueError: for arguments out of range.
    """
    if not (math.isfinite(epsilon) and epsilon > 0 and 0 < delta < 1):
        raise ValueError("epsilon must be finite and positive, delta between 0 and 1")
    low, high = 0.0, 1.0
    while delta_for(high, epsilon) <= delta:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if delta_for(middle, epsilon) <= delta else (low, middle)
    return low


def sigma_for(epsilon: float, delta: float, sensitivity: float, releases: int = 1) -> float:
    """Standard deviation per coordinate so that ``releases`` releases together cost (epsilon, delta).

    Args:
        epsilon, delta: the budget of all releases together.
        sensitivity: L2 distance between neighbours; ``2 * C`` for a tensor clipped at C under replace-one.
        releases: how many releases share the budget.

    Returns:
        sigma, in the unit of ``sensitivity``: ``sensitivity * sqrt(releases) / mu``.

    Raises:
        ValueError: for arguments out of range.
    """
    if not (math.isfinite(sensitivity) and sensitivity > 0 and releases >= 1):
        raise ValueError("sensitivity must be finite and positive, releases at least 1")
    return sensitivity * math.sqrt(releases) / mu_for(epsilon, delta)


def epsilon_rdp_for(mu: float, delta: float) -> float:
    """An epsilon at which any mechanism with ``RDP(alpha) <= alpha mu^2 / 2`` is (epsilon, delta)-DP.

    That curve is a Gaussian's; noise on a lattice has it too, while it has no mu in the sense of :func:`epsilon_for`. The
    conversion is that of Canonne, Kamath and Steinke 2020 (arXiv:2004.00010), proposition 12,
    ``alpha mu^2/2 + log((alpha-1)/alpha) - (log delta + log alpha) / (alpha-1)``, which holds for every alpha; the best one
    solves ``mu^2 (alpha-1)^2 / 2 = -log(delta alpha)``, where the derivative is zero.

    Args:
        mu: at least 0; 0 gives 0.
        delta: in (0, 1).

    Returns:
        epsilon, rounded up by about one part in 10^12; never below :func:`epsilon_for`.

    Raises:
        ValueError: for arguments out of range.
    """
    if not (math.isfinite(mu) and mu >= 0 and 0 < delta < 1):
        raise ValueError("mu must be finite and not negative, delta between 0 and 1")
    if mu == 0:
        return 0.0
    excess = _best_excess(mu, delta)  # alpha - 1, which keeps its digits where alpha is close to 1.
    return _epsilon_at_order(excess, (1 + excess) * mu * mu / 2, delta)


def _best_excess(mu: float, delta: float) -> float:
    low, high = 0.0, 1 / delta
    for _ in range(_STEPS * 6):  # From 1 / delta down to doubles as small as mu allows.
        middle = (low + high) / 2
        if not low < middle < high:
            break
        rising = (mu * middle) ** 2 / 2 > -math.log(delta) - math.log1p(middle)
        low, high = (low, middle) if rising else (middle, high)
    return high


def _epsilon_at_order(excess: float, rdp: float, delta: float) -> float:
    """The epsilon that Renyi divergence ``rdp`` at the one order ``1 + excess`` gives; the formula stands above.

    Args:
        excess: alpha - 1, greater than 0.
        rdp: of all releases together, at that order.
        delta: in (0, 1).
    """
    parts = (
        rdp,
        math.log(excess) - math.log1p(excess),
        -(math.log(delta) + math.log1p(excess)) / excess,
    )
    return max(0.0, math.fsum(parts) + 1e-14 * math.fsum(abs(part) for part in parts))


def mu_rdp_for(epsilon: float, delta: float) -> float:
    """The largest mu whose RDP curve gives (epsilon, delta)-DP by :func:`epsilon_rdp_for`, rounded down.

    Args:
        epsilon: greater than 0.
        delta: in (0, 1).

    Raises:
        ValueError: for arguments out of range.
    """
    if not (math.isfinite(epsilon) and epsilon > 0 and 0 < delta < 1):
        raise ValueError("epsilon must be finite and positive, delta between 0 and 1")
    low, high = 0.0, 1.0
    while epsilon_rdp_for(high, delta) <= epsilon:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        fits = epsilon_rdp_for(middle, delta) <= epsilon
        low, high = (middle, high) if fits else (low, middle)
    return low


def pure_mu(epsilon: float) -> float:
    """The smallest mu that an epsilon-DP mechanism (with delta = 0) is worth, rounded up by 10^-15.

    ``2 Phi^-1(e^epsilon / (1 + e^epsilon))``: the trade-off curve of mu-GDP is convex and passes through the one corner of
    that of epsilon-DP, so it lies below it everywhere. Labels answered at random are charged by this.

    Args:
        epsilon: at least 0, at most 600, beyond which doubles hold no such tail.

    Raises:
        ValueError: for an epsilon out of range.
    """
    if not 0 <= epsilon <= 600:
        raise ValueError("epsilon must be between 0 and 600")
    tail = math.exp(-epsilon) / (1 + math.exp(-epsilon))  # = Phi(-mu / 2)
    low, high = 0.0, 80.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if 0.5 * math.erfc(middle / math.sqrt(8)) > tail else (low, middle)
    return high * (1 + 1e-15) + 1e-15 if epsilon > 0 else 0.0  # erfc near 1 is good to 10^-16, absolutely.
