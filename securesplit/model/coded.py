"""A and C around a public code (securesplit/model/code.py): the same modules, the same adapters, another last and first word.

``CodedFront`` is A and the encoder; ``CodedBack`` is C behind the sentinel's public row. Without a code they are the
plain parts themselves, so that a training step (securesplit/client/step.py) reads the same either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from securesplit.model.code import CutCode
from securesplit.model.parts import Back, Front, PartCache

__all__ = ["CodedBack", "CodedFront", "code_back", "code_front"]

_IGNORED = -100


class CodedFront(Front):
    """A followed by the encoder; shares A's module.

    Args:
        inner: A.
        code: with or without a sentinel.
    """

    def __init__(self, inner: Front, code: CutCode) -> None:
        super().__init__(inner.module, inner.architecture, inner.span, inner.layers_total)
        self.code = code

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: PartCache | None = None
    ) -> Tensor:
        """Tokens to codes, (B, T) to (B, T, k), float64; the arguments are as in :class:`Front`.

        The sentinel stands in front of whole sequences and at the start of a decoding cache; its row is dropped.
        """
        sentinel = self.code.facts.sentinel
        first = sentinel is not None and _starts(cache)
        if sentinel is not None and first:
            input_ids = torch.cat([torch.full_like(input_ids[:, :1], sentinel), input_ids], 1)
            attention_mask = _longer(attention_mask)
        hidden = super().forward(input_ids, attention_mask, cache)
        return self.code.encode(hidden[:, 1:] if first else hidden)


class CodedBack(Back):
    """C behind the sentinel's public row; shares C's module.

    Args:
        inner: C.
        code: with a sentinel.
    """

    def __init__(self, inner: Back, code: CutCode) -> None:
        super().__init__(inner.module, inner.architecture, inner.span, inner.layers_total)
        self.code = code

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: PartCache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """B's output (B, T, D) to the loss, or to logits (B, T, V); the arguments are as in :class:`Back`.

        The loss is over the same labels as without a sentinel: nothing is scored for what the sentinel alone predicts.
        """
        if not _starts(cache):
            return super().forward(hidden, labels, attention_mask, cache, logits_to_keep)
        assert self.code.mixed is not None
        batch, length = hidden.shape[:2]
        hidden = torch.cat([self.code.mixed.to(hidden).expand(batch, 1, -1), hidden], 1)
        if labels is not None:
            # Shifted inside: the sentinel would predict the first label, which nothing predicts without it.
            ignored = torch.full_like(labels[:, :1], _IGNORED)
            labels = torch.cat([ignored, ignored, labels[:, 1:]], 1)
            return super().forward(hidden, labels, _longer(attention_mask), cache)
        kept = min(logits_to_keep or length, length)
        return super().forward(hidden, None, _longer(attention_mask), cache, kept)


def code_front(front: Front, code: CutCode | None) -> Front:
    """A with the encoder, or A itself when there is no code."""
    return front if code is None else CodedFront(front, code)


def code_back(back: Back, code: CutCode | None) -> Back:
    """C behind the sentinel's row, or C itself when there is no sentinel."""
    return back if code is None or code.facts.sentinel is None else CodedBack(back, code)


def _starts(cache: PartCache | None) -> bool:
    return cache is None or cache.length == 0


def _longer(mask: Tensor | None) -> Tensor | None:
    """The same mask with the sentinel in it."""
    return None if mask is None else torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
