"""Clipping as a sensitivity bound, checked in exact arithmetic on whatever floats there are."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from securesplit.errors import CheckFailed
from securesplit.privacy.clip import clip_sequence, clip_tokens, refuse_non_finite

BOUNDS = st.sampled_from([1e-3, 0.1, 1.0, 3.0, 600.0]) | st.floats(1e-6, 1e9)
EXTREMES = st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 1e-30, 1e30, -1e30, 3.4e38, 1.0, -1.0, 0.6, 0.8])
WIDE = st.floats(allow_nan=False, allow_infinity=False, width=32) | EXTREMES.map(np.float32)
HALF = st.floats(-65504, 65504, width=16)
SHAPES = st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(1, 5))


@st.composite
def tensors(draw):
    """(B, T, D) of any float type, extremes included."""
    shape, kind = draw(SHAPES), draw(st.sampled_from(["f16", "bf16", "f32", "f64"]))
    match kind:
        case "f16":
            return torch.from_numpy(draw(arrays.arrays(np.float16, shape, elements=HALF)))
        case "f64":
            return torch.from_numpy(draw(arrays.arrays(np.float64, shape, elements=st.floats(-1e300, 1e300))))
        case _:
            made = torch.from_numpy(draw(arrays.arrays(np.float32, shape, elements=WIDE)))
            return made.bfloat16() if kind == "bf16" and bool(made.bfloat16().isfinite().all()) else made


def exact_square(rows: torch.Tensor) -> Fraction:
    """The squared L2 norm of all entries, without rounding."""
    return sum((Fraction(float(x)) ** 2 for x in rows.flatten()), Fraction(0))


@given(hidden=tensors(), bound=BOUNDS)
@settings(max_examples=200, deadline=None)
def test_no_sequence_is_longer_than_the_bound_in_exact_arithmetic(hidden, bound):
    clipped = clip_sequence(hidden, bound)
    assert clipped.dtype == torch.float32
    assert clipped.shape == hidden.shape
    for sequence in clipped:
        assert exact_square(sequence) <= Fraction(bound) ** 2


@given(hidden=tensors(), bound=BOUNDS)
@settings(max_examples=150, deadline=None)
def test_no_row_is_longer_than_the_bound_in_exact_arithmetic(hidden, bound):
    for row in clip_tokens(hidden, bound).flatten(0, 1):
        assert exact_square(row) <= Fraction(bound) ** 2


@given(bound=BOUNDS, data=st.data())
@settings(max_examples=100, deadline=None)
def test_replacing_a_sequence_moves_the_result_by_at_most_2c(bound, data):
    shape = (1, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    one, other = (
        clip_sequence(torch.from_numpy(data.draw(arrays.arrays(np.float32, shape, elements=WIDE))), bound) for _ in "ab"
    )
    gap = sum(
        (Fraction(float(x)) - Fraction(float(y))) ** 2 for x, y in zip(one.flatten(), other.flatten(), strict=True)
    )
    assert gap <= (2 * Fraction(bound)) ** 2


def test_2c_is_reached():
    away = clip_sequence(torch.full((1, 4, 4), 9.0), 1.0)
    back = clip_sequence(torch.full((1, 4, 4), -9.0), 1.0)
    assert float((away - back).norm()) == pytest.approx(2.0, rel=1e-6)


@given(hidden=arrays.arrays(np.float32, (2, 3, 4), elements=st.floats(-1e4, 1e4, width=32)), bound=st.floats(0.1, 1e3))
@settings(max_examples=100, deadline=None)
def test_direction_is_kept_and_short_sequences_stay_as_they_are(hidden, bound):
    clipped = clip_sequence(torch.from_numpy(hidden), bound).numpy().astype(np.float64)
    for before, after in zip(hidden.astype(np.float64), clipped, strict=True):
        norm = np.linalg.norm(before)
        if norm <= bound * (1 - 1e-6):
            assert np.array_equal(after, before)
        else:
            assert np.allclose(after, before * bound / norm, rtol=1e-6, atol=bound * 1e-6)


KNOWN = [
    ([3.0, 4.0], 1.0, [0.6, 0.8]),
    ([0.3, 0.4], 1.0, [0.3, 0.4]),
    ([0.0, 0.0], 1.0, [0.0, 0.0]),
    ([1e30, 1e30], 1.0, [0.7071067811865476, 0.7071067811865476]),
    ([1e-30, 0.0], 1.0, [1e-30, 0.0]),
    ([2e19, 2e19], 1.0, [0.7071067811865476, 0.7071067811865476]),
]


@pytest.mark.parametrize(("row", "bound", "expected"), KNOWN)
def test_known_answers(row, bound, expected):
    for clip in (clip_sequence, clip_tokens):
        assert clip(torch.tensor([[row]]), bound)[0, 0].tolist() == pytest.approx(expected, rel=1e-6)


def test_half_precision_that_overflows_in_its_own_type_is_clipped():
    hidden = torch.full((1, 8, 8), 60000.0, dtype=torch.float16)
    assert torch.isinf(torch.linalg.vector_norm(hidden))  # what a norm in half precision would say
    assert clip_sequence(hidden, 1.0).tolist() == pytest.approx(np.full((1, 8, 8), 0.125), rel=1e-6)


def test_the_bound_covers_the_sequence_and_not_the_row_or_the_batch():
    hidden = torch.full((3, 4, 1), 1.0)
    assert clip_sequence(hidden, 1.0).square().sum((1, 2)).tolist() == pytest.approx([1.0] * 3, rel=1e-5)
    assert clip_tokens(hidden, 1.0).square().sum((1, 2)).tolist() == pytest.approx([4.0] * 3, rel=1e-5)
    apart = clip_sequence(torch.cat([hidden[:1], hidden[1:] * 1e20]), 1.0)
    assert torch.equal(apart[0], clip_sequence(hidden[:1], 1.0)[0])  # a record's neighbours in the batch change nothing


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_non_finite_entries_are_refused_wherever_they_stand(bad, dtype):
    for place in (0, 5, 11):
        hidden = torch.zeros(1, 3, 4, dtype=dtype)
        hidden.view(-1)[place] = bad
        for call in (lambda h: clip_sequence(h, 1.0), lambda h: clip_tokens(h, 1.0), refuse_non_finite):
            with pytest.raises(CheckFailed) as caught:
                call(hidden)
            assert caught.value.code == "SS-1510"
            assert str(place) not in caught.value.what


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_bounds_nothing_is_refused(bound):
    with pytest.raises(ValueError, match="bound"):
        clip_sequence(torch.ones(1, 1, 1), bound)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_stays_nothing(shape):
    assert clip_sequence(torch.zeros(shape), 1.0).shape == shape
    assert clip_tokens(torch.zeros(shape), 1.0).shape == shape


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_the_gradient_is_that_of_the_projection(scale):
    torch.manual_seed(1)
    hidden = (torch.randn(2, 3, 4, dtype=torch.float64) * scale).requires_grad_()
    weights = torch.randn(2, 3, 4, dtype=torch.float64)
    (clip_sequence(hidden, 1.0).double() * weights).sum().backward()
    for row, weight, got in zip(hidden.detach(), weights, hidden.grad, strict=True):
        norm = row.norm()
        # d/dx of x / ||x||: the part of w across x, over the norm.
        across = weight - row * (row * weight).sum() / norm**2
        expected = weight if norm <= 1 else across / norm
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e30])
def test_the_gradient_is_finite_at_the_extremes(value):
    hidden = torch.full((2, 3, 4), value, requires_grad=True)
    clip_sequence(hidden, 1.0).sum().backward()
    assert bool(hidden.grad.isfinite().all())
