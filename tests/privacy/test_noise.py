"""The noise is Gaussian, its coordinates have nothing to do with each other, and nothing repeats it."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from securesplit.privacy import noise

N = 400_000


@pytest.fixture(autouse=True)
def _repeatable(request):
    """Statistics are judged under keys from a counter: the thresholds below then fail for a reason or never."""
    if "fixed" in request.node.name:
        request.getfixturevalue("fixed_noise")


@pytest.mark.parametrize("sigma", [1e-6, 1.0, 37.5])
def test_moments_fixed(sigma):
    drawn = noise.gaussian((N,), sigma) / sigma
    assert abs(drawn.mean()) < 4 / np.sqrt(N)
    low, high = stats.chi2.ppf([5e-5, 1 - 5e-5], N)  # a sigma wrong by 1 % is nine standard errors away
    assert low < np.square(drawn).sum() < high
    assert abs(stats.skew(drawn)) < 4 * np.sqrt(6 / N)
    assert abs(stats.kurtosis(drawn)) < 4 * np.sqrt(24 / N)


def test_distribution_fixed():
    assert stats.kstest(noise.gaussian((N,), 1.0), "norm").pvalue > 1e-4
    assert stats.kstest(noise.gaussian((7, 11, 501), 2.5).ravel() / 2.5, "norm").pvalue > 1e-4


def test_the_tails_are_there_fixed():
    drawn = noise.gaussian((N,), 1.0)
    for at in (3.0, 4.0):
        expected = N * stats.norm.sf(at)
        for side in (drawn, -drawn):
            assert abs((side > at).sum() - expected) < 4.5 * np.sqrt(expected) + 1


def test_no_correlation_between_coordinates_fixed():
    drawn = noise.gaussian((N,), 1.0)
    for lag in (
        1,
        2,
        3,
        4,
        8,
        64,
        768,
        N // 4,
        N // 2,
        N // 2 + 1,
    ):  # N / 2 is where the cosines end and the sines begin
        one, other = drawn[:-lag], drawn[lag:]
        assert abs(np.dot(one, other)) < 4.5 * np.sqrt(len(one)), lag
        assert abs(np.dot(one**2 - 1, other**2 - 1)) < 4.5 * 2 * np.sqrt(len(one)), lag


def test_no_correlation_between_calls_fixed():
    one, other = noise.gaussian((N,), 1.0), noise.gaussian((N,), 1.0)
    assert abs(np.dot(one, other)) < 4.5 * np.sqrt(N)


def test_every_position_has_the_same_variance_fixed():
    drawn = noise.gaussian((4000, 5, 7), 1.0)
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], 4000)
    each = np.square(drawn).sum(axis=0)
    assert ((low < each) & (each < high)).all()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 5), (0,), (4, 0)])
def test_shapes(shape):
    drawn = noise.gaussian(shape, 1.0)
    assert drawn.shape == shape
    assert drawn.dtype == np.float64


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_a_sigma_without_noise_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma"):
        noise.gaussian((3,), sigma)


def test_seeds_do_not_touch_it():
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        np.random.seed(7)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        drawn.append(noise.gaussian((64,), 1.0))
        assert torch.equal(torch.get_rng_state(), before[0])  # and it does not touch them
        assert np.array_equal(np.random.get_state()[1], before[1])
    assert not (drawn[0] == drawn[1]).any()


def test_a_known_key_gives_known_noise_and_another_key_other_noise(monkeypatch):
    def drawn(key: bytes) -> np.ndarray:
        monkeypatch.setattr(noise, "_fresh_key", lambda: key)
        return noise.gaussian((64,), 1.0)

    one, again, other = drawn(b"\1" * 32), drawn(b"\1" * 32), drawn(b"\2" * 32)
    assert np.array_equal(one, again)
    assert not (one == other).any()


def test_each_call_asks_the_system_for_its_own_key(monkeypatch):
    asked = []

    def urandom(count: int) -> bytes:
        asked.append(count)
        return hashlib.sha256(bytes([len(asked)])).digest()

    monkeypatch.setattr(noise.os, "urandom", urandom)
    one, other = noise.gaussian((64,), 1.0), noise.gaussian((64,), 1.0)
    assert asked == [32, 32]
    assert not (one == other).any()


def test_a_fork_draws_its_own_noise():
    code = r"""
import os
from securesplit.privacy.noise import gaussian
gaussian((8,), 1.0)  # whatever state there may be is now set up, and inherited
child = os.fork()
os.write(1, gaussian((4,), 1.0).tobytes().hex().encode() + b"\n")
if child:
    os.waitpid(child, 0)
else:
    os._exit(0)
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(lines) == 2
    one, other = (np.frombuffer(bytes.fromhex(line)) for line in lines)
    assert not (one == other).any()
