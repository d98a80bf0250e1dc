"""Words of a secure sum, and frames of encrypted ones, as blobs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from securesplit.protocol.messages import ITEM_BYTES, Blob

__all__ = ["Vector", "vector_of", "words_blob"]

Vector = npt.NDArray[np.uint32 | np.uint64] | npt.NDArray[np.uint8]

_NAMES = {np.dtype(f"u{ITEM_BYTES[name]}"): name for name in ("u8", "u32", "u64")}


def words_blob(vector: Vector | None) -> Blob:
    """A blob of a vector's words, little-endian; an empty one of ``u32`` for None."""
    if vector is None:
        return Blob(dtype="u32", shape=(0,), data=b"")
    name = _NAMES[vector.dtype]
    data = vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()
    return Blob(dtype=name, shape=(len(vector),), data=data)


def vector_of(blob: Blob) -> Vector | None:
    """The words of a blob, read-only and without a copy; None for an empty one."""
    if blob.shape == (0,):
        return None
    vector: Vector = np.frombuffer(blob.data, dtype=f"<u{ITEM_BYTES[blob.dtype]}")
    return vector
