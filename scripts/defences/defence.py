"""The defences: what a client lets the server see of its states, and what an attacker who has read the code knows of it.

Everything public is a field (means, maps, clips, noise levels, learnt weights); secret are the coins of one release: the
noise, or the permutation. An attacker compares a row that it saw with what each candidate token would have shown, so
every defence says what that would be. The noise here is torch's, seeded: a measurement on public files, nothing is
released. The product's noise is securesplit/privacy/noise.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Defence(Protocol):
    """What the attacker and the utility measure need of a defence."""

    @property
    def exact(self) -> bool:
        """Whether the right token explains a row without any rest, so that a match proves itself."""
        ...

    @property
    def ordered(self) -> bool:
        """Whether the rows come in the order of the text."""
        ...

    @property
    def mu(self) -> float | None:
        """The guarantee for one released row under replace-one, ``2 C / sigma``; None where there is none."""
        ...

    def release(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """(N, T, D) states to what the server sees, (N, T, k)."""
        ...

    def served(self, hidden: Tensor, observed: Tensor) -> Tensor:
        """What the server's B computes on, in effect, (N, T, k): the observation, unless B is permuted alike."""
        ...

    def canonical(self, observed: Tensor) -> Tensor:
        """The part of an observation that the secret does not change, (..., k)."""
        ...

    def expected(self, hidden: Tensor) -> Tensor:
        """The canonical row of a state when the coins are averaged out: (..., D) to (..., k)."""
        ...

    def log_likelihood(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """log p(row | state) up to a constant of the row, (N, 1, k) and (N, K, D) to (N, K).

        Without noise, minus half the squared distance: it ranks, and 0 is a proof.
        """
        ...


def clip_rows(rows: Tensor, bound: float) -> Tensor:
    """Scale down every row (last axis) that is longer than the bound; ``math.inf`` clips nothing."""
    return rows if math.isinf(bound) else rows * (bound / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1)


@dataclass(frozen=True, slots=True)
class Linear:
    """Noise on a clipped public linear code: ``clip((h - mean) matrix) + sigma z``, z standard normal.

    With matrix and mean None it is the plain Gaussian mechanism (or nothing, at sigma 0). Any public matrix is allowed: the
    clip comes after it, in the norm in which the noise is isotropic, so that ``2 clip / sigma`` is the true worst case
    also where the noise, seen from the states, is anisotropic.
    """

    mean: Tensor | None
    matrix: Tensor | None
    clip: float
    sigma: float
    exact: bool = False
    ordered: bool = True

    @property
    def mu(self) -> float | None:
        """As the protocol says; none without noise or without a clip."""
        return 2 * self.clip / self.sigma if self.sigma and not math.isinf(self.clip) else None

    def expected(self, hidden: Tensor) -> Tensor:
        """The clipped code."""
        code = hidden if self.mean is None else hidden - self.mean
        return clip_rows(code if self.matrix is None else code @ self.matrix, self.clip)

    def release(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """The clipped code and its noise."""
        code = self.expected(hidden)
        return code + self.sigma * torch.randn(code.shape, generator=generator) if self.sigma else code

    def served(self, hidden: Tensor, observed: Tensor) -> Tensor:  # noqa: ARG002  # the protocol's signature
        """The observation."""
        return observed

    def canonical(self, observed: Tensor) -> Tensor:
        """The observation."""
        return observed

    def log_likelihood(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Gaussian, exact."""
        return -_squares(rows, self.expected(hidden)) / (2 * (self.sigma or 1.0) ** 2)


@dataclass(frozen=True, slots=True)
class Quantised:
    """Rounding to so many bits per coordinate, mid-rise over three public standard deviations; one bit keeps the sign.

    Attributes:
        mean, scale: (D,), public, so that no coordinate's range is wasted.
        bits: at least 1.
    """

    mean: Tensor
    scale: Tensor
    bits: int
    exact: bool = True
    ordered: bool = True
    mu: float | None = None

    def expected(self, hidden: Tensor) -> Tensor:
        """Standardised and rounded: ``2 ** bits`` values, symmetric about 0."""
        step = 6.0 / 2**self.bits
        top = (2**self.bits - 1) / 2
        return step * ((((hidden - self.mean) / self.scale) / step).floor() + 0.5).clamp(-top, top)

    def release(self, hidden: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The rounded row: there is no coin."""
        return self.expected(hidden)

    def served(self, hidden: Tensor, observed: Tensor) -> Tensor:  # noqa: ARG002
        """The observation."""
        return observed

    def canonical(self, observed: Tensor) -> Tensor:
        """The observation."""
        return observed

    def log_likelihood(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Minus half the squared distance."""
        return -_squares(rows, self.expected(hidden)) / 2


@dataclass(frozen=True, slots=True)
class TopK:
    """Only the k coordinates that lie furthest from their public mean, in public standard deviations; the others are 0."""

    mean: Tensor
    scale: Tensor
    k: int
    exact: bool = True
    ordered: bool = True
    mu: float | None = None

    def expected(self, hidden: Tensor) -> Tensor:
        """Standardised, with all but k coordinates set to 0."""
        rows = (hidden - self.mean) / self.scale
        kept = rows.abs().topk(self.k, dim=-1).indices
        return torch.zeros_like(rows).scatter(-1, kept, rows.gather(-1, kept))

    def release(self, hidden: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The sparse row: there is no coin."""
        return self.expected(hidden)

    def served(self, hidden: Tensor, observed: Tensor) -> Tensor:  # noqa: ARG002
        """The observation."""
        return observed

    def canonical(self, observed: Tensor) -> Tensor:
        """The observation."""
        return observed

    def log_likelihood(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Minus half the squared distance."""
        return -_squares(rows, self.expected(hidden)) / 2


@dataclass(frozen=True, slots=True)
class Permuted:
    """A secret permutation, fresh for every sequence, of the rows (S), of the columns (D), or of both.

    The schemes permute B's weights alike, so that B computes what it computes without the secret, and the client undoes the
    permutation: no loss of quality at all, at the most favourable reading.
    """

    rows: bool
    columns: bool
    exact: bool = True
    mu: float | None = None

    @property
    def ordered(self) -> bool:
        """Unless the rows are shuffled."""
        return not self.rows

    def release(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """The shuffled states."""
        out = []
        for sequence in hidden:
            if self.rows:
                sequence = sequence[torch.randperm(len(sequence), generator=generator)]  # noqa: PLW2901  # the next view
            if self.columns:
                sequence = sequence[:, torch.randperm(sequence.shape[1], generator=generator)]  # noqa: PLW2901
            out.append(sequence)
        return torch.stack(out)

    def served(self, hidden: Tensor, observed: Tensor) -> Tensor:  # noqa: ARG002
        """The states: B is permuted alike."""
        return hidden

    def canonical(self, observed: Tensor) -> Tensor:
        """Sorted values, where the columns are permuted: no order of columns changes them (Thomas et al. 2025)."""
        return observed.sort(dim=-1).values if self.columns else observed

    def expected(self, hidden: Tensor) -> Tensor:
        """The same of a candidate's state."""
        return self.canonical(hidden)

    def log_likelihood(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Minus half the squared distance, of sorted values where the columns are permuted."""
        return -_squares(rows, self.expected(hidden)) / 2


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """A variational information bottleneck: Gaussian noise whose mean *and* variance a trained map of the state gives.

    ``z ~ N(m(h), diag v(h))``. Both maps are weights that every client has, so the server has them. There is no guarantee:
    the mean has no bound, and the variance depends on the secret.

    Attributes:
        mean: (D,). matrix, bias: (D, k) and (k,) of m. spread, level: (D, k) and (k,) of log v.
    """

    mean: Tensor
    matrix: Tensor
    bias: Tensor
    spread: Tensor
    level: Tensor
    exact: bool = False
    ordered: bool = True
    mu: float | None = None

    def expected(self, hidden: Tensor) -> Tensor:
        """m(h)."""
        return (hidden - self.mean) @ self.matrix + self.bias

    def log_variance(self, hidden: Tensor) -> Tensor:
        """log v(h), within what training allowed."""
        return ((hidden - self.mean) @ self.spread + self.level).clamp(-8.0, 6.0)

    def release(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """A draw from the row's own Gaussian."""
        code = self.expected(hidden)
        return code + (self.log_variance(hidden) / 2).exp() * torch.randn(code.shape, generator=generator)

    def served(self, hidden: Tensor, observed: Tensor) -> Tensor:  # noqa: ARG002
        """The observation."""
        return observed

    def canonical(self, observed: Tensor) -> Tensor:
        """The observation."""
        return observed

    def log_likelihood(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Gaussian with the candidate's own mean and variance: the variance, too, tells tokens apart."""
        level = self.log_variance(hidden)
        return -((rows - self.expected(hidden)).square() * (-level).exp() + level).sum(-1) / 2


def _squares(rows: Tensor, expected: Tensor) -> Tensor:
    return (rows - expected).square().sum(-1)


def sequence_mu(row: float, rows: int) -> float:
    """What a text of so many rows costs: ``row sqrt(rows)``, which behind attention is also what its first token costs."""
    return row * math.sqrt(rows)
