"""Decoding that agrees with itself: per-position evidence of the next token, and a public language model over the text.

Evidence at one position knows nothing of what the other positions were found to be. A beam search with the unsplit public
model puts the text together: at every step the prior is a mixture of the model's prediction from the text found so far,
of what B's output foretells, and of a unigram. The model starts behind the sentinel, since the first token is beyond the
reach of everything that this serves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Shares", "beam", "predicted", "shares_for"]

_ROUNDS = 30
_CANDIDATES = 64


@dataclass(frozen=True, slots=True)
class Shares:
    """How much each prior is worth; they add up to 1.

    Attributes:
        own: of B's output and the unigram, as one. written: of the language model's prediction from the text so far.
    """

    own: float
    written: float


def predicted(whole: Any, texts: Tensor, guesses: Tensor, sentinel: int | None) -> Tensor:
    """What the model makes of texts when it reads guesses of them, as it does while decoding.

    Fed with the texts themselves it would look far more trustworthy than it is: one wrong token misleads the rest.

    Args:
        texts, guesses: (n, T) ids; position 0 of the guesses is hidden from the model behind the sentinel.

    Returns:
        (n (T - 1),) log probability of the texts' tokens 1, 2, ...
    """
    found = []
    for part, read in zip(torch.split(texts, 4), torch.split(guesses, 4), strict=True):
        given = read[:, :-1].clone()
        if sentinel is not None:
            given[:, 0] = sentinel
        with torch.no_grad():
            log_probability = torch.log_softmax(whole(given, use_cache=False).logits.float(), dim=-1)
        found.append(log_probability.gather(2, part[:, 1:, None]).flatten())
    return torch.cat(found)


def shares_for(own: Tensor, written: Tensor) -> Shares:
    """Fit the mixture's weights.

    Args:
        own, written: (n,) log probability that each prior gave to the true tokens of public text.
    """
    first, second, share = own.exp(), written.exp(), 0.5
    for _ in range(_ROUNDS):
        share = float((share * first / (share * first + (1 - share) * second).clamp_min(1e-38)).mean())
    share = min(max(share, 0.01), 0.99)
    return Shares(share, 1 - share)


def beam(
    whole: Any,
    log_likelihood: Tensor,
    log_prior: Tensor,
    shares: Shares,
    *,
    sentinel: int,
    width: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[int, ...]:
    """The text that evidence and language agree on best.

    Args:
        whole: the unsplit public model.
        log_likelihood: (n, V), of tokens 1 to n, up to a constant per row; zero where the prior is all there is.
        log_prior: (n, V), normalised, what is known of each of them without the text.
        shares: of that prior and of the language model's.
        sentinel: stands in the place of token 0.
        width: texts that are kept at every step.

    Returns:
        Tokens 1 to n.
    """  # fmt: skip
    own = log_prior + _log(shares.own)
    written_share = _log(shares.written)
    texts, scores, past = torch.empty((1, 0), dtype=torch.int64), torch.zeros(1), None
    last = torch.full((1, 1), sentinel)
    with torch.no_grad():
        for position in range(len(own)):
            out = whole(last, past_key_values=past, use_cache=True)
            past = out.past_key_values
            written = torch.log_softmax(out.logits[:, -1].float(), dim=-1) + written_share
            each = torch.logaddexp(own[position][None], written) + log_likelihood[position][None] + scores[:, None]
            count = min(_CANDIDATES, each.shape[1])
            value, token = each.topk(count, dim=1)
            best = value.flatten().topk(min(width, value.numel()))
            rows = best.indices // count
            last = token.flatten()[best.indices][:, None]
            texts, scores = torch.cat([texts[rows], last], 1), best.values
            past = _chosen(past, rows)
            if progress is not None:
                progress(position + 1)
    return tuple(texts[int(scores.argmax())].tolist())


def _chosen(past: Any, rows: Tensor) -> Any:
    kept = copy.copy(past)
    kept.layers = [copy.copy(layer) for layer in past.layers]
    kept.batch_select_indices(rows)
    return kept


def _log(share: float) -> float:
    return float(torch.tensor(share).log())
