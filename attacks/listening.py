"""Reading rows left to right with the public language model as the prior: what a discriminant hears, put into sentences.

The likelihood of a row and the model's expectation of the next token make a posterior; its mean embedding is what the model
reads next, so that doubt is handed on instead of a wrong token. The expectation is mixed with the unigram prior, because a
language model alone would go on from its own mistakes. It costs one decoding step per position, for all sequences together.

This is the causal form: a row is not read again when later rows have spoken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attacks.discriminant import Discriminant

__all__ = ["heard"]


@torch.inference_mode()
def heard(
    model: Any,
    sentinel: int,
    reader: Discriminant,
    rows: Tensor,
    *,
    share: float,
    tick: Callable[[int], None] | None = None,
) -> Tensor:
    """Tokens of released sequences.

    Args:
        model: the whole public causal model.
        sentinel: the public token that it reads before a text.
        reader: gives likelihoods of rows and the unigram prior.
        rows: (N, T, D), as released.
        share: weight of the unigram in the expectation, in [0, 1].
        tick: told N after every position.

    Returns:
        (N, T) tokens, the likeliest given the rows up to each one's own.
    """
    from transformers import DynamicCache

    table = model.get_input_embeddings().weight
    cache = DynamicCache(config=model.config)
    unigram = reader.log_prior.softmax(-1)
    fed = table[torch.full((len(rows),), sentinel)]
    found = []
    for position in range(rows.shape[1]):
        logits = model(inputs_embeds=fed[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        expected = logits.float().softmax(-1).mul_(1 - share).add_(unigram * share).log_()
        if position == 0:
            expected = torch.logaddexp(expected, reader.log_opening)
        posterior = expected.add_(reader.likelihood(rows[:, position], position)).softmax(-1)
        found.append(posterior.argmax(-1))
        fed = posterior.to(table.dtype) @ table
        if tick is not None:
            tick(len(rows))
    return torch.stack(found, dim=1)
