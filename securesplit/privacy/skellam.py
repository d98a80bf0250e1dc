"""Skellam noise for sums in an integer ring: a share from every client, closed under addition.

The difference of two Poisson variables of rate v/2 each has mean 0 and variance v, and the sum of such shares has the same
law with the variances added, so that a secure sum of integers carries noise of known law that no party knows. Its Renyi
curve is a Gaussian's plus a small term (Agarwal, Kairouz and Liu 2021, arXiv:2110.04995, theorem 3.5), proved at integer
orders; conversions here use those alone.

When to use it. The extra term matters for little noise only, and there this file is the right tool. For wide noise the sum
of n discrete Gaussians of securesplit/privacy/lattice.py is a discrete Gaussian of n times the variance but for a factor
``1 +- exp(-10^12)``, with the Gaussian's own curve at all real orders and no extra term; Skellam has nothing to add there.
A sum of many coordinates needs wide noise: ``bound / step`` must be well above the root of their number, or truncation
takes the signal. That is why :data:`MOST` is no great loss.

What this does not protect against: clients that leave out their noise. :func:`share_variance` covers as many as it is told.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from securesplit.privacy.calibrate import epsilon_at_order
from securesplit.privacy.table import BITS, Ints, Table, fresh_key

MOST = 1 << 24  # The largest variance: a table of 1.6 10^5 entries, a fifth of a second to make.
_BLOCK = 1 << 16
_GUARD = 80
_ORDERS = (*range(2, 129), *(int(128 * 1.1**k) for k in range(1, 150)))


def rdp(alpha: int, l1: float, l2: float, variance: float) -> float:
    """A bound on the Renyi divergence of order alpha between two integer vectors with Skellam noise.

    ``alpha l2^2 / (2v) + min(((2 alpha - 1) l2^2 + 6 l1) / (4 v^2), 3 l1 / (2v))``, theorem 3.5.

    Args:
        alpha: an integer, at least 2.
        l1, l2: norms of the difference between neighbours, in steps; see :func:`most_l1`.
        variance: of the noise on each coordinate of the whole sum, in steps^2.

    Raises:
        ValueError: for arguments out of range.
    """
    if alpha != int(alpha) or alpha < 2:
        raise ValueError("the order must be an integer, at least 2")
    _check(l1, l2, variance)
    extra = min(((2 * alpha - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    return alpha * l2**2 / (2 * variance) + extra


def most_l1(l2: float, dimension: int) -> float:
    """The largest L1 norm of an integer vector of L2 norm ``l2``: ``min(sqrt(dimension) l2, l2^2)``."""
    if not (math.isfinite(l2) and l2 >= 0 and dimension >= 1):
        raise ValueError("the norm must be finite and not negative, the dimension at least 1")
    return min(math.sqrt(dimension) * l2, l2 * l2)


def epsilon_for(rounds: int, l1: float, l2: float, variance: float, delta: float) -> float:
    """The epsilon of ``rounds`` sums together, by the best integer order.

    Args:
        rounds: at least 1.
        l1, l2, variance: as in :func:`rdp`.
        delta: in (0, 1).

    Raises:
        ValueError: for arguments out of range.
    """
    if rounds < 1 or not 0 < delta < 1:
        raise ValueError("rounds must be at least 1, delta between 0 and 1")
    return min(epsilon_at_order(alpha - 1, rounds * rdp(alpha, l1, l2, variance), delta) for alpha in _ORDERS)


def mu_equivalent(l1: float, l2: float, variance: float) -> float:
    """The mu whose Gaussian curve ``alpha mu^2 / 2`` lies above :func:`rdp` at every integer alpha >= 2, rounded up.

    The ledger adds this mu^2 to the others. Epsilon must then be taken at integer orders alone:
    :func:`securesplit.privacy.calibrate.epsilon_rdp_for` with ``whole_orders=True``.

    ``2 rdp(alpha) / alpha`` is ``l2^2/v`` and the smaller of ``(4 l2^2 + (12 l1 - 2 l2^2) / alpha) / (4 v^2)``, monotone in
    alpha, and ``3 l1 / (alpha v)``, falling; each is largest at alpha = 2 or in the limit.

    Args:
        l1, l2, variance: as in :func:`rdp`.

    Returns:
        mu, at least ``l2 / sqrt(variance)``.
    """
    _check(l1, l2, variance)
    near = max(3 * l2**2 + 6 * l1, 4 * l2**2) / (4 * variance**2)
    squared = l2**2 / variance + min(near, 3 * l1 / (2 * variance))
    return math.sqrt(squared) * (1 + 1e-15)


def share_variance(total_variance: int, clients: int, dropouts: int, colluders: int) -> int:
    """What each client adds, so that the honest ones who stay have the whole variance between them.

    Noise of colluders counts for nothing, because they subtract it, nor does that of clients who drop out; the two may be
    different clients. With everybody present and honest the sum has ``clients / (clients - dropouts - colluders)`` times as
    much variance as was asked for.

    Args:
        total_variance: at least 1, in steps^2.
        clients: in the sum.
        dropouts: how many of them may vanish while the sum is still opened.
        colluders: how many of them may tell what they added.

    Returns:
        Variance per client, rounded up.

    Raises:
        ValueError: when nobody honest would be left, or a number is negative.
    """
    honest = clients - dropouts - colluders
    if total_variance < 1 or dropouts < 0 or colluders < 0:
        raise ValueError("the variance must be at least 1, the numbers of clients not negative")
    if honest < 1:
        raise ValueError("no honest client is left to carry the noise")
    return -(-total_variance // honest)


def fits(ring_bits: int, clients: int, bound: float, variance: float) -> None:
    """Check that no coordinate of a sum wraps around in the ring.

    Wrapping is post-processing: it costs no privacy, and destroys the sum. A coordinate of the values is at most
    ``clients * bound``; the noise of all clients together, of variance V, exceeds ``8.5 sqrt(V) + 12`` with probability
    below 2^-46, by Chernoff's bound.

    Args:
        ring_bits: the ring is the integers modulo 2^ring_bits.
        clients: in the sum.
        bound: norm of one client's vector, in steps.
        variance: of one client's noise, in steps^2.

    Raises:
        ValueError: when the sum may reach half the ring.
    """
    if clients < 1 or not (math.isfinite(bound) and bound >= 0 and math.isfinite(variance) and variance >= 0):
        raise ValueError("there must be a client, and the bound and the variance finite and not negative")
    reach = clients * bound + 8.5 * math.sqrt(clients * variance) + 12
    if reach >= 2.0 ** (ring_bits - 1):
        raise ValueError(f"a sum of {clients} vectors reaches {reach:.3g}, half of a ring of {ring_bits} bits or more")


def sample(shape: tuple[int, ...], variance: int) -> Ints:
    """Independent Skellam samples under a fresh key.

    Args:
        shape: of the result.
        variance: an integer from 1 to :data:`MOST`.

    Returns:
        int32.

    Raises:
        ValueError: for another variance.
    """
    law, key, count = table(variance), fresh_key(), math.prod(shape)
    out = np.empty(count, dtype=np.int32)
    for index in range(-(-count // _BLOCK)):
        part = out[index * _BLOCK : (index + 1) * _BLOCK]
        part[:] = law.block(key, index, len(part))
    return out.reshape(shape)


@lru_cache(maxsize=4)
def table(variance: int) -> Table:
    """The table of the Skellam law: ``P(k) = e^-v I_k(v)``, with I the modified Bessel function.

    ``I_(k-1) = (2k / v) I_k + I_(k+1)``, run downwards from far in the tail (Miller's algorithm), is stable and needs no
    exponential: the table divides by the sum. It starts where less than 2^-(BITS+40) of the mass lies beyond, with 336 bits
    to spare for the rounding of each step.

    Raises:
        ValueError: for a variance out of range.
    """
    if variance != int(variance) or not 1 <= variance <= MOST:
        raise ValueError(f"the variance must be an integer from 1 to {MOST}")
    last = 1
    while _log2_tail(last, variance) > -(BITS + 40):
        last *= 2
    low = last // 2
    while last - low > 1:
        middle = (low + last) // 2
        low, last = (middle, last) if _log2_tail(middle, variance) > -(BITS + 40) else (low, middle)
    above, here, half = 0, 1 << (BITS + _GUARD), []
    for k in range(last, -1, -1):
        half.append(here)
        above, here = here, 2 * k * here // variance + above
    return Table.of(-last, half + half[-2::-1])


def _log2_tail(k: float, variance: float) -> float:
    """log2 of Chernoff's bound on P(X >= k): ``exp(sqrt(k^2 + v^2) - v - k asinh(k / v))``."""
    return (math.hypot(k, variance) - variance - k * math.asinh(k / variance)) / math.log(2)


def _check(l1: float, l2: float, variance: float) -> None:
    if not all(math.isfinite(x) for x in (l1, l2, variance)) or l1 < 0 or l2 < 0 or variance <= 0:
        raise ValueError("norms must be finite and not negative, the variance positive")
