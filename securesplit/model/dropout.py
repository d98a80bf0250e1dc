"""Dropout in adapters that is a function of a step's public name, so that a step that is done again drops the same numbers.

Torch's own dropout draws from one generator for the whole process: what a step drops then hangs on all that was drawn
before it, and a run that was interrupted cannot be repeated. Here every layer's mask comes from the step's key, the layer's
name and the shape. The process's generator is neither read nor moved. A layer that is computed again in a backward pass
(securesplit/model/recompute.py) drops the same numbers without further ado.

What this does not do: masks are no secret and protect nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from securesplit.model.parts import Part

__all__ = ["KeyedDropout", "dropping", "key_adapters", "step_key"]


def step_key(seed: int, who: str, step: int) -> bytes:
    """The name of one step of one client: of the job's public seed, the certificate's name and the step's number."""
    return hashlib.sha256(f"securesplit.dropout.v1|{seed}|{who}|{step}".encode()).digest()


class KeyedDropout(nn.Module):
    """Leaves numbers out with probability ``p`` and scales the others by 1 / (1 - p), where a key says so.

    Args:
        p: 0 or more, below 1.
        name: of the layer in the whole model.

    Attributes:
        key: of the step; None drops nothing.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p, self.name = p, name
        self.key: bytes | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Any shape and float type, to the same."""
        if self.key is None or self.p == 0:
            return x
        said = self.key + f"|{self.name}|{tuple(x.shape)}".encode()
        # One generator for all devices: a mask must not depend on where the step was done first.
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(said).digest()[:8], "little") >> 1)
        kept = (torch.rand(x.shape, generator=generator) >= self.p).to(x)
        return x * kept / (1 - self.p)


def key_adapters(inner: Any, adapter: str, p: float, name_of: Any) -> None:
    """Put this dropout in front of every LoRA layer of PEFT's in a module.

    Args:
        inner: the module.
        adapter: the adapter's name.
        p: the probability.
        name_of: from a local name to the whole model's.
    """
    for local, layer in inner.named_modules():
        held = getattr(layer, "lora_dropout", None)
        if isinstance(held, nn.ModuleDict) and adapter in held:
            held[adapter] = KeyedDropout(p, name_of(local))
            layer.training = (
                False  # As after a step: in half precision PEFT's DoRA computes other bits where it is set.
            )


@contextmanager
def dropping(parts: Sequence[Part], key: bytes) -> Iterator[None]:
    """These parts drop numbers, by this key, in forward and backward passes; base weights stay in evaluation mode."""
    layers = [
        (layer, dropout)
        for part in parts
        for layer in part.module.modules()
        if isinstance(held := getattr(layer, "lora_dropout", None), nn.ModuleDict)
        for dropout in held.values()
        if isinstance(dropout, KeyedDropout)
    ]
    try:
        for layer, dropout in layers:
            dropout.key = key
            layer.training = True  # The flag of this layer alone: PEFT's DoRA looks at it before it drops anything.
        yield
    finally:
        for layer, dropout in layers:
            dropout.key = None
            layer.training = False
