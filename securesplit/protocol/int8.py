"""Rows under the codec ``int8``: row after row a float32 scale, little-endian, and one signed byte per coordinate.

A value is ``byte * scale``, rounded once to float32. Each row has exactly one acceptable scale for what it says: a scale is
a normal float32 from 2^-126 to 2^120 beside at least one byte of 127 or -127, or +0.0 beside zeros alone; -128 does not
occur. So what is decoded is always finite, and no row can be spelt with a scale that is minus zero, NaN, or subnormal.

The last axis of a tensor is its row. Whole rows stand together, so that the rows of one sequence are one block of bytes.
What is written here is read only: securesplit/privacy/mechanism.py writes it, after the noise.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["SCALE_BYTES", "check", "size", "values"]

SCALE_BYTES = 4
_SMALLEST, _LARGEST = (
    0x0080_0000,
    0x7B80_0000,
)  # The bits of 2^-126 and 2^120; positive floats are ordered as their bits.
_TOP = 127


def size(shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this shape, one to three axes."""
    return math.prod(shape[:-1]) * (SCALE_BYTES + shape[-1])


def check(data: bytes, shape: tuple[int, ...]) -> None:
    """Look at every scale and every byte; needs :func:`size` bytes.

    Raises:
        ValueError: a scale or a byte that no encoder writes.
    """
    scales, steps = _parts(data, shape)
    peaks = np.maximum(steps.max(axis=1, initial=0).astype(np.int16), -steps.min(axis=1, initial=0).astype(np.int16))
    bits = scales.view("<u4")  # Integers, because looking at a signalling NaN as a number is an event of its own.
    good = np.where(bits == 0, peaks == 0, (bits >= _SMALLEST) & (bits <= _LARGEST) & (peaks == _TOP))
    if not bool(good.all()):
        msg = "a scale or a byte that no row has"
        raise ValueError(msg)


def values(data: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The numbers of checked bytes, float32, of this shape; a new array."""
    scales, steps = _parts(data, shape)
    out: npt.NDArray[np.float32] = (steps.astype(np.float32) * scales[:, None]).reshape(shape)
    return out


def _parts(data: bytes, shape: tuple[int, ...]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Scales (rows,) and bytes (rows, D)."""
    rows = math.prod(shape[:-1])
    table = np.frombuffer(data, dtype=np.uint8).reshape(rows, SCALE_BYTES + shape[-1])
    scales = np.ascontiguousarray(table[:, :SCALE_BYTES]).view("<f4")[:, 0]
    return scales, table[:, SCALE_BYTES:].view(np.int8)
