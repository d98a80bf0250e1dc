"""What a server can make of noised embedding rows: posteriors over tokens, and the embedding to go on with.

With ``front = 0`` a client releases, for every token x, ``y = c(x) + N(0, sigma^2 I)``, where the code ``c`` is public.
Everything here is post-processing of those rows with public knowledge, so that it costs no privacy: it is free for an
honest server, and just as free for a curious one. The decoder that gives the best quality *is* the best attack; its
share of right tokens belongs beside every quality figure.

    log p(x | y, prefix) = <y, c(x)> / sigma^2 - |c(x)|^2 / (2 sigma^2) + log prior(x | prefix) + const

What this does not do: it protects nothing, and it does not make a weak budget strong. It only stops a server from
wasting what a budget lets through: a frozen model that is fed raw noised rows is confidently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Channel", "Filtered", "Prior", "causal_filter", "linear_mean", "posterior", "posterior_mean"]


@dataclass(frozen=True, slots=True)
class Channel:
    """The public law of one released row.

    Attributes:
        codes: (V, k) float32, the code of every token after the public map and the clip; k may be below D.
        sigma: standard deviation of the noise per coordinate, above 0, in the unit of ``codes``.
    """

    codes: Tensor
    sigma: float

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError("codes are a matrix (V, k) and sigma is finite and positive")

    def log_likelihood(self, rows: Tensor) -> Tensor:
        """log p(row | token) for every token, up to a constant of the row.

        Args:
            rows: (..., k).

        Returns:
            (..., V) float32. |y|^2 is left out: it would only eat digits. Costs 2 V k multiplications a row.
        """
        scaled = rows.float() / self.sigma**2
        return scaled @ self.codes.T - self.codes.square().sum(-1) / (2 * self.sigma**2)


@dataclass(frozen=True, slots=True)
class Prior:
    """What the decoder expects before it looks: a language model, softened by how often tokens occur at all.

    The mixture ``(1 - share) LM + share unigram`` keeps a decoder alive whose prefix is wrong: a language model alone
    would go on from its own mistakes and rule the right token out.

    Attributes:
        log_unigram: (V,) normalised natural logarithms, from public text, all finite.
        share: weight of the unigram, in [0, 1]; 1 ignores the language model.
    """

    log_unigram: Tensor
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError("the unigram's share is between 0 and 1")

    def given(self, probability: Tensor) -> Tensor:
        """The mixture (..., V), from the language model's probabilities, which are overwritten: tables are large."""
        return probability.mul_(1 - self.share).add_(self.log_unigram.exp() * self.share)


def posterior(log_likelihood: Tensor, log_prior: Tensor) -> Tensor:
    """Normalised log posterior (..., V); stable, because log_softmax subtracts the maximum."""
    return functional.log_softmax(log_likelihood.float() + log_prior.float(), dim=-1)


def posterior_mean(log_posterior: Tensor, table: Tensor) -> Tensor:
    """The mean embedding under the posterior: (..., V) and (V, D) to (..., D).

    Of all functions of the row it has the least squared error to the true embedding; it is not itself a token's.
    """
    mean: Tensor = log_posterior.exp().to(table.dtype) @ table
    return mean


def linear_mean(channel: Channel, rows: Tensor, log_unigram: Tensor, table: Tensor) -> Tensor:
    """The best *linear* guess of the embedding: the baseline that a Bayes decoder is compared with.

    ``E[e] + Cov(e, c) (Cov(c) + sigma^2 I)^-1 (y - E[c])`` with moments under the unigram.

    Args:
        channel: codes (V, k) and noise.
        rows: (..., k).
        log_unigram: (V,).
        table: (V, D) embeddings.

    Returns:
        (..., D) float32.
    """
    weight = log_unigram.double().exp()[:, None]
    codes, values = channel.codes.double(), table.double()
    code_mean, value_mean = (weight * codes).sum(0), (weight * values).sum(0)
    centred = codes - code_mean
    covariance = (weight * centred).T @ centred
    cross = (weight * centred).T @ (values - value_mean)
    identity = torch.eye(codes.shape[1], dtype=torch.float64)
    gain: Tensor = torch.linalg.solve(covariance + channel.sigma**2 * identity, cross)
    return ((rows.double() - code_mean) @ gain + value_mean).float()


@dataclass(frozen=True, slots=True)
class Filtered:
    """A causal decoder's answer; row t depends on released rows up to t only.

    Attributes:
        embeddings: (N, T, D), the posterior means, to be fed to B after the public sentinel.
        tokens: (N, T), the most probable token of each position.
        confidence: (N, T), its probability.
    """

    embeddings: Tensor
    tokens: Tensor
    confidence: Tensor


@torch.inference_mode()
def causal_filter(
    model: Any,
    channel: Channel,
    rows: Tensor,
    prior: Prior,
    *,
    sentinel: int,
    visit: Callable[[Tensor], None] | None = None,
) -> Filtered:
    """Decode left to right: the model reads its own decoded prefix, and its prediction is the next row's prior.

    Args:
        model: the whole public causal model in evaluation mode (the server owns it).
        channel: codes and noise.
        rows: (N, T, k), as released.
        prior: the unigram and its share.
        sentinel: public token that stands before every text; its row is never released.
        visit: called with the probabilities (N, V) of the first token, then of each next one; it must not keep or
            change them.

    Returns:
        The decoded prefix. Cost: T forward passes of N rows with a KV cache, T products (N, V) by (V, D), and
        2 N T V k multiplications for the likelihood.
    """
    from transformers import DynamicCache

    table = model.get_input_embeddings().weight
    cache = DynamicCache(config=model.config)
    count, length, _ = rows.shape
    fed = table[torch.full((count,), sentinel)]
    means, tokens, confidence = [], [], []
    for position in range(length):
        logits = model(inputs_embeds=fed[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        probability = functional.softmax(logits, dim=-1, dtype=torch.float32)
        if visit is not None:
            visit(probability)
        expected = prior.given(probability)
        log_post = posterior(channel.log_likelihood(rows[:, position]), expected.log_())
        fed = posterior_mean(log_post, table)
        best = log_post.max(-1)
        means.append(fed)
        tokens.append(best.indices)
        confidence.append(best.values.exp())
    return Filtered(torch.stack(means, 1), torch.stack(tokens, 1), torch.stack(confidence, 1))
