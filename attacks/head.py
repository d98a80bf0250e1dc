"""C as the attacks on O2 and O3 use it: B's output to what the head multiplies, and the derivatives of that.

A gradient at B's output is linear in the one-hot labels once B's output is known, and the server knows it, having
computed it. With n_t the head's input and W its weight, logits z_t = phi(W n_t), and

    dL/dT = s sum_t J_t' W' diag(phi'(z_t)) (softmax(z_t) - e_y(t)),     J_t = d n_t / dT,

where s is 1 / (number of scored labels) and, where gradients are noised, the record's clipping factor besides. All
derivatives come from autograd on the library's own module, so that every architecture is attacked the same way.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from securesplit.model.coded import CodedBack
from securesplit.model.parts import Back

__all__ = ["Around", "Head", "Here"]


class Head:
    """C with public weights, in float32.

    Args:
        back: C; behind a public code the one that starts with the sentinel's row.
    """

    def __init__(self, back: Back) -> None:
        self.back = back if back.dtype == torch.float32 else copy.deepcopy(back).float()
        self.weight: Tensor = self.back.module.get_output_embeddings().weight.detach()
        cap = getattr(self.back.module.config, "final_logit_softcapping", None)
        self._cap: float | None = float(cap) if cap else None
        self.layers = len(back.span)

    @property
    def first(self) -> Tensor | None:
        """(D,), the public row in front of every sequence; None where there is none."""
        return self.back.code.mixed if isinstance(self.back, CodedBack) else None

    def states(self, hidden: Tensor) -> Tensor:
        """B's output (N, T, D) to what the head multiplies, (N, T, D); differentiable, twice."""
        first = self.first
        if first is not None:
            hidden = torch.cat([first.to(hidden).expand(len(hidden), 1, -1), hidden], 1)
        with sdpa_kernel(SDPBackend.MATH):  # The others have no second derivative.
            out: Tensor = self.back.base(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return out if first is None else out[:, 1:]

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) to (..., V), as C computes them."""
        out: Tensor = self.back.module.get_output_embeddings()(states)
        return out if self._cap is None else self._cap * torch.tanh(out / self._cap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """phi', (..., V): the derivative of each logit by the head's own product; None where it is 1."""
        return None if self._cap is None else 1 - (logits / self._cap).square()

    def cache(self, hidden: Tensor) -> Any:
        """Keys and values of C's layers for one sequence (T, D), the public row in front included."""
        from transformers import DynamicCache

        past = DynamicCache(config=self.back.module.config)
        first = self.first
        rows = hidden if first is None else torch.cat([first.to(hidden)[None], hidden])
        with torch.no_grad():
            self.back.base(inputs_embeds=rows[None], past_key_values=past, use_cache=True)
        return past


class Around:
    """C about one sequence, every row with every row: linear maps from autograd.

    Args:
        head: C.
        hidden: (T, D), B's output.
    """

    def __init__(self, head: Head, hidden: Tensor) -> None:
        self._leaf = hidden.detach()[None].clone().requires_grad_()
        with torch.enable_grad():
            self._states = head.states(self._leaf)
            self._dual = torch.zeros_like(self._states, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(self._states, self._leaf, self._dual, create_graph=True)
        self.states = self._states.detach()[0]

    def pull(self, cotangent: Tensor) -> Tensor:
        """J' c: (T, D) at the head's input to (T, D) at B's output. Row t depends on rows t, t + 1, ... alone."""
        (out,) = torch.autograd.grad(self._states, self._leaf, cotangent[None], retain_graph=True)
        return out[0]

    def push(self, tangent: Tensor) -> Tensor:
        """J v: (T, D) at B's output to (T, D) at the head's input."""
        (out,) = torch.autograd.grad(self._pulled, self._dual, tangent[None], retain_graph=True)
        return out[0]


class Here:
    """C about one row of one sequence: only this row of B's output moves, and only its own prediction is looked at.

    Args:
        head: C.
        hidden: (T, D), B's output.
        past: of :meth:`Head.cache` for the same rows; left as it is.
        position: t.
    """

    def __init__(self, head: Head, hidden: Tensor, past: Any, position: int) -> None:
        before = position + (head.first is not None)
        self._leaf = hidden[position].detach()[None, None].clone().requires_grad_()
        inputs: dict[str, Any] = {"use_cache": False}
        if head.layers and before:
            cropped = copy.copy(past)
            cropped.layers = [copy.copy(layer) for layer in past.layers]
            cropped.crop(before - past.get_seq_length())
            inputs = {"use_cache": True, "past_key_values": cropped}
        places = torch.tensor([[before]])
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._state = head.back.base(inputs_embeds=self._leaf, position_ids=places, **inputs).last_hidden_state
            self._dual = torch.zeros_like(self._state, requires_grad=True)
            (self._pulled,) = torch.autograd.grad(self._state, self._leaf, self._dual, create_graph=True)

    def pull(self, cotangents: Tensor) -> Tensor:
        """J' c for each of (k, D) cotangents: (k, D)."""
        (out,) = torch.autograd.grad(
            self._state, self._leaf, cotangents[:, None, None], retain_graph=True, is_grads_batched=True
        )
        return out[:, 0, 0]

    def push(self, tangents: Tensor) -> Tensor:
        """J v for each of (k, D) tangents: (k, D)."""
        (out,) = torch.autograd.grad(
            self._pulled, self._dual, tangents[:, None, None], retain_graph=True, is_grads_batched=True
        )
        return out[:, 0, 0]
