"""How well states explain received rows: Gaussian noise, the codec's rounding, the clipping factor integrated out.

A sequence is released as ``y_t = s h_t + e_t``: one clipping factor s for all rows, and errors of variance v_t per
coordinate, which is sigma^2 and what the codec's rounding adds. Over any set of rows let

    A = sum <y_t, h_t> / v_t        B = sum |h_t|^2 / v_t        (A: cross, B: energy)

With ``s ~ N(s0, tau^2)`` from public text and ``lambda = 1 / tau^2``, integrating s out leaves, up to a constant,

    log p(y | h) = s0 A - s0^2 B / 2 + (A - s0 B)^2 / (2 (B + lambda)) - log(B + lambda) / 2,

which equals (A + lambda s0)^2 / (2 (B + lambda)) - log(B + lambda) / 2, written so that it keeps its digits when s is
known almost surely (lambda large).

Rounding errors are taken as uniform within half a step on either side of what is seen. Noiseless rows are thus *proved*
by a box: the right state lies within half a step in every coordinate, and a wrong one practically never does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.ridge import Layer

__all__ = ["Errors", "errors_of", "factor_of", "log_evidence"]

# Two machines compute one state to about 1e-6 of its largest coordinate; a hundred times that is still no other token.
_SLACK = 1e-4
_BYTE = 127


@dataclass(frozen=True, slots=True)
class Errors:
    """What separates received rows from scaled states.

    Attributes:
        sigma: of the noise, per coordinate; 0 for none.
        half: (..., D), half a step of the codec in each coordinate; zeros under f32.
        variance: (...,), noise and rounding together, mean over a row's coordinates.
    """

    sigma: float
    half: Tensor
    variance: Tensor

    def at(self, position: int) -> Errors:
        """The errors of one position of (N, T, D) rows."""
        return Errors(self.sigma, self.half[:, position], self.variance[:, position])

    def ball(self) -> Tensor:
        """A squared distance that the right state stays below, up to four standard deviations: (...,).

        ``|noise|^2`` is sigma^2 chi^2_D. A uniform error within +-h has h^2 / 3 in the mean, and its square a variance of
        4 h^4 / 45.
        """
        width = self.half.shape[-1]
        rounded = self.half.square()
        spread = (2 * width * self.sigma**4 + (4 / 45) * rounded.square().sum(-1)).sqrt()
        return width * self.sigma**2 + rounded.sum(-1) / 3 + 4 * spread

    def boxed(self, rows: Tensor, states: Tensor) -> Tensor:
        """Whether scaled states (..., K, D) explain noiseless rows (..., D) to half a step everywhere: (..., K) bool."""
        reach = self.half + _SLACK * rows.abs().amax(-1, keepdim=True)
        return ((rows[..., None, :] - states).abs() <= reach[..., None, :]).all(-1)


def errors_of(rows: Tensor, sigma: float, codec: str, *, releases: int = 1) -> Errors:
    """The errors of rows (..., D) as received.

    Args:
        rows: float32, as decoded.
        sigma: of the noise that is left in them.
        codec: ``f32``, ``bf16`` (8 significant bits, to nearest) or ``int8`` (per row, step max|row| / 127).
        releases: of how many releases the rows are the mean; their rounding errors are averaged as well.
    """
    if codec == "int8":
        half = (rows.abs().amax(-1, keepdim=True) / (2 * _BYTE)).expand_as(rows)
    elif codec == "bf16":
        # frexp gives y = m 2^e with 1/2 <= m < 1: neighbours lie 2^(e - 8) apart.
        half = torch.ldexp(torch.ones_like(rows), torch.frexp(rows).exponent - 9) * (rows != 0)
    else:
        half = torch.zeros_like(rows)
    half = half / math.sqrt(releases)
    return Errors(sigma, half, sigma**2 + half.square().mean(-1) / 3)


def log_evidence(cross: Tensor, energy: Tensor, layer: Layer) -> Tensor:
    """log p(rows | states), up to what does not depend on the states. A and B in float64, any shape."""
    rest = cross - layer.factor * energy
    total = energy + layer.factor_std**-2
    return layer.factor * cross - layer.factor**2 * energy / 2 + rest.square() / (2 * total) - total.log() / 2


def factor_of(cross: Tensor, energy: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """Mean and variance of the clipping factor, given A and B."""
    total = energy + layer.factor_std**-2
    return (cross + layer.factor_std**-2 * layer.factor) / total, 1 / total
