"""Noise and values as integers: a clipped record is truncated to a lattice, and discrete Gaussian noise is added there.

Sums of integers have no rounding, so nothing of a value survives in the low bits of a noised one (Mironov 2012; Jin et
al. 2021, arXiv:2112.05307). Every channel has the same noise, a discrete Gaussian of :data:`SIGMA` lattice steps, and its
own step, ``sigma / SIGMA``. For L2 sensitivity Delta, ``RDP(alpha) = alpha (Delta / sigma)^2 / 2`` for every real
alpha > 1 (Canonne, Kamath and Steinke 2020, arXiv:2004.00010, proposition 5), from which
:func:`securesplit.privacy.calibrate.epsilon_rdp_for` makes epsilon.

Why a million steps. Truncation moves each of n coordinates by up to a step, and a record clipped at C has only
``C / step = SIGMA mu / 2`` steps to spread over all of them. With 64 steps and 64 x 576 coordinates at mu = 1.67 nearly
all of the record (99.96 % of the coordinates) would be truncated to zero; with 2^20 the loss is 10^-4 of its norm.

How such wide noise is made. X = 64^2 X1 + 64 X2 + X3 with three independent draws of width 256 from one small table. By
Poisson summation the law of 64 Y + Z, for discrete Gaussians of widths s and 256, is that of width sqrt(64^2 s^2 + 256^2)
times a factor within ``1 +- 2.1 exp(-2 pi^2 w^2)``, ``w^-2 = s^-2 + (64 / 256)^2``, at every integer: here 2^-453
(:data:`SMOOTHING`), which :func:`table_delta` counts beside the table's own rounding.

What this does not protect against: a reader of this process's memory or caches (see securesplit/privacy/table.py), and
whatever the caller does with a record before it is noised.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from securesplit.privacy.table import BITS, Ints, Table, fresh_key

WIDTH = 256  # Of the table's law, in steps.
RADIX = 64  # A quarter of the width: the smoothing above is what asks for that.
LEVELS = 3
VARIANCE = WIDTH**2 * sum(RADIX ** (2 * level) for level in range(LEVELS))  # Of the noise, in steps^2.
SIGMA = math.isqrt(VARIANCE)  # Rounded down, so that the noise is never less than is claimed.
SMOOTHING = -453  # log2 of the largest relative error of the composed law's probabilities.
_BLOCK = 1 << 15  # Samples made at once: their working set stays in a core's own cache.
_GUARD = 80


def step_for(sigma: float) -> float:
    """The lattice step at which the noise has standard deviation ``sigma``, or by rounding a 10^-15 part more.

    Raises:
        ValueError: for a sigma that is not positive, not finite, or so small that the step is subnormal.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError("sigma must be positive and finite")
    step = math.nextafter(sigma / SIGMA, math.inf)
    if step < 1e-300:
        raise ValueError("sigma is too small for a lattice")
    return step


def quantise(clipped: npt.ArrayLike, step: float, bound: float) -> Ints:
    """One record in lattice steps, truncated toward zero.

    Truncation makes no coordinate longer, so the norm stays inside the bound and two records lie at most
    ``2 bound / step`` apart. Division in floating point may still round up to the next step; the squares are therefore
    summed as integers and compared with the exact ``(bound / step)^2``, and a record that lies outside is pulled in, which
    is a function of the record alone and so part of the clipping.

    Args:
        clipped: any shape, float; norm at most ``bound`` (longer ones are pulled in too).
        step: the lattice step, positive.
        bound: C, in the same unit.

    Returns:
        int32, the same shape; ``sum(ints^2) <= (bound / step)^2`` exactly.

    Raises:
        ValueError: for NaN or infinity (the gate refuses them before), or where ``bound / step`` does not fit 30 bits.
    """
    wide = np.asarray(clipped, dtype=np.float64)
    if not np.isfinite(wide).all():
        raise ValueError("a record to be released holds NaN or infinity")
    if not (0 < step < math.inf and 0 < bound < math.inf and bound / step < 2**30):
        raise ValueError("step and bound must be positive, and the bound less than 2^30 steps")
    limit = math.floor((Fraction(bound) / Fraction(step)) ** 2)
    most = math.isqrt(limit)
    ints = (np.clip(wide, -bound, bound) / step).astype(np.int64)  # The cast truncates.
    np.clip(ints, -most, most, out=ints)
    while (square := _square(ints)) > limit:
        # The factor is below 1 by at least 2^-32 and the product rounded down, so that every coordinate gets shorter.
        factor = math.isqrt(limit * 2**64 // square)
        ints = np.sign(ints) * ((np.abs(ints) * factor) >> 32)
    return ints.astype(np.int32)


def _square(ints: npt.NDArray[np.int64]) -> int:
    """The exact sum of squares; 2^20 terms below 2^60 could overflow 64 bits, so that halves are summed apart."""
    squares = (ints * ints).ravel()
    low, high = squares & 0xFFFFFFFF, squares >> 32
    return int(low.sum()) + (int(high.sum()) << 32)


def quantise_like(clipped: Tensor, step: float, bound: float) -> Tensor:
    """:func:`quantise` on the tensor's own device, so that rows on a GPU stay there until they are noised.

    Args:
        clipped: any shape, float; one record. step, bound: as there.

    Returns:
        int32 on ``clipped.device``; the same integers as :func:`quantise` gives.

    Raises:
        ValueError: as there.
    """
    if clipped.device.type == "cpu":
        return torch.from_numpy(quantise(clipped.numpy(), step, bound))
    return _quantise_on(clipped, step, bound)


def _quantise_on(clipped: Tensor, step: float, bound: float) -> Tensor:
    if not bool(torch.isfinite(clipped).all()):
        raise ValueError("a record to be released holds NaN or infinity")
    if not (0 < step < math.inf and 0 < bound < math.inf and bound / step < 2**30):
        raise ValueError("step and bound must be positive, and the bound less than 2^30 steps")
    limit = math.floor((Fraction(bound) / Fraction(step)) ** 2)
    most = math.isqrt(limit)
    ints = torch.trunc(clipped.double() / step).clamp(-most, most).to(torch.int64)
    while (square := _square_on(ints)) > limit:
        factor = math.isqrt(limit * 2**64 // square)
        ints = ints.sign() * ((ints.abs() * factor) >> 32)
    return ints.to(torch.int32)


def _square_on(ints: Tensor) -> int:
    squares = ints * ints
    return int((squares & 0xFFFFFFFF).sum()) + (int((squares >> 32).sum()) << 32)


@cache
def table() -> Table:
    """The table of the discrete Gaussian of :data:`WIDTH`: ``P(k) ~ exp(-k^2 / (2 WIDTH^2))``.

    The weights are fixed-point numbers with 80 bits more than the table keeps: ``w[k+1] = w[k] q^(2k+1)`` with
    ``q = exp(-1 / (2 WIDTH^2))``, each product wrong by less than one unit. The tail is cut where less than 2^-(BITS+20)
    of the mass lies beyond.
    """
    scale = BITS + _GUARD
    with localcontext() as context:
        context.prec = 130
        ratio = int((Decimal(-1) / (2 * WIDTH * WIDTH)).exp() * (1 << scale))
    half, factor, square = [1 << scale], ratio, ratio * ratio >> scale
    while half[-1] >> (_GUARD - 20):
        half.append(half[-1] * factor >> scale)
        factor = factor * square >> scale
    return Table.of(1 - len(half), half[:0:-1] + half)


def discrete_gaussian(shape: tuple[int, ...]) -> Ints:
    """Independent discrete Gaussian samples of :data:`SIGMA` steps, under a fresh key.

    Returns:
        int32 of that shape; no sample exceeds 2^25 in size.
    """
    key, count = fresh_key(), math.prod(shape)
    out = np.empty(count, dtype=np.int32)
    for index in range(-(-count // _BLOCK)):
        part = out[index * _BLOCK : (index + 1) * _BLOCK]
        draws = table().block(key, index, LEVELS * len(part)).reshape(LEVELS, -1)
        part[:] = draws[0]
        for more in draws[1:]:
            part *= RADIX
            part += more
    return out.reshape(shape)


def discrete_gaussian_like(tensor: Tensor) -> Tensor:
    """The same law, with tensor's shape, made on its device: random bytes go there, and no row comes here.

    On a processor this is :func:`discrete_gaussian`; elsewhere the lookups run there, and give the same samples for the
    same key.

    Returns:
        int32 on ``tensor.device``.
    """
    if tensor.device.type == "cpu":
        return torch.from_numpy(discrete_gaussian(tuple(tensor.shape)))
    return _on_device(tensor)


def _on_device(tensor: Tensor) -> Tensor:
    key, count = fresh_key(), tensor.numel()
    out = torch.empty(count, dtype=torch.int32, device=tensor.device)
    for index in range(-(-count // _BLOCK)):
        part = out[index * _BLOCK : (index + 1) * _BLOCK]
        draws = table().block_on(tensor.device, key, index, LEVELS * len(part)).reshape(LEVELS, -1)
        part.copy_(draws[0])
        for more in draws[1:]:
            part.mul_(RADIX).add_(more)
    return out.reshape(tensor.shape)


def table_delta(coordinates: int, epsilon: float) -> float:
    """What delta must be raised by, because samples come from rounded tables and composed draws.

    ``(1 + e^epsilon) TV``, with ``TV <= coordinates (LEVELS cells 2^-256 + 2^-452)``: if both laws of a mechanism are
    replaced by laws within TV, (epsilon, delta) becomes (epsilon, delta + (1 + e^epsilon) TV).

    Args:
        coordinates: of all releases that the budget covers together.
        epsilon: of all of them together.

    Returns:
        An upper bound; infinite only where e^epsilon overflows 2^1000.
    """
    if coordinates < 0 or not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError("coordinates and epsilon must be finite and not negative")
    variation = coordinates * (LEVELS * (len(table().edges) + 1) * 2.0**-BITS + 2.0 ** (SMOOTHING + 1))
    return (1 + math.exp(epsilon)) * variation if epsilon < 690 else math.inf
