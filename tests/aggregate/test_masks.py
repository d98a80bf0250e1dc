"""Mask streams against counter mode written out block by block from the AES block cipher."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from securesplit.aggregate.masks import add_streams


def words(key: bytes, count: int) -> list[int]:
    """Block i is AES(key, i as 16 bytes big-endian); words are little-endian."""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    out = b"".join(block.update(i.to_bytes(16, "big")) for i in range(-(-count // 4)))
    return [int.from_bytes(out[4 * k : 4 * k + 4], "little") for k in range(count)]


@pytest.mark.parametrize("size", [1, 3, 4, 5, 65_535, 65_536, 65_537, 131_075])
def test_a_stream_is_aes_256_in_counter_mode(size):
    key = bytes(range(32))
    vector = np.zeros(size, dtype=np.uint32)
    add_streams(vector, [key])
    assert vector.tolist() == words(key, size)


def test_streams_add_and_subtract_in_the_ring():
    a, b, c = (bytes([i]) * 32 for i in (1, 2, 3))
    vector = np.arange(70_000, dtype=np.uint32)
    add_streams(vector, [a, b], [c])
    n = vector.size
    want = [(v + x + y - z) % 2**32 for v, x, y, z in zip(range(n), words(a, n), words(b, n), words(c, n), strict=True)]
    assert vector.tolist() == want
    add_streams(vector, [c], [b, a])
    assert vector.tolist() == list(range(n))


def test_no_key_leaves_the_vector_alone():
    vector = np.arange(5, dtype=np.uint32)
    add_streams(vector)
    assert vector.tolist() == [0, 1, 2, 3, 4]
