"""Partition A as the server meets it where every row is clipped by itself (unit ``token``).

The rule is public and a function of one row alone, so that every attack that simulates A simulates it too and need not
know of it. A clip over a whole sequence is not of that kind: its factor depends on rows that are not recovered yet, and
the attacks estimate it (:class:`attacks.ridge.Layer`).
"""

from __future__ import annotations

from torch import Tensor

from securesplit.model.parts import Front, PartCache
from securesplit.privacy.clip import clip_tokens

__all__ = ["RowClippedFront", "row_clipped"]


class RowClippedFront(Front):
    """A followed by the clip of each row; shares A's module.

    Args:
        inner: A, with its public code where there is one.
        bound: C, of each row's L2 norm.
    """

    def __init__(self, inner: Front, bound: float) -> None:
        super().__init__(inner.module, inner.architecture, inner.span, inner.layers_total)
        # Not a submodule: its parameters are the ones that are registered already.
        object.__setattr__(self, "_inner", inner)
        self._bound = bound

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: PartCache | None = None
    ) -> Tensor:
        """(B, T) ids to (B, T, D) rows of norm at most C, float32; the arguments are as in :class:`Front`."""
        inner: Front = object.__getattribute__(self, "_inner")
        return clip_tokens(inner(input_ids, attention_mask, cache), self._bound)


def row_clipped(front: Front, bound: float | None) -> Front:
    """A with the clip of rows, or A itself where rows are not clipped one by one."""
    return front if bound is None else RowClippedFront(front, bound)
