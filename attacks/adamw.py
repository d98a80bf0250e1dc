"""One step of AdamW read backwards: the gradient behind an update whose entries seem to be signs.

The first step of AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019) without decay moves a coordinate with gradient g by
``-rate * g / (|g| + eps)``, because both moments are corrected to g and g squared. That is nearly ``-rate * sign(g)``, and it is
often said to destroy what a gradient leaks. It does not: ``|g| = eps * rho / (1 - rho)`` with ``rho = |moved| / rate``, and
1 - rho is about eps / |g|, which a float32 holds to three digits at |g| = 1e-4. How far this goes is a matter of what else the
number went through: the rounding of the parameter, and the grid of the secure sum. Beyond about ``eps / error(rho)`` an entry
says no more than its sign and that it is large.

What stays beyond this: a mean over several clients, and a second step, are no function of one gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EPS", "Gradient", "backwards", "is_one_step", "row_weights"]

EPS = 1e-8
"""Of torch.optim.AdamW, which the clients use as it comes."""

# A float32 operation or two: the moments, their quotient, and the parameter's own last bit.
_FLOAT = 2.0**-23


@dataclass(frozen=True, slots=True)
class Gradient:
    """A gradient as far as it is known.

    Attributes:
        values: (m, n) float64.
        error: (m, n) standard deviation of each value, about.
        capped: (m, n) bool, where only the sign and a lower bound on the size are known.
    """

    values: Tensor
    error: Tensor
    capped: Tensor


def is_one_step(moved: Iterable[Tensor], rate: float) -> bool:
    """Whether one client's update can be of one step: a second one would carry some coordinate beyond the rate."""
    return all(float(part.abs().max()) <= rate * (1 + 1e-3) for part in moved)


def backwards(moved: Tensor, rate: float, *, rounding: Tensor | float) -> Gradient:
    """The gradient that one step of AdamW turned into this update.

    Args:
        moved: (m, n) the update, in the parameter's units.
        rate: the learning rate.
        rounding: standard deviation of what ``moved`` was rounded by, a number or (m, n).
    """
    size = moved.double().abs() / rate
    wrong = torch.as_tensor(rounding, dtype=torch.float64) / rate + _FLOAT
    left = 1 - size
    capped = left < 3 * wrong
    left = torch.where(capped, 3 * wrong, left)
    values = EPS * (1 - left) / left
    return Gradient(
        values=-moved.double().sign() * values, error=EPS / left.square() * wrong, capped=capped.expand_as(size)
    )


def row_weights(found: Gradient) -> Tensor:
    """(m, 1): one over each row's error, where an entry that is only bounded counts as far off."""
    error = torch.where(found.capped, 3 * found.values.abs(), found.error)
    return 1 / error.square().mean(dim=1, keepdim=True).sqrt()
