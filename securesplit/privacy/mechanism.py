"""The mechanism itself, as functions: clip, lattice, noise, wire type. Nothing is decided, charged or remembered here.

Rows stay on their own device until they are noised. Scaling and casting come after the noise and cost nothing.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from securesplit.privacy.clip import clip_sequence, clip_tokens
from securesplit.privacy.lattice import discrete_gaussian_like, quantise_like, step_for
from securesplit.privacy.plan import ChannelPlan
from securesplit.privacy.released import Codec

Rows = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
_STEPS, _SMALLEST, _LARGEST = 127, 2.0**-126, 2.0**120  # The largest byte of int8, and the range of its scales.


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


def encode(rows: Rows, codec: Codec) -> bytes:
    """Rows (..., T, D) in the wire's type. What has to be noised is noised before.

    Raises:
        ValueError: for NaN or infinity under ``int8``, which has neither.
    """
    if codec == "f32":
        return rows.astype("<f4", copy=False).tobytes()
    if codec == "int8":
        return _int8(rows)
    words = torch.from_numpy(np.ascontiguousarray(rows)).to(torch.bfloat16).view(torch.int16).numpy()
    return words.astype("<i2").tobytes()


def _int8(rows: Rows) -> bytes:
    """Each row as its scale, max|row| / 127 in float32, and the nearest multiples of it, ties to even.

    A row below 127 * 2^-126 is zeros, because a smaller scale could not be a normal float32; numbers beyond 127 * 2^120
    become that. The quotient in float64 rounds as the exact one does. securesplit/protocol/int8.py reads it.
    """
    flat = np.ascontiguousarray(rows, dtype=np.float32).reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
    peaks = np.abs(flat).max(axis=1, initial=0)
    if not bool(np.isfinite(peaks).all()):
        raise ValueError("int8 has neither NaN nor infinity")
    scales = np.minimum(peaks / np.float32(_STEPS), np.float32(_LARGEST)).astype("<f4")
    scales[scales < _SMALLEST] = 0
    steps = np.divide(flat, scales[:, None], out=np.zeros(flat.shape), where=scales[:, None] > 0, dtype=np.float64)
    np.clip(np.rint(steps, out=steps), -_STEPS, _STEPS, out=steps)
    table = np.empty((len(flat), scales.itemsize + flat.shape[1]), dtype=np.uint8)
    table[:, : scales.itemsize] = scales[:, None].view(np.uint8)
    table[:, scales.itemsize :] = steps.astype(np.int8).view(np.uint8)
    return table.tobytes()
