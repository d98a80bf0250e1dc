"""The grid against exact fractions."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.aggregate.fixedpoint import open_ring, quantise, vector_digest, word_type
from securesplit.errors import AggregationAborted, LocalProtocolError

PIECE = 1 << 15  # Coordinates at a time; sizes around it must not matter.

updates = st.lists(st.floats(-4, 4, allow_nan=False), min_size=1, max_size=20)
rings = st.sampled_from([(32, 2**22), (64, 2**40)])


def exactly(x: float, weight: int, scale: int, bits: int) -> int:
    """Rational arithmetic, clip 1.0; the product is rounded to a double once, as the specification says."""
    q = round(float(Fraction(max(-1.0, min(1.0, x))) * scale))
    return q * weight % 2**bits


@settings(deadline=None, max_examples=150)
@given(values=updates, weight=st.integers(1, 255), ring=rings, part=st.floats(0, 1))
def test_quantise_agrees_with_fractions(values, weight, ring, part):
    bits, most = ring
    scale = 1 + int(part * (most - 1))
    words, clipped = quantise(np.array(values), weight, scale=scale, clip=1.0, w_max=255, bits=bits)
    assert words.dtype == word_type(bits) == f"u{bits // 8}"
    assert words.tolist() == [*(exactly(x, weight, scale, bits) for x in values), weight]
    assert clipped == sum(abs(x) > 1 for x in values)


@settings(deadline=None, max_examples=150)
@given(
    values=st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=20),
    clip=st.floats(1e-3, 8),
    scale=st.integers(1, 2**40),
    weight=st.integers(1, 2**16),
)
def test_at_any_scale_up_to_2_40_the_rounding_costs_half_a_step_and_no_more(values, clip, scale, weight):
    """Against rationals alone: the step is off the true quotient by at most 1/2 + 2^-12, and the product is exact."""
    words, _ = quantise(np.array(values, dtype=np.float32), weight, scale=scale, clip=clip, w_max=2**16, bits=64)
    for word, x in zip(words[:-1].astype(np.int64).tolist(), values, strict=True):
        assert word % weight == 0
        true = max(Fraction(-1), min(Fraction(1), Fraction(x) / Fraction(clip))) * scale
        assert abs(word // weight - true) <= Fraction(1, 2) + Fraction(1, 2**12)


@settings(deadline=None, max_examples=100)
@given(values=updates, clip=st.floats(1e-3, 1e3), weight=st.integers(1, 255), bits=st.sampled_from([32, 64]))
def test_one_clients_vector_opens_to_its_clipped_update_within_half_a_step(values, clip, weight, bits):
    scale = 2**20 if bits == 32 else 2**38
    ring, _ = quantise(np.array(values), weight, scale=scale, clip=clip, w_max=255, bits=bits)
    opened = open_ring(ring, ("a",), scale=scale, clip=clip, w_max=255)
    np.testing.assert_allclose(opened.mean, np.clip(values, -clip, clip), rtol=1e-12, atol=clip / scale * 0.5000001)
    assert opened.total_weight == weight
    assert opened.mean.dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("size", [1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 5])
def test_pieces_leave_no_seam(size, bits, dtype):
    """Both directions of one long vector are those of its coordinates one by one."""
    update = (np.sin(np.arange(size)) * 1.2).astype(dtype)
    ring, clipped = quantise(update, 3, scale=1000, clip=1.0, w_max=7, bits=bits)
    assert clipped == sum(abs(x) > 1 for x in update.tolist())
    want = [round(max(-1.0, min(1.0, x)) * 1000) * 3 for x in update.tolist()]
    assert ring.tolist() == [*(w % 2**bits for w in want), 3]
    opened = open_ring(ring, ("a",), scale=1000, clip=1.0, w_max=7)
    assert opened.mean.tolist() == [w * 1.0 / 3000 for w in want]
    assert opened.ring_sum is ring
    covered = []
    for at, part in opened.pieces():
        assert part.tolist() == [w * 1.0 / 3000 for w in want[at]]
        covered.extend(range(at.start, at.stop))
    assert covered == list(range(size))


@pytest.mark.parametrize("bits", [32, 64])
def test_the_extreme_sum_does_not_wrap(bits):
    n, w_max = 8, 255
    scale = min(2**40, (2 ** (bits - 1) - 1) // (n * w_max))
    for sign in (1.0, -1.0):
        ring = np.zeros(2, dtype=word_type(bits))
        for _ in range(n):
            ring += quantise(np.array([sign * 9]), w_max, scale=scale, clip=1.0, w_max=w_max, bits=bits)[0]
        opened = open_ring(ring, tuple("abcdefgh"), scale=scale, clip=1.0, w_max=w_max)
        assert opened.mean.tolist() == [sign]


@pytest.mark.parametrize("weight", [0, -1, 256])
def test_a_weight_out_of_range_is_refused_not_clipped(weight):
    with pytest.raises(LocalProtocolError) as error:
        quantise(np.zeros(2), weight, scale=10, clip=1.0, w_max=255)
    assert error.value.code == "SS-6011"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("at", [0, PIECE - 1, PIECE, PIECE + 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(value, at, dtype):
    update = np.zeros(PIECE + 2, dtype=dtype)
    update[at] = value
    with pytest.raises(LocalProtocolError) as error:
        quantise(update, 1, scale=10, clip=1.0, w_max=255)
    assert error.value.code == "SS-6011"
    assert "nan" not in str(error.value)


def test_a_huge_update_over_a_tiny_clip_is_clipped_not_lost():
    ring, clipped = quantise(np.array([1e308]), 1, scale=10, clip=1e-3, w_max=1)
    assert (ring.tolist(), clipped) == ([10, 1], 1)


def test_an_update_is_left_as_it_was():
    update = np.linspace(-2, 2, 9)
    before = update.copy()
    quantise(update, 2, scale=10, clip=1.0, w_max=2)
    assert np.array_equal(update, before)
    update.setflags(write=False)
    quantise(update, 2, scale=10, clip=1.0, w_max=2)


IMPOSSIBLE = [([0], 0), ([0], 511), ([0], 1), ([2**31], 10), ([101], 10), ([-101], 10)]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(("values", "total"), [*IMPOSSIBLE, ([0] * PIECE + [101], 10), ([0] * PIECE + [-101], 10)])
def test_an_impossible_sum_is_refused(values, total, bits):
    ring = np.array([v % 2**bits for v in (*values, total)], dtype=word_type(bits))
    with pytest.raises(AggregationAborted) as error:
        open_ring(ring, ("a", "b"), scale=10, clip=1.0, w_max=255)
    assert error.value.code == "SS-6011"


@pytest.mark.parametrize("bits", [32, 64])
def test_a_sum_at_the_very_end_of_its_range_is_opened(bits):
    ring = np.array([100, -100 % 2**bits, 10], dtype=word_type(bits))
    assert open_ring(ring, ("a", "b"), scale=10, clip=0.5, w_max=255).mean.tolist() == [0.5, -0.5]


def test_a_sum_that_belongs_to_a_message_is_opened_without_writing_to_it():
    ring = np.frombuffer(np.array([5, 10], dtype="<u4").tobytes(), dtype="<u4")
    assert open_ring(ring, ("a", "b"), scale=10, clip=1.0, w_max=255).mean.tolist() == [0.05]


@settings(deadline=None, max_examples=100)
@given(
    words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6),
    total=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([32, 64]),
)
def test_in_silence_every_sum_is_brought_into_its_range(words, total, bits):
    ring = np.array([w % 2**bits for w in (*words, total)], dtype=word_type(bits))
    opened = open_ring(ring, ("a", "b"), scale=10, clip=0.25, w_max=255, silent=True)
    weight = min(max(total, 2), 510)
    bounded = [min(max(w, -10 * weight), 10 * weight) for w in words]
    assert opened.total_weight == weight
    assert opened.mean.tolist() == [w * 0.25 / (10 * weight) for w in bounded]
    assert opened.ring_sum.tolist() == [*(w % 2**bits for w in bounded), weight]


def test_the_digest_is_over_little_endian_words():
    for bits, data in ((32, b"\x01\0\0\0\x02\x01\0\0"), (64, b"\x01" + bytes(7) + b"\x02\x01" + bytes(6))):
        vector = np.array([1, 258], dtype=word_type(bits))
        assert vector_digest(vector) == hashlib.sha256(data).digest()
        assert vector_digest(vector.astype(vector.dtype.newbyteorder(">"))) == hashlib.sha256(data).digest()
        strided = np.array([1, 7, 258, 7], dtype=word_type(bits))[::2]
        assert vector_digest(strided) == hashlib.sha256(data).digest()
    assert vector_digest(np.array([1, 2], dtype=np.uint8)) == hashlib.sha256(b"\x01\x02").digest()
