"""Mask streams against the ciphers written out block by block: AES from its block cipher, ChaCha20 from RFC 8439."""

import struct
from functools import cache

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from securesplit.aggregate.masks import PRGS, add_streams

CHUNK = 128 * 1024
KEY = bytes(range(32))


def aes(key: bytes, index: int) -> bytes:
    """Block i is AES(key, i as 16 bytes big-endian)."""
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(index.to_bytes(16, "big"))


def chacha(key: bytes, index: int) -> bytes:
    """The block function of RFC 8439, 2.3, with a zero nonce."""
    start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), index, 0, 0, 0]
    s = list(start)

    def quarter(a, b, c, d):
        for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = (s[x] + s[y]) & 0xFFFFFFFF
            s[z] ^= s[x]
            s[z] = (s[z] << turn | s[z] >> (32 - turn)) & 0xFFFFFFFF

    for _ in range(10):
        for i in range(4):
            quarter(i, i + 4, i + 8, i + 12)
        for i in range(4):
            quarter(i, (i + 1) % 4 + 4, (i + 2) % 4 + 8, (i + 3) % 4 + 12)
    return struct.pack("<16I", *((x + y) & 0xFFFFFFFF for x, y in zip(s, start, strict=True)))


BLOCK = {"aes256ctr": (aes, 16), "chacha20": (chacha, 64)}


@cache
def words(prg: str, key: bytes, count: int, size: int) -> list[int]:
    """The first words of a stream, little-endian, ``size`` bytes each."""
    block, length = BLOCK[prg]
    out = b"".join(block(key, i) for i in range(-(-count * size // length)))
    return [int.from_bytes(out[size * k : size * (k + 1)], "little") for k in range(count)]


def test_the_oracle_gives_the_block_of_rfc_8439():
    """Appendix A.1, test vector 1."""
    assert chacha(bytes(32), 0).hex().startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")


def test_every_stream_cipher_has_an_oracle():
    assert set(PRGS) == set(BLOCK)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("prg", PRGS)
def test_a_stream_is_its_cipher_from_counter_zero(prg, dtype):
    size = np.dtype(dtype).itemsize
    for count in (1, 3, 4, 5, 17):
        vector = np.zeros(count, dtype=dtype)
        add_streams(vector, [KEY], prg=prg)
        assert vector.tolist() == words(prg, KEY, count, size)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("prg", PRGS)
@pytest.mark.parametrize("beyond", [-1, 0, 1, CHUNK + 3])
def test_a_stream_goes_on_from_chunk_to_chunk(prg, dtype, beyond):
    block, length = BLOCK[prg]
    size = np.dtype(dtype).itemsize
    vector = np.zeros(CHUNK // size + beyond, dtype=dtype)
    add_streams(vector, [KEY], prg=prg)
    stream = vector.astype(f"<u{size}").tobytes()
    last = (len(stream) - 1) // length
    for index in {0, 1, CHUNK // length - 1, min(CHUNK // length, last), last}:
        assert stream[index * length : (index + 1) * length] == block(KEY, index)[: len(stream) - index * length]


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_streams_add_and_subtract_in_the_ring(dtype):
    a, b, c = (bytes([i]) * 32 for i in (1, 2, 3))
    n, size = 40_000, np.dtype(dtype).itemsize
    vector = np.arange(n, dtype=dtype)
    add_streams(vector, [a, b], [c])
    three = (words("aes256ctr", key, n, size) for key in (a, b, c))
    assert vector.tolist() == [(v + x + y - z) % 2 ** (8 * size) for v, x, y, z in zip(range(n), *three, strict=True)]
    add_streams(vector, [c], [b, a])
    assert vector.tolist() == list(range(n))


@pytest.mark.parametrize("size", [4, 8])
def test_words_are_the_same_where_integers_are_big_endian(size):
    other = np.arange(33_000, dtype=f">u{size}")
    ours = other.astype(f"<u{size}")
    for vector in (other, ours):
        add_streams(vector, [KEY], [bytes(32)])
    assert other.tolist() == ours.tolist()


def test_no_key_leaves_the_vector_alone():
    vector = np.arange(5, dtype=np.uint32)
    add_streams(vector)
    assert vector.tolist() == [0, 1, 2, 3, 4]
