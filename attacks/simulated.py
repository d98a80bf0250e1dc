"""What a client would have sent for public text, before the noise: framed to a public length, through A, clipped.

Attacks that learn from examples learn from these; the noise they add in their formulae, or draw from a generator with a
seed, which is a simulation and no release.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.knowledge import Knowledge
from attacks.ridge import hidden_of
from securesplit.privacy.clip import clip_sequence

__all__ = ["clean_rows", "framed", "padding_of", "public_texts"]


def padding_of(known: Knowledge) -> int:
    """The token that clients fill up with; it is public.

    The tokenizer says it, and as a rule the model's configuration says the same. A wrong token would teach the attacks
    the wrong padding and make them look weak, so that the sentinel is only what is left when neither says anything.
    """
    config = getattr(getattr(known.model.front, "base", None), "config", None)
    named = (known.model.padding, getattr(config, "pad_token_id", None), known.model.sentinel, 0)
    return int(next(token for token in named if token is not None))


def public_texts(known: Knowledge, count: int, length: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Public texts from their start, drawn with replacement and cut at ``length``; random tokens where there are none."""
    texts = [text[:length] for text in known.prior.texts if len(text) > 1]
    if not texts:
        shape = (count, length)
        return [tuple(row) for row in torch.randint(0, known.vocabulary, shape, generator=generator).tolist()]
    return [texts[i] for i in torch.randint(0, len(texts), (count,), generator=generator).tolist()]


def framed(texts: Sequence[Sequence[int]], bucket: int, padding: int, *, classes: bool) -> Tensor:
    """Texts at one public length, (N, bucket), as securesplit/data/batches.py and labelled.py frame them.

    Args:
        texts: token ids, at most ``bucket`` of them; with classes one fewer.
        classes: padding stands in front, and once behind, where the class is asked for; else it stands behind.
    """
    rows = torch.full((len(texts), bucket), padding)
    for row, text in zip(rows, texts, strict=True):
        end = bucket - 1 if classes else len(text)
        row[end - len(text) : end] = torch.tensor(tuple(text), dtype=torch.int64)
    return rows


def clean_rows(known: Knowledge, ids: Tensor) -> Tensor:
    """Rows as they stand before the noise: (N, T) ids to (N, T, D) float32, clipped by the policy's bound."""
    hidden = hidden_of(known.model.front, ids)
    return hidden if known.noise.clip is None else clip_sequence(hidden, known.noise.clip)
