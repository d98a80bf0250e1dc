"""A public language model as a prior over tokens, read with a cache: one forward pass per token and hypothesis.

The mixture with the unigram (securesplit/model/bayes.py) keeps a decoder alive whose prefix is wrong.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from attacks.view import fork
from securesplit.model.bayes import Prior
from securesplit.model.parts import PartCache

__all__ = ["Reader"]


class Reader:
    """Hypotheses as a language model reads them.

    Args:
        model: the whole public causal model in evaluation mode; None for the unigram alone.
        sentinel: public token before every text; None for none: the first token then has the unigram as its prior.
        prior: unigram and its share.
        count: hypotheses.

    Attributes:
        next: (count, V) log prior of each hypothesis's next token.
    """

    def __init__(self, model: Any, sentinel: int | None, prior: Prior, count: int) -> None:
        self.model, self.prior = model, prior
        self.next = prior.log_unigram.expand(count, -1)
        if model is not None:
            self.cache = self._fresh()
            if sentinel is not None:
                self.read(torch.full((count,), sentinel))

    def keep(self, rows: Tensor) -> None:
        """Go on with these hypotheses (count,), which may repeat."""
        self.next = self.next[rows]
        if self.model is not None and self.cache.length:
            self.cache = fork(self.cache, rows)

    def twin(self) -> Reader:
        """Another reader of the same hypotheses."""
        other = copy.copy(self)
        if self.model is not None:
            other.cache = fork(self.cache, torch.arange(len(self.next))) if self.cache.length else self._fresh()
        return other

    def _fresh(self) -> PartCache:
        from transformers import DynamicCache

        return PartCache(DynamicCache(config=self.model.config))

    def read(self, tokens: Tensor) -> None:
        """Read one more token of each hypothesis, (count,)."""
        if self.model is not None:
            self.next = self._forward(tokens[:, None], self.cache)[:, -1]

    def continuation(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """log prior of continuations (n, w) of the hypotheses ``rows`` (n,), which are left as they are: (n,) float64."""
        total = self.next[rows].gather(1, tokens[:, :1])[:, 0].double()
        if tokens.shape[1] == 1:
            return total
        if self.model is None:
            return total + self.prior.log_unigram[tokens[:, 1:]].double().sum(1)
        given = self._forward(tokens[:, :-1], fork(self.cache, rows))
        return total + given.gather(2, tokens[:, 1:, None])[..., 0].double().sum(1)

    def _forward(self, tokens: Tensor, cache: PartCache) -> Tensor:
        logits = self.model(tokens, past_key_values=cache.past, use_cache=True).logits
        cache.length += tokens.shape[1]
        return self.prior.given(functional.softmax(logits.float(), dim=-1)).log_()
