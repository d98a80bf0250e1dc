"""List decoding at the server: several guesses of the noised prefix, each with its own prediction of the next token.

A single decoded prefix wastes an asymmetry. The server does not know which of its guesses is right, but the client
does: it has the text. So the server keeps the K most probable prefixes, runs the model on each, and returns all K
answers; the client picks by comparing the guesses with its own clean prefix (securesplit/model/fusion.py), and never
says which it picked. The released bytes are the same, hence so are mu and every attack; the price is K times the
server's compute and K times the bytes from server to client.

What this does not do: it protects nothing, and the choice must stay at the client. A gradient, a request for "the same
again", or a timing that depends on the choice would be a new release.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from securesplit.model.bayes import Channel, Prior

__all__ = ["Hypotheses", "Visit", "list_decode", "vote"]


@dataclass(frozen=True, slots=True)
class Hypotheses:
    """K decoded prefixes of each sequence, given the rows up to their last position.

    Attributes:
        tokens: (N, K, t) token ids.
        log_weight: (N, K) log posterior weights, normalised over K; -inf for a place that is not filled.
    """

    tokens: Tensor
    log_weight: Tensor


# (hypotheses up to t, probabilities (N, K, V) of token t + 1 under each); must not keep or change the probabilities.
Visit = Callable[[Hypotheses, Tensor], None]


@torch.inference_mode()
def list_decode(
    model: Any,
    channel: Channel,
    rows: Tensor,
    prior: Prior,
    *,
    sentinel: int,
    width: int,
    recombine: int = 0,
    visit: Visit | None = None,
) -> Hypotheses:
    """Keep the most probable prefixes while reading the rows from left to right.

    Args:
        model: the whole public causal model in evaluation mode.
        channel: codes and noise.
        rows: (N, T, k), as released.
        prior: the unigram and its share in the prior.
        sentinel: public token before every text.
        width: K.
        recombine: prefixes that agree in their last ``recombine`` tokens are one hypothesis, represented by the best
            of them; 0 never merges. The list is then spent on what matters most for the next prediction.
        visit: called after every position; what the client would receive is computed there.

    Returns:
        The hypotheses after the last row. Cost: T + 1 forward passes of N K rows with a KV cache, and as many sorts of
        (N, K V) scores.
    """
    from transformers import DynamicCache

    count, length, _ = rows.shape
    cache = DynamicCache(config=model.config)
    fed = torch.full((count, width), sentinel)
    tokens = torch.empty((count, width, 0), dtype=torch.long)
    score = torch.full((count, width), -math.inf)
    score[:, 0] = 0.0  # The sentinel alone is one hypothesis, not K equal ones.
    probability = _next(model, cache, fed)
    for position in range(length):
        pool = min(width * (4 if recombine else 1), probability[0].numel())
        likelihood = channel.log_likelihood(rows[:, position])
        found = _extend(prior.given(probability), likelihood, score, pool)
        parent, token, score = _best(*found, tokens, width, recombine)
        flat = (parent + torch.arange(count)[:, None] * width).reshape(-1)
        cache.reorder_cache(flat)
        tokens = torch.cat([tokens.reshape(count * width, -1)[flat].view(count, width, -1), token[..., None]], dim=-1)
        probability = _next(model, cache, token)
        if visit is not None:
            visit(Hypotheses(tokens, functional.log_softmax(score, dim=-1)), probability)
    return Hypotheses(tokens, functional.log_softmax(score, dim=-1))


def _next(model: Any, cache: Any, token: Tensor) -> Tensor:
    """Probabilities (N, K, V) of the token after ``token`` (N, K)."""
    logits = model(token.reshape(-1, 1), past_key_values=cache, use_cache=True).logits[:, -1]
    return functional.softmax(logits, dim=-1, dtype=torch.float32).view(*token.shape, -1)


def _extend(prior: Tensor, likelihood: Tensor, score: Tensor, pool: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``pool`` best extensions of all hypotheses: scores, parents and tokens (N, pool), best first.

    Args:
        prior: (N, K, V) probabilities; likelihood: (N, V) logarithms; score: (N, K) logarithms.
        pool: at most K V.

    Every extension among the best has a token that is among the ``pool`` best by its best parent, so that only those
    tokens need the logarithm and the sort: exact, and several times faster than sorting N K V scores.
    """
    share = (score - score.amax(1, keepdim=True)).exp()
    best = prior[:, 0] * share[:, :1]
    for place in range(1, prior.shape[1]):
        torch.maximum(best, prior[:, place] * share[:, place, None], out=best)
    token = (best.log_() + likelihood).topk(min(pool, prior.shape[-1])).indices
    chosen = prior.gather(2, token[:, None].expand(-1, prior.shape[1], -1)).log()
    joint = chosen + likelihood.gather(1, token)[:, None] + score[..., None]
    found = joint.flatten(1).topk(pool)
    width = token.shape[1]
    return found.values, found.indices // width, token.gather(1, found.indices % width)


def _best(
    score: Tensor, parent: Tensor, token: Tensor, tokens: Tensor, width: int, recombine: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Parents, tokens and scores (N, K) of the list to keep, from a pool (N, P), best first, and prefixes (N, K, t)."""
    if recombine:
        recent = tokens[..., max(0, tokens.shape[-1] - recombine + 1) :] if recombine > 1 else tokens[..., :0]
        tail = recent.gather(1, parent[..., None].expand(-1, -1, recent.shape[-1]))
        tail = torch.cat([tail, token[..., None]], dim=-1)
        same = (tail[:, :, None] == tail[:, None]).all(-1)
        # Scores fall along the pool, so that an earlier equal tail is the better one.
        again = (same & torch.ones_like(same[0]).tril(-1)).any(-1)
        merged = torch.logsumexp(score[:, None].masked_fill(~same, -math.inf), dim=-1)
        score = merged.masked_fill(again, -math.inf)
        kept = score.topk(min(width, score.shape[1]))
        score, parent, token = kept.values, parent.gather(1, kept.indices), token.gather(1, kept.indices)
    short = width - score.shape[1]  # Above 0 where the vocabulary is smaller than the list: those places stay empty.
    if short:
        score = functional.pad(score, (0, short), value=-math.inf)
        parent, token = functional.pad(parent, (0, short)), functional.pad(token, (0, short))
    return parent, token, score


def vote(hypotheses: Hypotheses) -> Tensor:
    """The token with the largest total weight at each position, (N, t): an attack's guess that uses later rows too."""
    weight = hypotheses.log_weight.exp()[:, :, None]
    agree = (hypotheses.tokens[:, :, None] == hypotheses.tokens[:, None]).to(weight.dtype)
    total = (agree * weight[:, None]).sum(2)
    best = total.argmax(1, keepdim=True)
    return hypotheses.tokens.gather(1, best)[:, 0]
