"""Prefixes: keys and values in front of every sequence, in every layer, which are learnt in place of LoRA (P-tuning v2).

Each layer's prefix stands at the layer and belongs to the party that computes it. Nothing of it is sent: where the seed
systems made the prefixes of all layers at the client and shipped them with every step, here a part holds its own.

As in PEFT, the tokens' positions begin behind the prefix, and prefix keys are not rotated. Each prefix starts from the
job's public seed and the layer's name, so any cut starts alike; unlike a fresh LoRA a fresh prefix changes what the model
computes.

What this does not do: a prefix that was trained on private text carries that text's traces, as adapters do.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from securesplit.errors import InputError
from securesplit.model.architectures import Architecture

__all__ = ["KEY", "VALUE", "PrefixCache", "insert_prefixes", "prefix_cache", "prefix_of", "start_of_prefix"]

KEY, VALUE = "prefix_key", "prefix_value"
"""Names of a layer's two tensors, each (length, heads, size of a head)."""


class PrefixCache(DynamicCache):  # type: ignore[misc]  # The library is not typed.
    """Shows each layer its prefix in front of its own keys and values, and keeps nothing of those.

    So one pass leaves it as it was, and a layer may be computed twice (securesplit/model/recompute.py).
    """

    stateless = True

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The layer's keys and values with the prefix in front; (B, heads, T, size) each, longer by the prefix."""
        held = self.layers[layer_idx]
        return torch.cat([held.keys, key_states], 2), torch.cat([held.values, value_states], 2)

    def begin(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Give a layer its prefix."""
        super().update(keys, values, layer)


def insert_prefixes(inner: Any, architecture: Architecture, length: int) -> None:
    """Give every decoder layer of a module a prefix of zeros, float32.

    Args:
        inner: a base model, or a causal one around it.
        architecture: of the model.
        length: positions.

    Raises:
        InputError: SS-1253 for a model whose layers see a window only, in which a prefix would go out of sight.
    """
    config = inner.config
    said = getattr(config, "layer_types", None)
    kinds = set(said or ()) - {"full_attention"}
    if said is None and getattr(config, "sliding_window", None):
        kinds = {"sliding_attention"}
    if kinds:
        raise InputError(
            "SS-1253",
            f"layers of the kind {', '.join(sorted(kinds))} would lose sight of a prefix",
            hint="Use method = 'lora' with this model.",
        )
    base = getattr(inner, architecture.prefix) if hasattr(inner, architecture.prefix) else inner
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in getattr(base, architecture.layers):
        device = next(layer.parameters()).device
        for name in (KEY, VALUE):
            layer.register_parameter(name, nn.Parameter(torch.zeros(length, heads, size, device=device)))
    inner.prefix_length = length


def start_of_prefix(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """A prefix's public start: uniform in ±1/sqrt(size of a head), from the seed and the name."""
    key = hashlib.sha256(f"securesplit.prefix.v1|{seed}|{name}".encode()).digest()
    uniform = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random(
        shape, dtype=np.float32
    )
    return ((uniform * 2 - 1) / np.float32(math.sqrt(shape[-1]))).astype(np.float32)


def prefix_of(inner: Any) -> int:
    """Positions of a module's prefixes; 0 without."""
    return int(getattr(inner, "prefix_length", 0))


def prefix_cache(layers: Any, rows: int, dtype: torch.dtype, into: DynamicCache | None = None) -> DynamicCache:
    """These layers' prefixes for so many sequences.

    Args:
        layers: a part's decoder layers.
        rows: sequences.
        dtype: of the keys and values.
        into: a cache that shall begin with them, for decoding; by default one that keeps nothing.
    """
    cache = PrefixCache() if into is None else into
    for number, layer in enumerate(layers):
        # (length, heads, size) to (rows, heads, length, size).
        keys, values = (
            getattr(layer, name).to(dtype).transpose(0, 1).expand(rows, -1, -1, -1) for name in (KEY, VALUE)
        )
        if isinstance(cache, PrefixCache):
            cache.begin(number, keys, values)
        else:
            cache.update(keys, values, number)
    return cache
