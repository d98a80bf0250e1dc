"""A run on embeddings in place of tokens, so that a gradient reaches them; and back from embeddings to tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attacks.view import fork
from securesplit.model.coded import CodedFront
from securesplit.model.parts import Front, PartCache

__all__ = ["nearest", "rows_of", "table_of"]


def table_of(front: Front) -> Tensor:
    """(V, E): what A's first layer is given for every token; some families scale the stored rows."""
    embed: Any = front.base.get_input_embeddings()
    with torch.no_grad():
        table: Tensor = embed(torch.arange(embed.weight.shape[0]))
    return table.float()


def rows_of(front: Front, embedded: Tensor, cache: PartCache) -> Tensor:
    """A on embeddings (N, T, E), each behind what the cache holds: (N, T, D or k), with a graph. The cache stays as it is."""
    code = front.code if isinstance(front, CodedFront) else None
    sentinel = None if code is None else code.facts.sentinel
    first = sentinel is not None and cache.length == 0
    if first:
        start = front.base.get_input_embeddings()(torch.tensor([[sentinel]]))
        embedded = torch.cat([start.expand(len(embedded), 1, -1), embedded], 1)
    mine = fork(cache, torch.arange(len(embedded)))
    places = torch.arange(mine.length, mine.length + embedded.shape[1])[None]
    out: Tensor = front.base(
        inputs_embeds=embedded.to(front.dtype), position_ids=places, past_key_values=mine.past,
        use_cache=mine.past is not None,
    ).last_hidden_state.float()  # fmt: skip
    out = out[:, 1:] if first else out
    return out if code is None else code.encode(out).float()


def nearest(table: Tensor, embedded: Tensor, count: int) -> Tensor:
    """The tokens whose embeddings lie nearest: (n, E) to (n, count), nearest first."""
    scores = embedded @ table.T - table.square().sum(1) / 2
    return scores.topk(min(count, len(table)), dim=1).indices
