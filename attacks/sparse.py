"""Which few tokens explain the rows of several updates at once: sparse Bayesian learning over a vocabulary.

Every row of an update is taken for a sum of a few tokens' directions with coefficients that nobody knows, plus what tokens do
not explain. With variance ``v_t`` of token t's coefficients, common to all rows of all updates, a row of lens l is normal with

    S_l = a_l C_l + b_l I + s_l sum_t v_t d_lt d_lt^T,

d_lt the direction that token t has there, C_l the covariance of what it leaves unexplained. The greatest likelihood over all
``v, a, b, s`` is sparse in v (Tipping 2001; for several rows Wipf and Rao 2007). Each factor is multiplied by the square root of
``sum z^T S^-1 M S^-1 z / (k tr(S^-1 M))``, M its own matrix, until it stands; the likelihood never falls. Where rows are
fewer than tokens a span says nothing, and this still does; and signs are rows like any others, with more of b.

The vocabulary is searched by a few hundred candidates at a time: the best by matched filter, and after every part of the
iterations the worse half of them gives way to what the filter finds best, given all that is explained already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

__all__ = ["Effort", "Lens", "explain"]

_START = (0.3, 0.3, 0.4)


class Effort(BaseModel):
    """How hard to search.

    Attributes:
        candidates: tokens at a time. iterations: of each part. floor: least b, relative to a row's mean square.
        lean: how many units of log-likelihood ratio a unit of the prior's logarithm counts in choosing candidates.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    candidates: Annotated[int, Field(ge=8)]
    iterations: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, strict=False)]
    floor: Annotated[float, Field(gt=0)]
    lean: Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Atoms:
    """A vector for each token.

    Attributes:
        basis: (V, e) float32.
        probability: (V,) of tokens in public text.
    """

    basis: Tensor
    probability: Tensor

    @cached_property
    def moment(self) -> Tensor:
        """(e, e) second moment of a token's vector in public text."""
        return (self.basis * self.probability[:, None]).T @ self.basis


@dataclass(frozen=True)
class Lens:
    """What each token looks like in the rows of one tensor.

    Attributes:
        name: of the tensor.
        scale: (d,) what rows are divided by, coordinate by coordinate.
        atoms: a vector per token. map: (e, d); token t's direction is ``atoms.basis[t] @ map``.
        unexplained: (d, d) covariance of what a direction leaves, up to a factor.
        transpose: whether rows are the tensor's columns.
    """

    name: str
    scale: Tensor
    atoms: Atoms
    map: Tensor
    unexplained: Tensor
    transpose: bool

    def rows(self, tensor: Tensor) -> Tensor:
        """An update's rows, (k, d), of mean square 1; zeros stay zeros."""
        rows = (tensor.T if self.transpose else tensor) / self.scale
        return rows / rows.square().mean().sqrt().clamp(min=1e-30)

    def directions(self, tokens: Tensor) -> Tensor:
        """(C,) ids to (C, d)."""
        found: Tensor = self.atoms.basis[tokens] @ self.scaled
        return found

    @cached_property
    def scaled(self) -> Tensor:
        """(e, d) the map, such that a token's direction has mean square 1 in public text."""
        power = float((self.atoms.moment * (self.map @ self.map.T)).sum()) / self.map.shape[1]
        return self.map / math.sqrt(max(power, 1e-30))

    @cached_property
    def background(self) -> Tensor:
        """(d, d) the unexplained, of mean variance 1."""
        return self.unexplained / (self.unexplained.trace() / len(self.unexplained)).clamp(min=1e-30)

    @cached_property
    def strength(self) -> tuple[Tensor, Tensor]:
        """The inverse of S at the start, (d, d), and ``d_t^T S^-1 d_t`` for every token, (V,)."""
        a, b, s = _START
        common = self.scaled.T @ self.atoms.moment @ self.scaled
        inverse = torch.linalg.inv(a * self.background + b * torch.eye(len(common)) + s * common)
        form = self.scaled @ inverse @ self.scaled.T
        basis = self.atoms.basis
        return inverse, ((basis @ form) * basis).sum(1).clamp(min=1e-12)


@dataclass(slots=True)
class _State:
    """One lens while it is fitted: its rows, transposed to (d, k), and the factors a, b and s."""

    lens: Lens
    rows: Tensor
    factors: list[float]
    solved: Tensor


def explain(lenses: Sequence[Lens], tensors: Sequence[Tensor], log_prior: Tensor, effort: Effort) -> Tensor:
    """How much each token of the vocabulary is needed to explain these updates.

    Args:
        lenses: one for each tensor.
        tensors: updates of one sum, or of several sums of the same text.
        log_prior: (V,) natural logarithm of a token's probability, which only chooses candidates.
        effort: how hard to search.

    Returns:
        (V,) float32, the gain in log-likelihood, in nats, that each token brings beside all others; 0 for tokens that are no
        candidates in the end. It takes rows for independent, so that it is too sure of itself where they are not.
    """
    states = [_state(lens, tensor) for lens, tensor in zip(lenses, tensors, strict=True)]
    states = [state for state in states if bool(state.rows.any())]
    found = torch.zeros_like(log_prior)
    if not states:
        return found
    count = min(effort.candidates, len(log_prior))
    tokens = (_filtered(states).log() + effort.lean * log_prior).topk(count).indices
    variance = torch.full((count,), 1 / count)
    for part, iterations in enumerate(effort.iterations):
        chosen = [state.lens.directions(tokens) for state in states]
        for _ in range(iterations):
            variance = _improve(states, chosen, variance, effort.floor)
        if part + 1 < len(effort.iterations) and count < len(log_prior):
            tokens, variance = _refresh(states, tokens, variance, effort.lean * log_prior)
    found[tokens] = _gain(states, [state.lens.directions(tokens) for state in states], variance)
    return found


def _state(lens: Lens, tensor: Tensor) -> _State:
    rows = lens.rows(tensor.float()).T
    return _State(lens=lens, rows=rows, factors=list(_START), solved=lens.strength[0] @ rows)


def _filtered(states: Sequence[_State]) -> Tensor:
    """Matched filter of every token against all rows as far as they are not explained, over its value without any."""
    power = torch.stack(
        [s.factors[2] * (s.lens.atoms.basis @ (s.lens.scaled @ s.solved)).square().sum(1) for s in states]
    ).sum(0)
    usual = torch.stack([s.factors[2] * s.rows.shape[1] * s.lens.strength[1] for s in states]).sum(0)
    return (power / usual).clamp(min=1e-12)


def _improve(states: Sequence[_State], chosen: Sequence[Tensor], variance: Tensor, floor: float) -> Tensor:
    """One step for all factors; the new variances."""
    gain, cost = torch.zeros_like(variance), torch.zeros_like(variance)
    for state, directions in zip(states, chosen, strict=True):
        a, b, s = state.factors
        background, count = state.lens.background, state.rows.shape[1]
        tokens = (directions * variance[:, None]).T @ directions
        lower = torch.linalg.cholesky(a * background + b * torch.eye(len(background)) + s * tokens)
        solved = torch.cholesky_solve(state.rows, lower)
        inverse = torch.cholesky_inverse(lower)
        gain += s * (directions @ solved).square().sum(1)
        cost += s * count * ((directions @ inverse) * directions).sum(1)

        def better(matrix: Tensor, inverse: Tensor = inverse, solved: Tensor = solved, count: int = count) -> float:
            spent = count * float((inverse * matrix).sum())
            return math.sqrt(float((solved * (matrix @ solved)).sum()) / max(spent, 1e-30))

        white = math.sqrt(float(solved.square().sum()) / (count * float(inverse.trace())))
        state.factors = [a * better(background), max(floor, b * white), s * better(tokens)]
        state.solved = solved
    return variance * (gain / cost.clamp(min=1e-30)).sqrt()


def _gain(states: Sequence[_State], chosen: Sequence[Tensor], variance: Tensor) -> Tensor:
    """How much the log-likelihood loses without each candidate, (C,): rank-one changes of S in each lens."""
    total = torch.zeros_like(variance)
    for state, directions in zip(states, chosen, strict=True):
        a, b, s = state.factors
        background, count = state.lens.background, state.rows.shape[1]
        tokens = (directions * variance[:, None]).T @ directions
        lower = torch.linalg.cholesky(a * background + b * torch.eye(len(background)) + s * tokens)
        solved = torch.cholesky_solve(state.rows, lower)
        within = (directions @ torch.cholesky_inverse(lower) * directions).sum(1)
        own = s * variance
        left = (1 - own * within).clamp(min=1e-6)  # What S without the token makes of its direction.
        power = (directions @ solved).square().sum(1) / left
        total += 0.5 * own * power + 0.5 * count * left.log()
    return total.clamp(min=0.0)


def _refresh(states: Sequence[_State], tokens: Tensor, variance: Tensor, lean: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the better half of the candidates, and fill up with what the filter now finds best."""
    count = len(tokens)
    kept = variance.topk(count - count // 2).indices
    score = _filtered(states).log() + lean
    score[tokens[kept]] = -torch.inf
    fresh = score.topk(count // 2).indices
    start = max(float(variance.median()), 1e-3 / count)
    return torch.cat((tokens[kept], fresh)), torch.cat(
        (variance[kept].clamp(min=1e-6 / count), torch.full((count // 2,), start))
    )
