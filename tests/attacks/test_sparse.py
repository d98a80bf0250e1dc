"""Sparse Bayesian learning over a vocabulary: planted tokens are found, the likelihood is one, and noise gains nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from attacks.sparse import _START, Atoms, Effort, Lens, _gain, _improve, _state, explain

TOKENS, WIDTH, SHOWN = 400, 24, 16
EFFORT = Effort(candidates=128, iterations=(8, 8, 12), floor=1e-3, lean=0.1)
FLAT = torch.full((TOKENS,), 1 / TOKENS).log()


def lens(seed=0, *, transpose=False, width=SHOWN):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(99))
    change = torch.randn(WIDTH, width, generator=generator)
    spread = torch.randn(width, width, generator=generator)
    atoms = Atoms(basis, torch.full((TOKENS,), 1 / TOKENS))
    return Lens(f"t{seed}", torch.ones(width), atoms, change, spread @ spread.T, transpose=transpose)


def planted(through, present, rows, *, noise=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(rows, len(present), generator=generator) @ through.directions(torch.tensor(present))
    clean = clean + noise * clean.std() * torch.randn(clean.shape, generator=generator)
    return clean.T if through.transpose else clean


def top(gain, count):
    return set(gain.topk(count).indices.tolist())


def test_planted_tokens_are_found_with_fewer_rows_than_tokens():
    """Six tokens in three tensors of four rows: no single span holds them."""
    present = [3, 77, 150, 222, 301, 399]
    looks = [lens(seed, transpose=bool(seed % 2)) for seed in range(6)]
    gain = explain(looks, [planted(look, present, 4, seed=i) for i, look in enumerate(looks)], FLAT, EFFORT)
    assert len(top(gain, 6) & set(present)) >= 5


def test_signs_are_rows_like_any_others():
    present = [3, 77, 150, 222]
    looks = [lens(seed) for seed in range(8)]
    signs = [planted(look, present, 8, seed=i).sign() for i, look in enumerate(looks)]
    assert len(top(explain(looks, signs, FLAT, EFFORT), 4) & set(present)) >= 3


def test_noise_gains_little_and_zeros_nothing():
    looks = [lens(seed) for seed in range(4)]
    planted_gain = explain(looks, [planted(look, [3, 77], 8, seed=i) for i, look in enumerate(looks)], FLAT, EFFORT)
    generator = torch.Generator().manual_seed(5)
    noise = explain(looks, [torch.randn(8, SHOWN, generator=generator) for _ in looks], FLAT, EFFORT)
    assert float(noise.max()) < 0.25 * float(planted_gain.max())
    assert not explain(looks, [torch.zeros(8, SHOWN) for _ in looks], FLAT, EFFORT).any()


def log_likelihood(states, chosen, variance):
    """Oracle: scipy's normal density over every row."""
    total = 0.0
    for state, directions in zip(states, chosen, strict=True):
        a, b, s = state.factors
        tokens = (directions * variance[:, None]).T @ directions
        covariance = a * state.lens.background + b * torch.eye(SHOWN) + s * tokens
        total += multivariate_normal(np.zeros(SHOWN), covariance.double().numpy()).logpdf(state.rows.T.numpy()).sum()
    return total


@pytest.fixture
def fitted():
    looks = [lens(seed) for seed in range(3)]
    states = [_state(look, planted(look, [3, 77], 6, noise=0.3, seed=i)) for i, look in enumerate(looks)]
    tokens = torch.tensor([3, 5, 8, 77, 120, 200])
    return states, [state.lens.directions(tokens) for state in states], torch.full((6,), 1 / 6)


def test_the_likelihood_never_falls(fitted):
    states, chosen, variance = fitted
    assert states[0].factors == list(_START)
    before = log_likelihood(states, chosen, variance)
    for _ in range(20):
        variance = _improve(states, chosen, variance, 1e-6)
        after = log_likelihood(states, chosen, variance)
        assert after >= before - 1e-2
        before = after
    assert set(variance.topk(2).indices.tolist()) == {0, 3}


def test_the_gain_is_what_the_likelihood_loses(fitted):
    states, chosen, variance = fitted
    for _ in range(10):
        variance = _improve(states, chosen, variance, 1e-3)
    gain = _gain(states, chosen, variance)
    whole = log_likelihood(states, chosen, variance)
    for place in range(len(variance)):
        without = variance.clone()
        without[place] = 0
        assert float(gain[place]) == pytest.approx(
            max(0.0, whole - log_likelihood(states, chosen, without)), abs=0.05, rel=0.02
        )


def test_a_small_vocabulary_needs_no_candidates():
    look = lens()
    gain = explain([look], [planted(look, [7], 8)], FLAT, EFFORT.model_copy(update={"candidates": 10_000}))
    assert int(gain.argmax()) == 7
