"""What encode writes under int8, against exact fractions: the nearest multiples of max|row| / 127, and one spelling of them."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from securesplit.privacy.mechanism import encode

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = arrays.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 6)), elements=FLOATS)
ALIKE = arrays.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 6)), elements=st.floats(-8, 8, width=32))
HALVES = st.lists(st.integers(-254, 254).map(lambda n: n / 2), min_size=1, max_size=8)


def parts(data: bytes, width: int) -> list[tuple[float, tuple[int, ...]]]:
    """Scale and steps of every row."""
    found = [struct.unpack_from(f"<f{width}b", data, at) for at in range(0, len(data), 4 + width)]
    return [(scale, steps) for scale, *steps in found]


def nearest(quotient: Fraction) -> int:
    """The nearest integer, ties to even; Python's own."""
    return round(quotient)


@given(rows=ROWS | ALIKE)
@settings(max_examples=300, deadline=None)
def test_every_row_is_the_nearest_multiples_of_its_scale(rows):
    data, width = encode(rows, "int8"), rows.shape[1]
    assert len(data) == len(rows) * (4 + width)
    for row, (scale, steps) in zip(rows.tolist(), parts(data, width), strict=True):
        peak = max(map(abs, row))
        wanted = float(np.float32(peak) / np.float32(127))
        if wanted < 2.0**-126:
            assert struct.pack("<f", scale) == bytes(4)
            assert not any(steps)
            continue
        assert scale == min(wanted, 2.0**120)
        assert max(map(abs, steps)) == 127
        exact = [Fraction(value) / Fraction(scale) for value in row]
        assert list(steps) == [max(-127, min(127, nearest(q))) for q in exact]
        if wanted <= 2.0**120:
            # The largest quotient may exceed 127 by the rounding of the scale, and by no more.
            slack = 127 * Fraction(1, 1 << 23)
            assert all(abs(q - step) <= Fraction(1, 2) + slack for q, step in zip(exact, steps, strict=True))
            assert all(abs(q - step) <= Fraction(1, 2) for q, step in zip(exact, steps, strict=True) if abs(step) < 127)


@given(halves=HALVES)
@settings(max_examples=100, deadline=None)
def test_ties_go_to_even(halves):
    data = encode(np.array([[*halves, 127.0]], dtype=np.float32), "int8")
    ((scale, steps),) = parts(data, len(halves) + 1)
    assert scale == 1.0
    assert list(steps) == [*(round(half) for half in halves), 127]


@given(rows=ALIKE)
@settings(max_examples=100, deadline=None)
def test_a_row_depends_on_no_other_and_rows_stand_one_after_another(rows):
    assert encode(rows, "int8") == b"".join(encode(row[None], "int8") for row in rows)
    assert encode(rows[None], "int8") == encode(rows, "int8")
    assert encode(np.asfortranarray(rows), "int8") == encode(rows, "int8")


def test_the_ends_of_the_range():
    largest, tiny = np.finfo(np.float32).max, np.float32(127 * 2.0**-126)
    cases = {
        "nothing": ([0.0, -0.0], (0.0, [0, 0])),
        "the smallest scale": ([tiny, -tiny / 127], (2.0**-126, [127, -1])),
        "below it": ([np.nextafter(tiny, np.float32(0)), 0.0], (0.0, [0, 0])),
        "subnormal": ([1e-45, 0.0], (0.0, [0, 0])),
        "the largest scale": ([-127 * 2.0**120, 2.0**120], (2.0**120, [-127, 1])),
        "beyond it": ([largest, -largest], (2.0**120, [127, -127])),
    }
    for name, (row, (scale, steps)) in cases.items():
        ((found, given_steps),) = parts(encode(np.array([row], dtype=np.float32), "int8"), 2)
        assert struct.pack("<f", found) == struct.pack("<f", scale), name
        assert list(given_steps) == steps, name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_have_no_bytes(value):
    with pytest.raises(ValueError, match="neither NaN nor infinity"):
        encode(np.array([[1.0, 2.0], [0.0, value]], dtype=np.float32), "int8")


def test_the_other_codecs_are_what_they_were():
    rows = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    assert encode(rows, "f32") == struct.pack("<15f", *rows.ravel())
    words = torch.from_numpy(rows).bfloat16().view(torch.int16).numpy()
    assert encode(rows, "bf16") == struct.pack("<15h", *words.ravel())


def test_the_input_is_left_as_it_is():
    rows = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    kept = rows.copy()
    encode(rows, "int8")
    assert np.array_equal(rows, kept)
