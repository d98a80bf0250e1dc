"""What released gradient rows say of labels: the exact Gaussian likelihood of every word of the vocabulary.

A row is ``g = s u_y + noise``, where u_y is what label y would give and s an unknown positive scale. Then

    -2 v log p(g | y, s) = |g|^2 - 2 s <g, u_y> + s^2 |u_y|^2,

so that two numbers per row and word are enough, whatever the scale. Rows behind the last label are noise alone. The scale,
and the variance where the policy states none, are found by expectation maximisation from the best point of a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Evidence", "Fit", "Mechanism", "fit", "improve", "joined", "posterior"]

_GRID = 32
_WIDEST = 1e-6
_ROUNDS = 4
_LIKELY = 48
# Without noise: how much of a row's energy may stay unexplained at first, and at least. float32 leaves 1e-7 of a number,
# and a smaller variance would make chance look like proof.
_AT_FIRST = 1e-4
_FLOOR = 1e-12
_PRIOR_WIDTH = 0.7


@dataclass(frozen=True, slots=True)
class Evidence:
    """Inner products of n rows.

    Attributes:
        along: (n, V), <g, u_y>. size: (n, V), |u_y|^2. row: (n,), |g|^2.
        width: D.
    """

    along: Tensor
    size: Tensor
    row: Tensor
    width: int

    def residual(self, scale: float) -> Tensor:
        """(n, V): |g - s u_y|^2."""
        return self.row[:, None] - 2 * scale * self.along + scale**2 * self.size

    def __getitem__(self, rows: slice) -> Evidence:
        """Some of the rows."""
        return replace(self, along=self.along[rows], size=self.size[rows], row=self.row[rows])

    def of(self, labels: Tensor) -> Evidence:
        """The same rows for some labels each, (n, k)."""
        return replace(self, along=self.along.gather(1, labels), size=self.size.gather(1, labels))

    def angle(self) -> Tensor:
        """(n, V): <g, u_y> / |u_y|, which ranks labels where the scale is unknown."""
        return self.along / self.size.clamp_min(1e-38).sqrt()


def joined(rows: list[Evidence]) -> Evidence:
    """Evidence of several rows from that of each."""
    return Evidence(
        torch.cat([row.along for row in rows]), torch.cat([row.size for row in rows]),
        torch.cat([row.row for row in rows]), rows[0].width,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mechanism:
    """What the policy says of the rows' noise.

    Attributes:
        sigma: standard deviation per coordinate; 0 for none.
        expected: the scale that the clip and the public number of labels let one expect; None where nothing does.
    """

    sigma: float
    expected: float | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """What was found of one sequence.

    Attributes:
        scale: s. variance: v, per coordinate.
        labelled: how many rows, from the first, have a label.
    """

    scale: float
    variance: float
    labelled: int


def posterior(evidence: Evidence, log_prior: Tensor, found: Fit) -> Tensor:
    """(n, V) probabilities of the labels, as if every row had one."""
    return torch.softmax(log_prior - evidence.residual(found.scale) / (2 * found.variance), dim=1)


def fit(evidence: Evidence, log_prior: Tensor, mechanism: Mechanism) -> Fit:
    """Find the scale, the variance, and how many rows have a label, from nothing.

    Args:
        evidence: of a sequence's rows, in order.
        log_prior: (n, V), normalised.
        mechanism: of the policy.
    """
    evidence, log_prior = _likely(evidence, log_prior)
    energy = float(evidence.row.mean()) / evidence.width
    variance = max(mechanism.sigma**2, _AT_FIRST * energy, 1e-38)
    grid = [*torch.logspace(math.log10(_WIDEST), 0, _GRID).tolist(), *_suggested(evidence)]
    expected = mechanism.expected
    best: tuple[float, Fit] | None = None
    for scale in grid if expected is None else [*grid, expected]:
        value, labelled = _evidence(evidence, log_prior, scale, variance, bare=not mechanism.sigma)
        if expected is not None:
            value -= math.log(scale / expected) ** 2 / (2 * _PRIOR_WIDTH**2)
        if best is None or value > best[0]:
            best = value, Fit(scale, variance, labelled)
    assert best is not None
    return _rounds(evidence, log_prior, best[1], mechanism)


def improve(evidence: Evidence, log_prior: Tensor, found: Fit, mechanism: Mechanism) -> Fit:
    """The same from a good start."""
    return _rounds(*_likely(evidence, log_prior, found), found, mechanism)


def _likely(evidence: Evidence, log_prior: Tensor, found: Fit | None = None) -> tuple[Evidence, Tensor]:
    """The labels that could be true tell the scale; the rest of the vocabulary only takes time."""
    count = min(_LIKELY, log_prior.shape[1])
    scores = evidence.angle() if found is None else log_prior - evidence.residual(found.scale) / (2 * found.variance)
    # The prior's favourites that stand among the first already would count twice.
    favourites = log_prior.scatter(1, scores.topk(count).indices, -torch.inf).topk(min(count, log_prior.shape[1]))
    likely = torch.cat([scores.topk(count).indices, favourites.indices], dim=1)
    kept = torch.cat([log_prior.gather(1, likely[:, :count]), favourites.values], dim=1)
    return evidence.of(likely), kept


def _rounds(evidence: Evidence, log_prior: Tensor, found: Fit, mechanism: Mechanism) -> Fit:
    for _ in range(_ROUNDS):
        found = _improved(evidence, log_prior, found, mechanism)
    return found


def _suggested(evidence: Evidence) -> list[float]:
    """Each row's own scale, if its label is the one at the smallest angle; without noise the exact one is among them."""
    one = evidence.of(evidence.angle().argmax(1, keepdim=True))
    scales: list[float] = (one.along / one.size.clamp_min(1e-38))[:, 0].tolist()
    return [scale for scale in scales if _WIDEST < scale <= 1]


def _evidence(evidence: Evidence, log_prior: Tensor, scale: float, variance: float, *, bare: bool) -> tuple[float, int]:
    """How well a scale explains all rows together, and for how many labelled rows it does so best."""
    residual = evidence.residual(scale)
    if bare:  # The variance is unknown here: what counts is how little stays unexplained.
        with_label = -residual.amin(1).clamp_min(0) / (2 * variance)
    else:
        with_label = torch.logsumexp(log_prior - residual / (2 * variance), dim=1)
    without = -evidence.row / (2 * variance)
    gain = torch.cumsum((with_label - without).double(), 0)
    labelled = int(gain.argmax()) + 1  # One row at least.
    return float(gain[labelled - 1] + without.double().sum()), labelled


def _improved(evidence: Evidence, log_prior: Tensor, found: Fit, mechanism: Mechanism) -> Fit:
    """One round of expectation maximisation."""
    used = evidence[slice(0, found.labelled)]
    weight = posterior(used, log_prior[: found.labelled], found)
    above, below = float((weight * used.along).sum()), float((weight * used.size).sum())
    if mechanism.expected is not None:  # The prior of the scale, as a normal one about the value expected.
        trust = mechanism.sigma**2 / (_PRIOR_WIDTH * mechanism.expected) ** 2
        above, below = above + trust * mechanism.expected, below + trust
    scale = above / below if above > 0 and below > 0 else found.scale
    variance = mechanism.sigma**2
    if not variance:
        left = float((weight * used.residual(scale)).sum(1).clamp_min(0).mean())
        variance = max(left, _FLOOR * float(used.row.mean()), 1e-38) / evidence.width
    _, labelled = _evidence(evidence, log_prior, scale, variance, bare=not mechanism.sigma)
    return Fit(scale, variance, labelled)
