"""The ceiling against published and simulated values, and the guess that it starts from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from attacks.bounds import best_guess, ceiling, mu_of, share_of, unigram_share

NO_SPECIAL = frozenset()


@pytest.mark.parametrize(
    ("mu", "uniform", "five", "nine"),
    # attacks.md 5.1: mu of epsilon 1, 4, 8, 16; priors 1/49152, 5 %, 9 %.
    [
        (0.268, 6.3e-5, 0.084, 0.142),
        (0.925, 7.4e-4, 0.236, 0.339),
        (1.666, 0.0074, 0.508, 0.628),
        (2.905, 0.115, 0.896, 0.941),
    ],
)
def test_the_ceiling_has_the_known_values(mu, uniform, five, nine):
    assert ceiling(1 / 49152, mu) == pytest.approx(uniform, rel=0.03)
    assert ceiling(0.05, mu) == pytest.approx(five, abs=2e-3)
    assert ceiling(0.09, mu) == pytest.approx(nine, abs=2e-3)


def test_the_ceiling_is_reached_by_the_best_attack_on_two_far_points():
    """Two records at distance 2C: the likelihood-ratio attack with a prior of kappa has exactly this success."""
    mu, kappa, n = 1.5, 0.2, 400_000
    noise = np.random.default_rng(4).standard_normal(n)
    threshold = stats.norm.ppf(1 - kappa)  # Names the target on a share kappa of releases that do not hold it.
    assert np.mean(noise > threshold) == pytest.approx(kappa, abs=3e-3)
    assert np.mean(noise + mu > threshold) == pytest.approx(ceiling(kappa, mu), abs=3e-3)


@settings(deadline=None, max_examples=100)
@given(st.floats(0, 1), st.floats(0, 30), st.floats(0, 5))
def test_the_ceiling_rises_with_both(kappa, mu, more):
    assert 0 <= kappa <= ceiling(kappa, mu) + 1e-9 <= ceiling(kappa, mu + more) + 2e-9 <= 1 + 3e-9


@pytest.mark.parametrize(("kappa", "mu"), [(-0.1, 1), (1.1, 1), (0.5, -1), (float("nan"), 1), (0.5, float("nan"))])
def test_arguments_out_of_range_are_refused(kappa, mu):
    with pytest.raises(ValueError, match="kappa"):
        ceiling(kappa, mu)


def test_mu_is_the_policys_whole_budget(private, unsafe):
    assert mu_of(private(8.0, 5.0)) == pytest.approx(1.666, abs=1e-3)
    assert mu_of(unsafe) is None


def test_unigram_shares_by_hand():
    truths = [[1, 1, 2], [1, 3, 0]]
    assert unigram_share(truths, frozenset({0}), 2) == pytest.approx(1 / 5)
    assert unigram_share(truths, frozenset({0})) == pytest.approx(3 / 5)
    assert share_of(truths, [[1, 9, 2], [1]], frozenset({0})) == pytest.approx(3 / 5)


def test_a_template_raises_the_best_guess():
    # Position 0 is always 5, which is not the commonest token by much; the rest never repeats.
    truths = [[5, 10 + i, 20 + i] for i in range(6)]
    assert unigram_share(truths, NO_SPECIAL) == pytest.approx(1 / 3)
    assert best_guess(truths, [5, 10], NO_SPECIAL) == pytest.approx(7 / 18)
    # Leaving one out, a token seen once helps nobody.
    assert best_guess([[1, 2], [3, 4]], [], NO_SPECIAL) == pytest.approx(1 / 4)
