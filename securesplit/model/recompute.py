"""Decoder layers that are computed again in the backward pass instead of being kept: less memory for a third more time.

Torch's own non-reentrant checkpoint around each decoder layer keeps the layer's input alone. What is computed again must be
what was computed: base weights have no dropout, that of adapters is a function of the step (securesplit/model/dropout.py),
and whoever puts other adapters in (securesplit/server/learner.py) does so for both passes.

Decoding keeps nothing for a backward pass, and is left alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from securesplit.model.parts import Part

__all__ = ["recompute_layers"]


def recompute_layers(part: Part) -> None:
    """From now on this part's decoder layers keep their inputs alone."""
    for layer in getattr(part.base, part.architecture.layers):
        layer.forward = partial(_twice, layer.forward)


def _twice(forward: Any, *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled() or _grows(options.get("past_key_values")):
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


def _grows(cache: Any) -> bool:
    """Whether a cache keeps what a layer adds, so that the layer must not be computed twice."""
    return cache is not None and not getattr(cache, "stateless", False)
