"""What anybody knows of the text before looking: public text, and how often its tokens occur."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SMOOTHING = 0.1
# Public simulation only; no secret depends on this generator.
_SEED = 20261121


@dataclass(frozen=True, slots=True)
class Prior:
    """Knowledge before observation.

    Attributes:
        log_probability: (V,) natural logarithm, smoothed, over the vocabulary.
        favourites: (V,) token ids, most frequent first.
        positional: the most frequent token at each position from the start of a text; empty without auxiliary text.
        texts: token ids of the auxiliary texts; empty without.
    """

    log_probability: Tensor
    favourites: Tensor
    positional: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]

    @property
    def informed(self) -> bool:
        """Whether there was auxiliary text."""
        return bool(self.texts)


def prior_from(
    texts: Sequence[str], encode: Callable[[str], list[int]], vocabulary: int, *, length: int = 256
) -> Prior:
    """Count tokens of public text.

    Without text the prior falls with the token's rank in the vocabulary, 1 / (rank + 2.7): byte-pair merges are
    numbered by frequency, so that low numbers are common. It is a weak prior, and meant to be.

    Args:
        texts: auxiliary texts; may be empty.
        encode: the model's tokenizer.
        vocabulary: V.
        length: for how many positions the positional prior is kept.
    """
    ids = tuple(tuple(encode(text)) for text in texts)
    ids = tuple(text for text in ids if text)
    if not ids:
        probability = 1 / (torch.arange(vocabulary, dtype=torch.float64) + 2.7)
    else:
        flat = torch.tensor([token for text in ids for token in text])
        probability = torch.bincount(flat, minlength=vocabulary).double() + _SMOOTHING
    log_probability = (probability / probability.sum()).log().float()
    favourites = torch.argsort(log_probability, descending=True, stable=True)
    positional = []
    for position in range(min(length, max(map(len, ids), default=0))):
        counts = Counter(text[position] for text in ids if len(text) > position)
        positional.append(min(counts, key=lambda token: (-counts[token], token)))
    return Prior(log_probability=log_probability, favourites=favourites, positional=tuple(positional), texts=ids)


def public_sequences(prior: Prior, rows: int, length: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Token sequences to simulate the clients with, (N, length).

    Two thirds are windows of the auxiliary text, half of them from a text's start as a client sends it; one third are
    uniformly random tokens, so that rare tokens are seen as well. Without auxiliary text all are random.
    """
    generator = generator or torch.Generator().manual_seed(_SEED)
    count = max(2, -(-rows // length))
    vocabulary = len(prior.favourites)
    sequences = torch.randint(0, vocabulary, (count, length), generator=generator)
    if prior.informed:
        stream = torch.tensor([token for text in prior.texts for token in text])
        if len(stream) < length:
            stream = stream.repeat(-(-length // len(stream)))
        starts_of_text = torch.cumsum(torch.tensor([0, *(len(text) for text in prior.texts[:-1])]), dim=0)
        starts_of_text = starts_of_text[starts_of_text <= len(stream) - length]
        anywhere = torch.randint(0, len(stream) - length + 1, (count,), generator=generator)
        chosen = starts_of_text[torch.randint(0, len(starts_of_text), (count,), generator=generator)]
        for row in range(count):
            if row % 3:
                start = int(chosen[row] if row % 3 == 1 else anywhere[row])
                sequences[row] = stream[start : start + length]
    return sequences
