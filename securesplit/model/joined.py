"""One PEFT configuration for adapters whose parts differ: in rank, in scale, in targets, in what of them is DoRA.

PEFT has one ``r`` and one ``lora_alpha``, with patterns of names for what differs; whether the scale is alpha / r or
alpha / sqrt(r), and whether an adapter is DoRA, it knows for all layers together. A scale of the other kind is therefore
said by an alpha that gives the same number; and a layer without DoRA becomes one whose lengths are those that it has
anyway (:func:`lengths_of`), which is the same weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from securesplit.model.architectures import Architecture

if TYPE_CHECKING:
    from securesplit.model.saved import AdapterFacts, PartAdapters

__all__ = ["lengths_of", "peft_config"]


def peft_config(parts: Sequence[PartAdapters], architecture: Architecture, layers: int, base_model_name: str) -> Any:
    """The ``LoraConfig`` of one adapter for the whole model.

    Args:
        parts: of one job.
        architecture: of the model.
        layers: decoder layers of the whole model.
        base_model_name: to record.
    """
    from peft import LoraConfig, TaskType

    first = parts[0].facts
    adapted = sorted({t.layer for p in parts for t in p.tensors if t.layer >= 0})
    drifts = any(t.layer < 0 for p in parts for t in p.tensors)
    one = len({p.facts.rslora for p in parts}) == 1
    ranks, alphas = {}, {}
    for part in parts[1:]:
        where = _pattern(part, architecture) + r"\..*"
        if part.facts.rank != first.rank:
            ranks[where] = part.facts.rank
        if _alpha(part.facts, plain=not one) != _alpha(first, plain=not one):
            alphas[where] = _alpha(part.facts, plain=not one)
    several = drifts or len({p.facts.targets for p in parts}) > 1
    some = not several and len(adapted) < layers
    return LoraConfig(
        r=first.rank,
        lora_alpha=_alpha(first, plain=not one),  # PEFT divides it; it need not be whole.
        target_modules=_targets(parts, architecture, drifts=drifts) if several else list(first.targets),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=one and first.rslora,
        use_dora=any(p.facts.dora for p in parts),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=architecture.transposed,
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        base_model_name_or_path=base_model_name,
        layers_to_transform=adapted if some else None,
        layers_pattern=architecture.layers if some else None,
    )


def lengths_of(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The lengths of an adapted weight's rows, (out,) float32: with them as its own a DoRA layer is the plain one.

    Args:
        weight: (out, in), of the base.
        a, b: (rank, in) and (out, rank).
        scaling: of the product.
    """
    lengths: Tensor = torch.linalg.norm(weight.float() + scaling * (b.float() @ a.float()), dim=1)
    return lengths


def _alpha(facts: AdapterFacts, *, plain: bool) -> float:
    """The part's own alpha, or the one that gives its scale as alpha / r."""
    return facts.alpha * math.sqrt(facts.rank) if plain and facts.rslora else facts.alpha


def _pattern(part: PartAdapters, architecture: Architecture) -> str:
    numbers = "|".join(str(layer) for layer in sorted({t.layer for t in part.tensors if t.layer >= 0}))
    return rf"{re.escape(architecture.prefix)}\.{re.escape(architecture.layers)}\.(?:{numbers})"


def _targets(parts: Sequence[PartAdapters], architecture: Architecture, *, drifts: bool) -> str:
    found = [
        rf"{_pattern(part, architecture)}\.(?:.*\.)?(?:{'|'.join(map(re.escape, part.facts.targets))})"
        for part in parts
        if any(t.layer >= 0 for t in part.tensors)
    ]
    if drifts:
        found.append(rf"{re.escape(architecture.prefix)}\.{re.escape(architecture.embedding)}")
    return "|".join(rf"(?:.*\.)?{one}" for one in found)
