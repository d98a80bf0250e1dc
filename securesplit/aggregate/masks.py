"""Masks: AES-256-CTR key streams added to, and taken from, a vector of 32-bit words in place.

Every key is used for one stream only (keys.py gives each use its own label), so the counter starts at zero. The words
are little-endian. Work goes chunk by chunk over all streams: one chunk of the vector stays in the cache while every
stream passes over it (256 KiB measured best; secure-aggregation.md 4.4).

What this does not protect: a mask hides a vector only while its key is secret; masks give no integrity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from securesplit.aggregate.fixedpoint import Words

__all__ = ["add_streams"]

_CHUNK = 256 * 1024
_ZEROS = memoryview(bytes(_CHUNK))
_FIRST_BLOCK = bytes(16)


def add_streams(vector: Words, plus: Sequence[bytes] = (), minus: Sequence[bytes] = ()) -> None:
    """Add the streams of some keys to a vector and subtract those of others, mod 2^32, in place.

    Args:
        vector: (d,) uint32, contiguous, writable.
        plus, minus: 32-byte keys; a key may be used for one vector position and round only.
    """
    add = [Cipher(algorithms.AES256(key), modes.CTR(_FIRST_BLOCK)).encryptor() for key in plus]
    take = [Cipher(algorithms.AES256(key), modes.CTR(_FIRST_BLOCK)).encryptor() for key in minus]
    # update_into asks for one block more than it writes.
    buffer = bytearray(_CHUNK + 15)
    stream = np.frombuffer(buffer, dtype="<u4", count=_CHUNK // 4)
    for start in range(0, vector.size, _CHUNK // 4):
        part = vector[start : start + _CHUNK // 4]
        words, zeros = stream[: part.size], _ZEROS[: part.size * 4]
        for encryptor in add:
            encryptor.update_into(zeros, buffer)
            np.add(part, words, out=part)
        for encryptor in take:
            encryptor.update_into(zeros, buffer)
            np.subtract(part, words, out=part)
