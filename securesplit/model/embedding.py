"""A LoRA on A's embedding that drifts at its client: trained there, in no sum, in no message.

It lets a site's words move apart from the published table, and it is a site's own, so an attacker who holds the public
table no longer holds the one in use. That is a hindrance and no protection: from pairs of tokens and rows, which anyone has
who may send a text of his own, a new table is fitted as easily as the old one was known, and hidden states of a drifted
table carry their words as plainly. Nothing here is counted as privacy, and no budget is saved by it.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from securesplit.errors import InputError
from securesplit.model.parts import Part

__all__ = ["drift_parameters", "read_drift", "set_trainable_drift", "start_drift", "write_drift"]

_NAMES = ("lora_embedding_A", "lora_embedding_B")


def drift_parameters(model: Part | Any) -> tuple[tuple[str, nn.Parameter], ...]:
    """A's factors by the names that they have in PEFT's files: (rank, vocabulary) and (D, rank); empty without a drift."""
    inner = model.module if isinstance(model, Part) else model
    found = []
    for local, layer in inner.named_modules():
        for name in _NAMES:
            held = getattr(layer, name, None)
            if isinstance(held, nn.ParameterDict):
                full = model.global_name(local) if isinstance(model, Part) else local
                found += [(f"{full}.{name}", parameter) for parameter in held.values()]
    return tuple(found)


def start_drift(model: Part | Any, seed: int) -> None:
    """Give the factors their public start: zeros for the first, small random numbers for the second, as PEFT has it."""
    for name, parameter in drift_parameters(model):
        values = np.zeros(tuple(parameter.shape), dtype=np.float32)
        if name.endswith(_NAMES[1]):
            key = hashlib.sha256(f"securesplit.lora.v1|{seed}|{name}".encode()).digest()
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
            uniform = generator.random(tuple(parameter.shape), dtype=np.float32) * 2 - 1
            values = (uniform / np.float32(math.sqrt(parameter.shape[1]))).astype(np.float32)
        parameter.data = torch.from_numpy(values).to(parameter.device)


def set_trainable_drift(model: Part | Any, *, learns: bool) -> None:
    """Let the drift learn, or hold it."""
    for _, parameter in drift_parameters(model):
        parameter.requires_grad_(learns)
        if not learns:
            parameter.grad = None


def read_drift(model: Part | Any) -> NDArray[np.float32]:
    """Its values, one vector; empty without a drift."""
    held = [parameter.detach().cpu().numpy().reshape(-1) for _, parameter in drift_parameters(model)]
    return np.concatenate(held) if held else np.zeros(0, dtype=np.float32)


def write_drift(model: Part | Any, flat: NDArray[np.float32]) -> None:
    """Set its values from one vector.

    Raises:
        InputError: SS-1412 when it is of another length, or not finite; nothing is changed.
    """
    held = [parameter for _, parameter in drift_parameters(model)]
    if flat.shape != (sum(p.numel() for p in held),) or not bool(np.isfinite(flat).all()):
        raise InputError("SS-1412", "the values are of another embedding", hint="Use those of the same job.")
    start = 0
    with torch.no_grad():
        for parameter in held:
            piece = flat[start : start + parameter.numel()].reshape(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(piece.copy()))
            start += parameter.numel()
