"""A square core between two constant factors, the only part of an adapter that learns: ``dW = alpha / rank * B0 R A0``.

Fed-SB (arXiv:2502.15436) sums the cores alone. With A0 and B0 equal at all clients, the mean of cores is the core of the
mean model, exactly, and a sum carries ``rank * rank`` numbers for each layer, whatever the layer's width. Unlike there,
A0 and B0 do not come from the weights and a first gradient, which no party has for the whole model, and which would tell
of private text: A0 is drawn as in every other mode, B0 has orthonormal columns, both from the job's public seed.

PEFT's own layer computes ``lora_B(lora_A(x))``; here ``lora_B`` is two of torch's linear layers in a row. So per-record
gradients need no rule of their own, and an export multiplies the two into one ordinary factor B.

What this does not do: it neither clips nor noises; a core that was trained on private text carries that text's traces.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["CORE", "OUTER", "folded", "insert_cores", "orthonormal"]

CORE, OUTER = "core", "outer"
"""Names of the two layers inside of ``lora_B``: R, (rank, rank), and B0, (out, rank)."""

_GRID = 1 << 16


def insert_cores(inner: nn.Module, adapter: str) -> None:
    """Put a core of zeros in front of every factor B of one of PEFT's adapters.

    Args:
        inner: a module with LoRA layers of PEFT.
        adapter: the adapter's name.
    """
    for layer in inner.modules():
        held = getattr(layer, "lora_B", None)
        if not isinstance(held, nn.ModuleDict) or adapter not in held:
            continue
        outer = held[adapter]
        assert isinstance(outer, nn.Linear)
        rank, weight = outer.in_features, outer.weight
        core = nn.Linear(rank, rank, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(core.weight)
        held[adapter] = nn.Sequential(OrderedDict([(CORE, core), (OUTER, outer)]))


def orthonormal(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """B0 from public random numbers: orthonormal columns, or orthonormal rows where there are more columns than rows.

    The result is rounded to multiples of 2^-16, which leaves it orthonormal to about 1e-5. Linear algebra libraries
    differ in the last bits, and every client must hold the same B0; a client whose library still rounds one number to the
    other side is refused before the sum (SS-6004), never averaged wrongly.

    Args:
        uniform: (out, rank) float32, independent entries in -1..1.

    Returns:
        (out, rank) float32.
    """
    tall = uniform.astype(np.float64)
    wide = tall.shape[0] < tall.shape[1]
    basis, triangle = np.linalg.qr(tall.T if wide else tall)
    basis *= np.where(np.diagonal(triangle) < 0, -1.0, 1.0)  # Signs are the library's choice; these are the draw's own.
    found = np.rint((basis.T if wide else basis) * _GRID) / _GRID
    return np.ascontiguousarray(found, dtype=np.float32)


def folded(outer: Tensor, core: Tensor) -> Tensor:
    """The ordinary factor B = B0 R, (out, rank) float32; the product is made in float64 and rounded once."""
    return (outer.double() @ core.double()).to(torch.float32)
