"""Heads from noised moments against stacked least squares and NumPy simulations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.model.moments import Moments, fit_head, joint_statistic, sum_moments


def unit_rows(count: int, width: int, seed: int) -> torch.Tensor:
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@given(
    text=st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4).filter(lambda v: any(abs(x) > 1e-3 for x in v)),
    label=st.lists(st.floats(-1, 1), min_size=2, max_size=2),
)
@settings(deadline=None, max_examples=60)
def test_a_statistic_is_never_longer_than_one(text: list[float], label: list[float]) -> None:
    code = np.array([text]) / np.linalg.norm(text)
    target = np.array([label]) / max(1.0, float(np.linalg.norm(label)))
    statistic = joint_statistic(torch.from_numpy(code), torch.from_numpy(target))
    assert statistic.shape == (1, 1, 8)
    np.testing.assert_allclose(statistic[0, 0].numpy(), np.kron(code[0], target[0]), atol=1e-12)
    assert float(torch.linalg.vector_norm(statistic)) <= 1 + 1e-9


def test_text_and_label_together_move_it_by_two_at_most() -> None:
    codes = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    both = joint_statistic(codes, torch.tensor([[1.0], [-1.0]]))
    assert float(torch.linalg.vector_norm(both[0] - both[1])) == pytest.approx(2)


def test_a_long_target_is_refused() -> None:
    with pytest.raises(ValueError, match="norm at most 1"):
        joint_statistic(torch.ones(1, 1), torch.tensor([[1.5]]))
    with pytest.raises(ValueError, match="norm at most 1"):
        joint_statistic(torch.ones(2, 1), torch.ones(1, 1))


def test_a_sum_keeps_count_and_noise() -> None:
    released = torch.randn(5, 1, 6, dtype=torch.float64)
    moments = sum_moments(released, 2, 1.5)
    torch.testing.assert_close(moments.total, released.sum((0, 1)).reshape(3, 2))
    assert (moments.count, moments.noise) == (5, 5 * 1.5**2)
    rest = moments.without(sum_moments(released[:2], 2, 1.5))
    torch.testing.assert_close(rest.total, released[2:].sum((0, 1)).reshape(3, 2))
    assert (rest.count, rest.noise) == (3, pytest.approx(3 * 1.5**2))


def test_only_a_part_can_be_taken_out() -> None:
    small, large = sum_moments(torch.ones(2, 1, 3), 1, 1.0), sum_moments(torch.ones(3, 1, 3), 1, 1.0)
    for own in (large, sum_moments(torch.ones(1, 1, 2), 1, 1.0), sum_moments(torch.ones(1, 1, 3), 1, 9.0)):
        with pytest.raises(ValueError, match="part"):
            small.without(own)


@pytest.mark.parametrize("bad", [(torch.ones(3), 1, 0.0), (torch.ones(3, 1), -1, 0.0), (torch.ones(3, 1), 1, -1.0)])
def test_impossible_moments_cannot_be_built(bad: tuple[torch.Tensor, int, float]) -> None:
    with pytest.raises(ValueError, match="moments"):
        Moments(*bad)


def test_the_variance_is_that_of_a_simulation() -> None:
    sigma, width, count = 1.3, 5, 400
    generator = np.random.default_rng(3)
    means = []
    for seed in range(300):
        codes = unit_rows(count, width, seed).numpy()
        labels = generator.choice([-1.0, 1.0], size=(count, 1))
        noised = codes * labels + generator.normal(scale=sigma, size=codes.shape)
        means.append(noised.mean(0))
    stated = sum_moments(torch.zeros(count, 1, width), 1, sigma).variance()
    assert np.var(means) == pytest.approx(stated, rel=0.08)


def test_a_head_is_stacked_least_squares() -> None:
    codes, targets = unit_rows(7, 4, 1), torch.from_numpy(np.random.default_rng(2).normal(size=(7, 2)))
    second = codes.mT @ codes / 7
    moments = Moments(torch.from_numpy(np.random.default_rng(4).normal(size=(4, 2))), 11, 40.0)
    rows = [codes.numpy(), second.numpy() / np.sqrt(moments.variance()), np.sqrt(0.7) * np.eye(4)]
    goals = [targets.numpy(), moments.total.numpy() / 11 / np.sqrt(moments.variance()), np.zeros((4, 2))]
    expected = np.linalg.lstsq(np.vstack(rows), np.vstack(goals), rcond=None)[0]
    np.testing.assert_allclose(fit_head(codes, targets, 0.7, moments, second).numpy(), expected, atol=1e-10)


def test_without_others_or_with_boundless_noise_it_is_the_clients_own_head() -> None:
    codes, targets = unit_rows(9, 3, 5), torch.sign(torch.randn(9, 1)).double()
    second = torch.eye(3, dtype=torch.float64) / 3
    alone = fit_head(codes, targets, 1.0)
    torch.testing.assert_close(fit_head(codes, targets, 1.0, Moments(torch.zeros(3, 1), 0, 0.0), second), alone)
    torch.testing.assert_close(fit_head(codes, targets, 1.0, Moments(torch.ones(3, 1), 50, 1e30), second), alone)


def test_many_noised_records_find_the_head_that_made_the_labels() -> None:
    truth = torch.tensor([[0.8], [-0.5], [0.3]], dtype=torch.float64)
    codes = unit_rows(60_000, 3, 6)
    coin = torch.from_numpy(np.random.default_rng(7).random((60_000, 1)))
    labels = torch.where(coin < (1 + codes @ truth) / 2, 1.0, -1.0).double()
    noise = torch.from_numpy(np.random.default_rng(8).normal(scale=1.28, size=(60_000, 1, 3)))
    moments = sum_moments(joint_statistic(codes, labels) + noise, 1, 1.28)
    nobody = torch.zeros(0, 3), torch.zeros(0, 1)
    head = fit_head(*nobody, 1.0, moments, torch.eye(3, dtype=torch.float64) / 3)
    torch.testing.assert_close(head, truth, atol=0.06, rtol=0)  # Four standard errors: 3 x sqrt((1/3 + 1.64) / 60 000).


def test_impossible_heads_are_refused() -> None:
    codes, targets = unit_rows(3, 2, 1), torch.ones(3, 1)
    with pytest.raises(ValueError, match="precision"):
        fit_head(codes, targets, 0.0)
    with pytest.raises(ValueError, match="second"):
        fit_head(codes, targets, 1.0, Moments(torch.ones(2, 1), 1, 1.0))
