"""Split a model in memory. Parameters are shared, so that the parts *are* the model and its gradients can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from securesplit.errors import InputError
from securesplit.model.architectures import architecture_of
from securesplit.model.parts import Back, Front, Middle, build_part
from securesplit.model.plan import CutPlan

__all__ = ["Split", "split_model"]


@dataclass(frozen=True, slots=True)
class Split:
    """A model in three parts; ``back(middle(front(ids)))`` are its logits."""

    front: Front
    middle: Middle
    back: Back


def split_model(hf_model: Any, plan: CutPlan) -> Split:
    """Cut a causal language model into front, middle and back.

    Args:
        hf_model: a ``transformers`` causal model of a supported family, without adapters. It keeps working; its
            parameters are the parts' parameters (tied ones too), and its training or evaluation mode is taken over.
        plan: where to cut.

    Raises:
        InputError: SS-1400 for an impossible cut, SS-1401 and SS-1402 for a model that cannot be split.
    """
    architecture = architecture_of(hf_model.config)
    if type(hf_model).__name__ != architecture.causal:
        raise InputError(
            "SS-1401",
            f"a {type(hf_model).__name__} cannot be split",
            hint=f"Pass a plain {architecture.causal}, without adapters.",
        )
    spans = plan.spans(hf_model.config.num_hidden_layers)
    tensors = dict(hf_model.named_buffers(remove_duplicate=False))
    tensors.update(hf_model.named_parameters(remove_duplicate=False))
    parts = [
        build_part(role, hf_model.config, architecture, spans.of(role), tensors.get)
        for role in ("front", "middle", "back")
    ]
    for part in parts:
        part.train(hf_model.training)
    return Split(cast("Front", parts[0]), cast("Middle", parts[1]), cast("Back", parts[2]))
