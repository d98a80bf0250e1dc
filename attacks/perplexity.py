"""What a causal language model says of texts, token by token: the raw material of every attack on the trained model (O6).

Two models are asked, the trained one and the public one it started from; several attacks read the same answers, so they
are computed once. Nothing here compares or judges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks.knowledge import Knowledge
from attacks.view import ServerView

__all__ = ["Likelihood", "Numbers", "Sequences", "encoded", "likelihoods", "longest", "under"]

Numbers = npt.NDArray[np.float64]
Sequences = tuple[tuple[int, ...], ...]

# Logits of 512 tokens over a vocabulary of 49 152 take 100 MB in float32, and as much again for their logarithms.
_TOKENS = 512
_LONGEST = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Likelihood:
    """One text of n tokens; every array is (n - 1,), for the tokens after the first.

    Attributes:
        log_probability: natural logarithm of each token's probability after those before it.
        mean, deviation: of the log-probability at that place if the token were drawn from the model itself (Min-K%++).
    """

    log_probability: Numbers
    mean: Numbers
    deviation: Numbers


def longest(view: ServerView) -> int:
    """The most tokens of a text that were trained on: the longest row in the traffic, which is a public bucket."""
    lengths = [len(seen.rows) for seen in view.traffic] + [len(seen.rows) for seen in view.sightings]
    return max(lengths, default=_LONGEST)


def encoded(known: Knowledge, texts: Sequence[str], limit: int) -> Sequences:
    """Token ids of texts, cut where a client cuts them."""
    encode = known.model.encode
    assert encode is not None, "the worker always has the public tokenizer"
    return tuple(tuple(encode(text)[:limit]) for text in texts)


def likelihoods(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[Likelihood, ...]:
    """Ask a model, a batch of like lengths at a time; causal attention makes padding on the right harmless.

    Args:
        model: a causal model of the library, in evaluation mode.
        sequences: token ids; of a text of fewer than two tokens nothing is said, and its arrays are empty.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    found: dict[int, Likelihood] = {}
    while order:
        size = max(1, _TOKENS // max(1, len(sequences[order[-1]])))
        part, order = order[-size:], order[:-size]
        width = max([2, *(len(sequences[i]) for i in part)])
        ids = torch.tensor([[*sequences[i], *[0] * (width - len(sequences[i]))] for i in part])
        with torch.inference_mode():
            spoken = _spoken(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), ids[:, 1:])
        for place, index in enumerate(part):
            count = max(0, len(sequences[index]) - 1)
            found[index] = Likelihood(*(values[place, :count].double().numpy() for values in spoken))
    return tuple(found[i] for i in range(len(sequences)))


def _spoken(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, V) logits to three (B, T) arrays; in place where it can be, because V is large."""
    logs = torch.log_softmax(logits, dim=-1)
    chosen = logs.gather(-1, targets[..., None])[..., 0]
    # A token of probability 0 adds 0 log 0 = 0.
    weighted = logs.exp().mul_(logs).nan_to_num_(nan=0.0, neginf=0.0)
    mean = weighted.sum(-1)
    square = weighted.mul_(logs).nan_to_num_(nan=0.0, posinf=0.0).sum(-1)
    return chosen, mean, (square - mean.square()).clamp_min(0).sqrt()


@lru_cache(maxsize=6)
def under(model: Callable[[], Any], sequences: Sequences) -> tuple[Likelihood, ...]:
    """:func:`likelihoods` under the model that a loader gives; remembered, since several attacks ask the same."""
    return likelihoods(model(), sequences)
