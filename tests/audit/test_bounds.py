"""Exact limits against SciPy, the known answers, and simulation of a mechanism whose mu is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from securesplit.audit.bounds import (
    at_least,
    binomial,
    chi_square_z,
    mu_at_least,
    one_run_epsilon,
    one_run_p_value,
    pure_epsilon_at_least,
    quantile,
    rate_at_least,
    rate_at_most,
)

KAT = Path(__file__).parents[3] / "shared" / "kat" / "dp_kat.json"


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 3000), share=st.floats(0, 1), error=st.sampled_from([1e-2, 1e-4, 1e-7]))
def test_limits_are_clopper_and_pearsons(n, share, error):
    hits = round(share * n)
    low = stats.beta.ppf(error, hits, n - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1 - error, hits + 1, n - hits) if hits < n else 1.0
    assert rate_at_least(hits, n, error) == pytest.approx(low, rel=1e-7, abs=1e-12)
    assert rate_at_most(hits, n, error) == pytest.approx(high, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.3, 0.999, 1.0])
def test_the_binomial_law(p):
    assert np.allclose(binomial(500, p), stats.binom.pmf(np.arange(501), 500, p), rtol=1e-9, atol=1e-300)
    assert at_least(500, p, 0) == 1
    assert at_least(500, p, 150) == pytest.approx(stats.binom.sf(149, 500, p), rel=1e-8, abs=1e-300)


def test_a_bound_of_mu_covers_the_truth_and_is_close():
    rng, n = np.random.default_rng(1), 20_000
    for mu in (0.5, 1.0, 2.0):
        bounds = []
        for _ in range(8):
            hits, alarms = (rng.normal([mu / 2, -mu / 2], size=(n, 2)) > 0).sum(0)
            bounds.append(mu_at_least(int(hits), int(alarms), n, 1e-3))
        assert max(bounds) <= mu
        assert min(bounds) > 0.6 * mu
    assert mu_at_least(0, 0, 100, 1e-3) == -math.inf
    assert mu_at_least(100, 100, 100, 1e-3) == -math.inf
    assert mu_at_least(100, 0, 100, 1e-3) == pytest.approx(2 * stats.norm.ppf(0.0005 ** (1 / 100)), rel=1e-9)


@pytest.mark.skipif(not KAT.is_file(), reason="the known answers lie beside the checkout")
def test_the_simulated_audits_of_the_known_answers_come_out_the_same():
    for case in json.loads(KAT.read_text())["K_two_point_gdp_audit_simulation"]:
        n, half = case["trials_per_world"], case["true_mu"] / 2
        hits = round(n * stats.norm.cdf(half))
        bound = mu_at_least(hits, n - hits, n, 1e-3)
        assert bound == pytest.approx(case["mu_lower_99_9"], abs=0.12)  # Theirs has the luck of its draws.
        assert (bound > case["claimed_mu"]) == case["claim_refuted"]


@pytest.mark.skipif(not KAT.is_file(), reason="the known answers lie beside the checkout")
def test_one_run_bounds_are_the_known_answers():
    for case in json.loads(KAT.read_text())["K_steinke_one_run"]:
        found = one_run_epsilon(case["m"], case["guesses"], case["correct"], case["delta"], 0.05)
        assert found == pytest.approx(case["eps_lower_95"], abs=1e-9)


def test_a_one_run_p_value_by_the_papers_definition():
    m, r, v, epsilon, delta = 300, 60, 50, 1.3, 1e-3
    law = stats.binom(r, 1 / (1 + math.exp(-epsilon)))
    alpha = max((law.sf(v - i - 1) - law.sf(v - 1)) / i for i in range(1, v + 1))
    assert one_run_p_value(m, r, v, epsilon, delta) == pytest.approx(law.sf(v - 1) + 2 * m * delta * alpha, rel=1e-9)
    assert one_run_p_value(m, r, 0, epsilon, 0.0) == pytest.approx(1)
    assert one_run_epsilon(100, 50, 25, 0.0, 0.05) == 0


def test_pure_epsilon_of_randomised_response():
    n, epsilon = 20_000, 2.0
    kept = math.exp(epsilon) / (math.exp(epsilon) + 3)
    bound = pure_epsilon_at_least(round(n * kept), round(n * (1 - kept) / 3), n, 1e-3)
    assert 0.85 * epsilon < bound < epsilon
    assert pure_epsilon_at_least(0, 10, n, 1e-3) == -math.inf


def test_normal_and_chi_square_scales():
    assert quantile(1e-4) == pytest.approx(stats.norm.isf(5e-5), rel=1e-9)
    for freedom in (63, 1000, 10**6):
        for tail in (1e-4, 0.3, 1 - 1e-4):
            assert chi_square_z(stats.chi2.isf(tail, freedom), freedom) == pytest.approx(stats.norm.isf(tail), abs=0.02)
