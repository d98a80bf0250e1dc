"""The mechanism itself, as functions: clip, lattice, noise, wire type. Nothing is decided, charged or remembered here.

Rows stay on their own device until they are noised. Scaling and casting come after the noise and cost nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from securesplit.privacy.clip import clip_sequence, clip_tokens
from securesplit.privacy.lattice import discrete_gaussian_like, quantise_like, step_for
from securesplit.privacy.plan import ChannelPlan
from securesplit.privacy.released import Codec


def clipped(rows: Tensor, channel: ChannelPlan) -> Tensor:
    """(B, T, D) with each record, or each row where the channel says so, within the clip; float32, differentiable.

    Raises:
        CheckFailed: SS-1510 for NaN or infinity.
    """
    return clip_tokens(rows, channel.clip) if channel.per_row else clip_sequence(rows, channel.clip)


def noised(rows: Tensor, channel: ChannelPlan, codec: Codec) -> tuple[bytes, ...]:
    """Each record's clipped rows as they will leave.

    Args:
        rows: (B, T, D), of :func:`clipped`.
        channel: clip and sigma.
        codec: type on the wire.

    Returns:
        One record each: little-endian, C order. A fresh draw in every call.
    """
    if not len(rows):
        return ()
    rows, step = rows.detach(), step_for(channel.sigma)
    parts = rows.flatten(0, 1) if channel.per_row else rows
    steps = torch.stack([quantise_like(part, step, channel.clip) for part in parts]).reshape(rows.shape)
    values = ((steps + discrete_gaussian_like(steps)).double() * step).float().cpu().numpy()
    return tuple(encode(record, codec) for record in values)


def encode(rows: np.ndarray[tuple[int, ...], np.dtype[np.float32]], codec: Codec) -> bytes:
    """Rows in the wire's type."""
    if codec == "f32":
        return rows.astype("<f4").tobytes()
    words = torch.from_numpy(np.ascontiguousarray(rows)).to(torch.bfloat16).view(torch.int16).numpy()
    return words.astype("<i2").tobytes()
