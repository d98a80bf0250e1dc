"""The public code: unit norm whatever comes in, and the deep rows' directions before the loudest ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.model.distil import SequenceCode, fit_sequence_code


def rows(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, width)))


def test_without_deep_rows_it_is_principal_components() -> None:
    public = rows(200, 6, 1) * torch.tensor([9.0, 4, 3, 2, 1, 0.5])
    code = fit_sequence_code(public, None, 2, power=1.0)
    mixed = (public - public.mean(0)).numpy() / public.numpy().std(0)
    leading = np.linalg.eigh(np.cov(mixed.T))[1][:, -2:]
    got = np.linalg.qr(code.axes.numpy())[0]
    assert np.linalg.norm(leading.T @ got) == pytest.approx(math.sqrt(2), abs=1e-6)  # The same plane.


def test_deep_rows_choose_the_quiet_direction_that_they_depend_on() -> None:
    shared, private = rows(2000, 1, 2), rows(2000, 4, 3)
    loud = shared @ torch.ones(1, 4, dtype=torch.float64) + 0.3 * private  # Four columns that say one thing.
    quiet = rows(2000, 1, 4)
    shallow, deep = torch.cat([loud, quiet], 1), quiet @ rows(1, 7, 5) + 0.1 * rows(2000, 7, 6)

    def seen(code: SequenceCode) -> float:
        axis = code.encode(shallow)[:, 0] / code.encode(shallow)[:, 1]  # Undo the norm: axis over constant.
        return abs(float(np.corrcoef(axis.numpy(), quiet[:, 0].numpy())[0, 1]))

    assert seen(fit_sequence_code(shallow, deep, 1)) > 0.95
    assert seen(fit_sequence_code(shallow, None, 1)) < 0.2


@given(
    record=st.lists(st.floats(-1e30, 1e30, allow_nan=False), min_size=4, max_size=4),
    power=st.floats(0, 1),
)
@settings(deadline=None, max_examples=60)
def test_every_code_has_norm_one(record: list[float], power: float) -> None:
    code = fit_sequence_code(rows(50, 4, 7), rows(50, 3, 8), 2, power=power)
    codes = code.encode(torch.tensor([record]))
    assert codes.shape == (1, code.width) == (1, 3)
    assert float(torch.linalg.vector_norm(codes)) == pytest.approx(1, abs=1e-12)


def test_the_second_moment_is_the_codes_own() -> None:
    public = rows(30, 4, 9)
    code = fit_sequence_code(public, None, 3)
    codes = code.encode(public).numpy()
    np.testing.assert_allclose(code.second_moment(public).numpy(), sum(np.outer(c, c) for c in codes) / 30, atol=1e-12)
    assert float(code.second_moment(public).trace()) == pytest.approx(1)


def test_a_constant_column_does_no_harm() -> None:
    public = rows(40, 3, 10)
    public[:, 1] = 5.0
    assert torch.isfinite(fit_sequence_code(public, None, 2).encode(public)).all()


def test_impossible_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="same texts"):
        fit_sequence_code(rows(5, 3, 1), rows(4, 3, 1), 1)
    for rank in (0, 4):
        with pytest.raises(ValueError, match="axes"):
            fit_sequence_code(rows(5, 3, 1), None, rank)
    with pytest.raises(ValueError, match="axes"):
        fit_sequence_code(torch.ones(5, 3), None, 1)
