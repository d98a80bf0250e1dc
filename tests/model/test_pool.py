"""Pooling against a plain loop; the shape hides the length; padding never enters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.model.pool import Pooling, pool_rows

WAYS: tuple[Pooling, ...] = ("mean", "last", "max")


def by_hand(rows: list[list[float]], vectors: int, how: Pooling) -> list[list[float]]:
    """One sequence's real rows, without tensors."""
    pooled = []
    for i in range(vectors):
        start, stop = i * len(rows) // vectors, math.ceil((i + 1) * len(rows) / vectors)
        columns = list(zip(*rows[start:stop], strict=True))
        if how == "mean":
            pooled.append([sum(column) / len(column) for column in columns])
        elif how == "max":
            pooled.append([max(column) for column in columns])
        else:
            pooled.append([column[-1] for column in columns])
    return pooled


@pytest.mark.parametrize("how", WAYS)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_equals_a_plain_loop(how: Pooling, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    vectors = data.draw(st.integers(1, 6))
    width = max(lengths) + data.draw(st.integers(0, 3))
    hidden = torch.randn(len(lengths), width, 3, dtype=torch.float64)
    pooled = pool_rows(hidden, lengths, how, vectors)
    assert pooled.shape == (len(lengths), vectors, 3)
    for row, (rows, length) in enumerate(zip(hidden, lengths, strict=True)):
        expected = torch.tensor(by_hand(rows[:length].tolist(), vectors, how), dtype=torch.float64)
        torch.testing.assert_close(pooled[row], expected)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("filler", [0.0, 1e30, float("nan"), float("inf"), float("-inf")])
def test_padding_never_enters(how: Pooling, filler: float) -> None:
    hidden = torch.randn(2, 6, 4)
    clean = pool_rows(hidden[:, :4], [4, 3], how, 2)
    hidden[:, 4:] = filler
    hidden[1, 3] = filler
    torch.testing.assert_close(pool_rows(hidden, [4, 3], how, 2), clean)


@pytest.mark.parametrize("how", WAYS)
def test_a_fault_in_a_real_row_is_not_hidden(how: Pooling) -> None:
    hidden = torch.zeros(1, 3, 2)
    hidden[0, 2, 0] = float("nan")
    assert torch.isnan(pool_rows(hidden, [3], how)).any()  # The gate refuses it (SS-1510).


def test_the_shape_says_nothing_of_the_length() -> None:
    shapes = {pool_rows(torch.randn(1, 50, 8), [length], "mean", 4).shape for length in (1, 3, 7, 50)}
    assert shapes == {torch.Size([1, 4, 8])}


@pytest.mark.parametrize("how", WAYS)
def test_gradients_reach_real_rows_alone(how: Pooling) -> None:
    hidden = torch.randn(1, 5, 2, requires_grad=True)
    pool_rows(hidden, [3], how).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[0, :3].abs().sum() > 0
    assert hidden.grad[0, 3:].abs().sum() == 0


@pytest.mark.parametrize(
    ("lengths", "vectors"), [([3], 1), ([0, 2], 1), ([3, 6], 1), ([3, 2], 0), ([3, -1], 1), ([1, 2, 3], 1)]
)
def test_lengths_that_do_not_fit_are_refused(lengths: list[int], vectors: int) -> None:
    with pytest.raises(ValueError, match="lengths"):
        pool_rows(torch.zeros(2, 5, 2), lengths, "mean", vectors)
