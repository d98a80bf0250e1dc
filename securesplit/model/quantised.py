"""A part's base in 8 or 4 bits a weight: the linear layers inside its decoder layers, and nothing else of it.

The extra ``quant`` brings bitsandbytes, whose layers compute on CPUs and GPUs. Norms, embedding and head stay in their own
type, and so do adapters. What is served or trained is then another function than the published model, by a rounding that
every release goes through.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import nn

from securesplit.errors import InputError
from securesplit.model.parts import Part

__all__ = ["quantise_base"]


def quantise_base(part: Part, kind: Literal["int8", "nf4"]) -> None:
    """Replace the linear layers of a part's decoder layers; before adapters are added.

    Args:
        part: with weights in a float type.
        kind: ``int8``, rows of weights in 8 bits; ``nf4``, blocks of 64 weights in 4 bits (arXiv:2305.14314).

    Raises:
        InputError: SS-1251 without bitsandbytes, or for a family whose layers are no plain linear ones.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "SS-1251",
            f"the job wants the {part.role} in {kind}, which needs bitsandbytes",
            hint="Install the extra: pip install 'securesplit[quant]'; or take the key out of [precision].",
        )
    if part.architecture.transposed:
        raise InputError(
            "SS-1251",
            f"models of the family {part.architecture.title} cannot be quantised here",
            hint="Take the key out of [precision].",
        )
    for layer in getattr(part.base, part.architecture.layers):
        for owner in list(layer.modules()):
            for name, child in list(owner.named_children()):
                if type(child) is nn.Linear:
                    setattr(owner, name, _int8(child) if kind == "int8" else _nf4(child))
    setattr(part.module, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)


def _int8(linear: nn.Linear) -> Any:
    import bitsandbytes as bnb

    new = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False, threshold=0.0
    )
    new.weight = bnb.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    return _placed(new, linear)


def _nf4(linear: nn.Linear) -> Any:
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype,
        quant_type="nf4",
    )  # fmt: skip
    new.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    return _placed(new, linear)


def _placed(new: Any, linear: nn.Linear) -> Any:
    """Quantised where the weights lie; bitsandbytes quantises when a layer is moved."""
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    device: torch.device = linear.weight.device
    return new.to(device)
