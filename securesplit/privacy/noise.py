"""Gaussian noise from a cryptographic generator. Never from torch's or NumPy's.

Each call takes a fresh 32-byte key from the operating system, expands it with ChaCha20, and forgets it: no seed can
reproduce the noise, no fork or checkpoint can repeat it, and ``torch.manual_seed`` does not touch it. Production code
has no way to pass a key in; tests replace :func:`_fresh_key`.

Each sample is the sum of four Box-Muller values divided by two (Holohan and Braghin 2021, arXiv:2107.10138), so that
the float64 grid of one value cannot be read back from the sum's low bits. What this does not give: an exact proof for
floating point. A discrete Gaussian on a lattice does, and replaces this file's sampler when it lands.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

_TERMS = 4


def _fresh_key() -> bytes:
    return os.urandom(32)


def _words(key: bytes, count: int) -> npt.NDArray[np.uint64]:
    stream = Cipher(algorithms.ChaCha20(key, b"\0" * 16), mode=None).encryptor().update(bytes(8 * count))
    return np.frombuffer(stream, dtype="<u8")


def gaussian(shape: tuple[int, ...], sigma: float) -> npt.NDArray[np.float64]:
    """Independent samples of N(0, sigma^2).

    Args:
        shape: of the result.
        sigma: standard deviation, positive and finite.

    Returns:
        float64 array.
    """
    if not 0 < sigma < float("inf"):
        raise ValueError("sigma must be positive and finite")
    count = int(np.prod(shape))
    pairs = (count + 1) // 2
    words = _words(_fresh_key(), 2 * _TERMS * pairs).reshape(2, _TERMS, pairs)
    # 53 random bits and a half: uniform on (0, 1), never 0, so the logarithm is finite.
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2 * np.log(uniform[0]))
    angle = 2 * np.pi * uniform[1]
    both = np.concatenate([(radius * np.cos(angle)).sum(axis=0), (radius * np.sin(angle)).sum(axis=0)])
    samples: npt.NDArray[np.float64] = both[:count] * (sigma / np.sqrt(_TERMS))
    return samples.reshape(shape)
