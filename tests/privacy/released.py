"""What the other side reads of a release, decoded without the product's codec; and policies in which channels are open."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from securesplit.privacy.gate import Released

ROUND = {"regime": "round", "gradients": (2.0, 0.2, 2), "updates": (3.0, 0.2, 2), "generation": (0.5, 0.2, 4)}
"""A regime in which every channel is open: clip, share, releases."""

STEP = {"regime": "step", "gradients": (2.0, 0.2, 9), "updates": (3.0, 0.2, 9), "activations": (1.0, 0.4, 9)}
"""Every local step is noised; records are released again after each."""

LABELLED = {"regime": "round", "labels": (0.2, 4), "updates": (3.0, 0.2, 2)}
"""Labels are answered at random and gradients made from the answers leave as they are: share, classes."""


def values(released: Released) -> np.ndarray:
    """What the other side reads, float32 (B,T,D)."""
    if released.codec == "f32":
        return np.frombuffer(released.payload, dtype="<f4").reshape(released.shape)
    if released.codec == "int8":
        rows = np.frombuffer(released.payload, dtype=[("scale", "<f4"), ("steps", "i1", released.shape[2])])
        return (rows["steps"] * rows["scale"][:, None]).astype(np.float32).reshape(released.shape)
    words = np.frombuffer(released.payload, dtype="<u2").astype("<u4") << 16
    return words.view("<f4").reshape(released.shape)


def silence(patch: pytest.MonkeyPatch) -> None:
    """No noise, for tests of what is under it. No production path has this."""
    patch.setattr("securesplit.privacy.gate.discrete_gaussian", lambda shape: np.zeros(shape, dtype=np.int32))
    patch.setattr("securesplit.privacy.mechanism.discrete_gaussian_like", torch.zeros_like)
