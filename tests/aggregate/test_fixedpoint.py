"""The grid against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.aggregate.fixedpoint import open_ring, quantise, vector_digest
from securesplit.errors import AggregationAborted, LocalProtocolError

updates = st.lists(st.floats(-4, 4, allow_nan=False), min_size=1, max_size=20)


def exactly(x: float, weight: int, scale: int) -> int:
    """Rational arithmetic, clip 1.0; the product is rounded to a double once, as the specification says."""
    q = round(float(Fraction(max(-1.0, min(1.0, x))) * scale))
    return q * weight % 2**32


@settings(deadline=None, max_examples=150)
@given(values=updates, weight=st.integers(1, 255), scale=st.integers(1, 2**22))
def test_quantise_agrees_with_fractions(values, weight, scale):
    ring, clipped = quantise(np.array(values), weight, scale=scale, clip=1.0, w_max=255)
    assert ring.tolist() == [*(exactly(x, weight, scale) for x in values), weight]
    assert clipped == sum(abs(x) > 1 for x in values)


@settings(deadline=None, max_examples=100)
@given(values=updates, clip=st.floats(1e-3, 1e3), weight=st.integers(1, 255))
def test_one_clients_vector_opens_to_its_clipped_update_within_half_a_step(values, clip, weight):
    scale = 2**20
    ring, _ = quantise(np.array(values), weight, scale=scale, clip=clip, w_max=255)
    opened = open_ring(ring, ("a",), scale=scale, clip=clip, w_max=255)
    np.testing.assert_allclose(opened.mean, np.clip(values, -clip, clip), rtol=0, atol=clip / scale * 0.5000001)
    assert opened.total_weight == weight


def test_the_extreme_sum_does_not_wrap():
    n, w_max = 8, 255
    scale = (2**31 - 1) // (n * w_max)
    for sign in (1.0, -1.0):
        ring = np.zeros(2, dtype=np.uint32)
        for _ in range(n):
            ring += quantise(np.array([sign * 9]), w_max, scale=scale, clip=1.0, w_max=w_max)[0]
        opened = open_ring(ring, tuple("abcdefgh"), scale=scale, clip=1.0, w_max=w_max)
        assert opened.mean.tolist() == [sign]


@pytest.mark.parametrize("weight", [0, -1, 256])
def test_a_weight_out_of_range_is_refused_not_clipped(weight):
    with pytest.raises(LocalProtocolError) as error:
        quantise(np.zeros(2), weight, scale=10, clip=1.0, w_max=255)
    assert error.value.code == "SS-6011"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    with pytest.raises(LocalProtocolError) as error:
        quantise(np.array([0.0, value]), 1, scale=10, clip=1.0, w_max=255)
    assert error.value.code == "SS-6011"
    assert "nan" not in str(error.value)


def test_a_huge_update_over_a_tiny_clip_is_clipped_not_lost():
    ring, clipped = quantise(np.array([1e308]), 1, scale=10, clip=1e-3, w_max=1)
    assert (ring.tolist(), clipped) == ([10, 1], 1)


@pytest.mark.parametrize("ring", [[0, 0], [0, 511], [0, 1], [2**31, 10], [101, 10], [2**32 - 101, 10]])
def test_an_impossible_sum_is_refused(ring):
    with pytest.raises(AggregationAborted) as error:
        open_ring(np.array(ring, dtype=np.uint32), ("a", "b"), scale=10, clip=1.0, w_max=255)
    assert error.value.code == "SS-6011"


def test_the_digest_is_over_little_endian_words():
    import hashlib

    assert vector_digest(np.array([1, 258], dtype=np.uint32)) == hashlib.sha256(b"\x01\0\0\0\x02\x01\0\0").digest()
