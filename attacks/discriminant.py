"""The discriminant: how likely each token is behind a row, from its mean row and how rows vary around it.

A row is taken as ``y = mean(token) + variation + noise``, Gaussian with one covariance ``S = within + sigma^2 I`` for all
tokens. Up to what all tokens share, its log likelihood is then linear in the row,

    log p(y | v) = y' S^-1 m_v - m_v' S^-1 m_v / 2,

so that the attack is one matrix product. It is exact at position 0 and at an embedding cut; elsewhere the variation is no
Gaussian, and two numbers make up for it: how far the likelihood is to be believed, and how far the prior. They are fitted by
cross-entropy on held-out public rows with the noise on. Several forms compete there, one without the noise in S among them:
a textbook fit that knows the noise can be the weaker one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.codebook import Codebook
from attacks.rehearsal import Rehearsal, released

__all__ = ["Discriminant", "Scorer", "calibrated", "fit_discriminant", "gaussian_scorer", "scorer_of", "variation_of"]

_BELIEF = (0.1, 0.25, 0.5, 0.75, 1.0)
_TRUST = (0.0, 0.5, 1.0)
_TESTED = 384
_BLOCK = 128
_JITTER = 1e-4


@dataclass(frozen=True, slots=True)
class Scorer:
    """``(rows - centre) @ weights.T + bias``: log likelihoods of all tokens, up to what they share.

    Attributes:
        centre: (D,). weights: (V, D). bias: (V,).
    """

    centre: Tensor
    weights: Tensor
    bias: Tensor

    def of(self, rows: Tensor) -> Tensor:
        """(N, D) rows to (N, V)."""
        return torch.addmm(self.bias, rows - self.centre, self.weights.T)


@dataclass(frozen=True, slots=True)
class Discriminant:
    """A fitted inverter of single rows.

    Attributes:
        first, later: scorers for position 0 and for the rest.
        factor: rows are divided by it before.
        belief: a factor on the likelihoods of later rows. trust: a factor on the log prior there.
        log_prior: (V,) of tokens. log_opening: (V,) of first tokens.
        form: which form won, for reports and tests.
        hits: share of the held-out rows that it names, with the noise on.
    """

    first: Scorer
    later: Scorer
    factor: float
    belief: float
    trust: float
    log_prior: Tensor
    log_opening: Tensor
    form: str
    hits: float

    def likelihood(self, rows: Tensor, position: int) -> Tensor:
        """Log likelihoods as far as they are believed: (N, D) released rows of one position to (N, V)."""
        if position == 0:
            return self.first.of(rows / self.factor)
        return self.later.of(rows / self.factor) * self.belief

    def prior(self, position: int) -> Tensor:
        """(V,) log prior as far as it is trusted."""
        return self.log_opening if position == 0 else self.log_prior * self.trust

    def tokens(self, rows: Tensor) -> Tensor:
        """The likeliest tokens: (N, T, D) released rows to (N, T)."""
        count, length, width = rows.shape
        found = torch.empty((count, length), dtype=torch.long)
        found[:, 0] = torch.cat([part.argmax(1) for part in self._scores(rows[:, 0], 0)])
        if length > 1:
            later = self._scores(rows[:, 1:].reshape(-1, width), 1)
            found[:, 1:] = torch.cat([part.argmax(1) for part in later]).view(count, length - 1)
        return found

    def _scores(self, rows: Tensor, position: int) -> Iterator[Tensor]:
        prior = self.prior(position)
        for part in torch.split(rows, _BLOCK):
            yield self.likelihood(part, position).add_(prior)


def scorer_of(means: Tensor, tokens: Tensor, rows: Tensor, sigma: float) -> Scorer:
    """A scorer for rows that are released with noise ``sigma``.

    Args:
        means: (V, D), right up to a shift.
        tokens: (N,), rows: (N, D): public rows before the noise, which give the shift and the covariance.
        sigma: noise per coordinate that the covariance is to hold, in the unit of ``rows``; 0 for none.
    """
    shift, covariance = variation_of(means, tokens, rows)
    covariance += sigma**2 * torch.eye(len(covariance), dtype=torch.float64)
    return gaussian_scorer(means + shift, means[tokens].mean(0) + shift, covariance)


def variation_of(means: Tensor, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The common shift (D,) and the covariance (D, D) float64 of rows about their tokens' means, made regular."""
    residual = rows - means[tokens]
    shift = residual.mean(0)
    residual = residual - shift
    covariance = (residual.T @ residual / len(residual)).double()
    typical = float(covariance.diagonal().median())
    # Too few rows leave the covariance singular; a common variance, the larger the fewer they are, fills it up.
    spread = float((means[tokens] - means[tokens].mean(0)).square().mean()) + 1e-12
    floor = typical * min(1.0, len(covariance) / len(rows)) + _JITTER * max(typical, _JITTER * spread)
    return shift, covariance + floor * torch.eye(len(covariance), dtype=torch.float64)


def gaussian_scorer(means: Tensor, centre: Tensor, covariance: Tensor) -> Scorer:
    """The scorer of Gaussian rows with means (V, D) and one covariance (D, D).

    Args:
        centre: (D,) subtracted from rows and means alike, so that float32 keeps the digits that tell tokens apart.
    """
    moved = means - centre
    weights = moved @ torch.linalg.inv(covariance).float()
    return Scorer(centre=centre, weights=weights, bias=(weights * moved).sum(1) / -2)


@torch.no_grad()
def fit_discriminant(
    codebook: Codebook, train: Rehearsal, test: Rehearsal, log_prior: Tensor, sigma: float, generator: torch.Generator
) -> Discriminant:
    """The best form at a noise.

    Args:
        codebook: of the cut.
        train, test: public rows; the test's with fresh noise choose the form, the belief and the trust.
        log_prior: (V,) of tokens, from all public text.
        sigma: noise per coordinate as released; it is divided by the clipping factor here.
        generator: of the simulated noise and of which rows are tested.
    """
    sigma, vocabulary = sigma / train.factor, len(log_prior)
    opening = torch.bincount(torch.cat([train.tokens[:, 0], test.tokens[:, 0]]), minlength=vocabulary).float()
    share = len(train.tokens) / (len(train.tokens) + 10)
    log_opening = ((1 - share) * log_prior.exp() + share * opening / opening.sum()).log()
    rows, tokens = train.rows / train.factor, train.tokens
    first = scorer_of(codebook.first, tokens[:, 0], rows[:, 0], sigma)
    best = Discriminant(first, first, train.factor, 1.0, 1.0, log_prior, log_opening, "first", 0.0)
    if rows.shape[1] == 1:
        return best
    # The prior that calibrates must not have seen the held-out text, or it would be trusted too far.
    seen = torch.bincount(tokens.flatten(), minlength=vocabulary).float() + 0.1
    seen = (seen / seen.sum()).log()
    tested = released(test.rows, sigma * train.factor, generator)[:, 1:].flatten(0, 1) / train.factor
    truth = test.tokens[:, 1:].flatten()
    chosen = torch.randperm(len(truth), generator=generator)[:_TESTED]
    tested, truth = tested[chosen], truth[chosen]
    rows, tokens = rows[:, 1:].flatten(0, 1), tokens[:, 1:].flatten()
    record = (-1.0, 0.0)
    for form, weight, aware in _forms(sigma):
        scorer = scorer_of(codebook.linear + weight * codebook.offset, tokens, rows, sigma if aware else 0.0)
        belief, trust, hits, loss = calibrated(scorer, tested, truth, seen)
        if (hits, -loss) > record:
            record = hits, -loss
            best = Discriminant(
                first, scorer, train.factor, belief, trust, log_prior, log_opening, form, hits
            )  # fmt: skip
    return best


def _forms(sigma: float) -> list[tuple[str, float, bool]]:
    """Name, weight of the offsets, and whether the covariance holds the noise."""
    forms = [("linear", 0.0, True), ("half", 0.5, True), ("full", 1.0, True)]
    return [*forms, ("full, not aware", 1.0, False)] if sigma else forms


def calibrated(scorer: Scorer, rows: Tensor, truth: Tensor, log_prior: Tensor) -> tuple[float, float, float, float]:
    """The belief and the trust of least cross-entropy, and with them the share of hits and the cross-entropy, in nats.

    Args:
        scorer: of rows (N, D), with their noise, whose tokens are ``truth`` (N,).
        log_prior: (V,); it must not have been counted on these rows' text.
    """
    losses = torch.zeros(len(_BELIEF), len(_TRUST), dtype=torch.float64)
    hits = torch.zeros_like(losses)
    for part, right in zip(torch.split(rows, _BLOCK), torch.split(truth, _BLOCK), strict=True):
        likelihood = scorer.of(part)
        for i, belief in enumerate(_BELIEF):
            for j, trust in enumerate(_TRUST):
                logits = torch.add(log_prior * trust, likelihood, alpha=belief)
                losses[i, j] += float(torch.nn.functional.cross_entropy(logits, right, reduction="sum").double())
                hits[i, j] += float((logits.argmax(1) == right).sum())
    best = int(losses.argmin())
    i, j = divmod(best, len(_TRUST))
    return _BELIEF[i], _TRUST[j], float(hits[i, j]) / len(truth), float(losses[i, j]) / len(truth)
