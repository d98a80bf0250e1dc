"""The maths of noise against committed figures, against a whole table of them, and against numerical integration."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from securesplit.privacy.calibrate import delta_for, epsilon_for, mu_for, sigma_for

ROOT = Path(__file__).parents[2]
KNOWN = json.loads((ROOT / "tests" / "vectors" / "gdp.json").read_text())
SHARED = ROOT.parent / "shared" / "kat" / "dp_kat.json"
REL = 1e-9

MUS = st.floats(0.05, 12)
EPSILONS = st.floats(0.05, 60)
DELTAS = st.floats(-9, -3).map(lambda power: 10.0**power)


def close(value: float, known: str) -> bool:
    """Within one part in 10^9; below the range of doubles both count as zero."""
    return math.isclose(value, float(known), rel_tol=REL, abs_tol=1e-290)


@pytest.mark.parametrize("row", KNOWN["sigma"])
def test_sigma_of_one_release(row):
    epsilon, delta = float(row["epsilon"]), float(row["delta"])
    assert close(sigma_for(epsilon, delta, float(row["sensitivity"])), row["sigma"])
    assert close(mu_for(epsilon, delta), row["mu"])


@pytest.mark.parametrize("row", KNOWN["composition"])
def test_epsilon_of_equal_releases(row):
    mu = math.sqrt(row["releases"]) / float(row["z"])
    assert close(mu, row["mu"])
    assert close(epsilon_for(mu, float(row["delta"])), row["epsilon"])


@pytest.mark.parametrize("row", KNOWN["delta"])
def test_delta(row):
    assert close(delta_for(float(row["mu"]), float(row["epsilon"])), row["delta"])


@pytest.mark.parametrize("row", KNOWN["heterogeneous"])
def test_epsilon_of_unequal_releases(row):
    mu = math.sqrt(sum(count / float(z) ** 2 for _, count, z in row["parts"]))
    assert close(mu, row["mu"])
    for delta, epsilon in row["epsilon"].items():
        assert close(epsilon_for(mu, float(delta)), epsilon)


@pytest.mark.parametrize("row", KNOWN["multiplier"])
def test_noise_multiplier_of_a_budget(row):
    assert close(sigma_for(float(row["epsilon"]), float(row["delta"]), 1.0, row["releases"]), row["z"])


@pytest.mark.skipif(not SHARED.is_file(), reason="the full table of known answers lies beside the repository only")
def test_the_full_table():
    table = json.loads(SHARED.read_text())
    for row in table["A_analytic_gaussian_sigma"]:
        epsilon, delta = float(row["eps"]), float(row["delta"])
        assert close(sigma_for(epsilon, delta, float(row["sensitivity"])), row["sigma"]), row
        assert close(mu_for(epsilon, delta), row["mu"]), row
    for row in table["B_composition_identical"]:
        mu = math.sqrt(row["k"]) / float(row["z"])
        assert close(epsilon_for(mu, float(row["delta"])), row["eps_exact_gdp"]), row
    for row in table["C_delta_of_eps_mu"]:
        assert close(delta_for(float(row["mu"]), float(row["eps"])), row["delta"]), row
    for row in table["D_heterogeneous"]:
        for delta, epsilon in row["eps_exact"].items():
            assert close(epsilon_for(float(row["mu"]), float(delta)), epsilon), row
    for row in table["E_noise_multiplier_for_budget"]:
        assert close(sigma_for(float(row["eps"]), float(row["delta"]), 1.0, row["k"]), row["z_exact"]), row


def hockey_stick(mu: float, epsilon: float) -> float:
    """The integral of max(0, p - e^epsilon q) for p = N(mu, 1), q = N(0, 1), by adaptive quadrature.

    The two densities cross once, at x0; with x = x0 + t and a = x0 - mu the integrand is
    p(x0) exp(-a t - t^2 / 2) (1 - exp(-mu t)), which is smooth and loses no digits.
    """
    crossing = epsilon / mu + mu / 2
    a = crossing - mu
    end = min(80 / a, 14.0) if a > 0 else 14.0 - a

    def integrand(t: float) -> float:
        return -math.exp(-(a * t) - t * t / 2 + peak) * math.expm1(-mu * t)

    peak = -a * a / 2 if a < 0 else 0.0  # The largest exponent, taken out so that nothing overflows.
    edges = np.linspace(0, end, 13)
    parts = [quad(integrand, low, high, epsabs=0, epsrel=1e-12)[0] for low, high in pairwise(edges)]
    return math.exp(-a * a / 2 - peak) / math.sqrt(2 * math.pi) * math.fsum(parts)


@given(mu=MUS, epsilon=EPSILONS)
@settings(max_examples=80, deadline=None)
def test_delta_is_the_hockey_stick_divergence(mu, epsilon):
    assert math.isclose(delta_for(mu, epsilon), hockey_stick(mu, epsilon), rel_tol=1e-9, abs_tol=1e-290)


@given(epsilon=EPSILONS, delta=DELTAS)
@settings(max_examples=25, deadline=None)
def test_mu_is_the_largest_that_the_budget_allows(epsilon, delta):
    mu = mu_for(epsilon, delta)
    assert hockey_stick(mu, epsilon) <= delta * (1 + 1e-10)
    assert hockey_stick(mu * (1 + 1e-9), epsilon) > delta


@given(mu=MUS, delta=DELTAS)
@settings(max_examples=25, deadline=None)
def test_epsilon_is_the_smallest_that_is_true(mu, delta):
    epsilon = epsilon_for(mu, delta)
    assert hockey_stick(mu, epsilon) <= delta * (1 + 1e-10)
    if epsilon > 1e-6:
        assert hockey_stick(mu, epsilon * (1 - 1e-9)) > delta


@given(epsilon=EPSILONS, delta=DELTAS, sensitivity=st.floats(1e-3, 1e4), releases=st.integers(1, 10**6))
@settings(max_examples=60, deadline=None)
def test_releases_together_cost_the_budget(epsilon, delta, sensitivity, releases):
    sigma = sigma_for(epsilon, delta, sensitivity, releases)
    together = math.sqrt(releases) * sensitivity / sigma
    assert math.isclose(epsilon_for(together, delta), epsilon, rel_tol=1e-9)


def test_the_classical_formula_is_not_in_use():
    # At epsilon = 16 it would give sigma = 0.30, whose true delta is 34 times 1e-5.
    assert sigma_for(16, 1e-5, 1.0) > 1.1 * math.sqrt(2 * math.log(1.25e5)) / 16


def test_the_edges():
    assert delta_for(0.0, 1.0) == 0.0
    assert epsilon_for(0.0, 1e-5) == 0.0
    assert epsilon_for(1e-6, 1e-5) == 0.0  # delta alone pays for so little
    assert delta_for(1e-300, 1.0) == 0.0
    assert delta_for(1e200, 1.0) == 1.0
    assert delta_for(40.0, 0.0) == 1.0


BAD = [math.nan, math.inf, -math.inf, -1.0]


@pytest.mark.parametrize("bad", BAD)
def test_numbers_out_of_range_are_refused(bad):
    for call in (
        lambda: delta_for(bad, 1.0),
        lambda: delta_for(1.0, bad),
        lambda: epsilon_for(bad, 1e-5),
        lambda: epsilon_for(1.0, bad),
        lambda: mu_for(bad, 1e-5),
        lambda: mu_for(1.0, bad),
        lambda: sigma_for(bad, 1e-5, 1.0),
        lambda: sigma_for(1.0, bad, 1.0),
        lambda: sigma_for(1.0, 1e-5, bad),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()


@pytest.mark.parametrize("call", [
    lambda: mu_for(0.0, 1e-5), lambda: mu_for(1.0, 0.0), lambda: mu_for(1.0, 1.0), lambda: epsilon_for(1.0, 0.0),
    lambda: epsilon_for(1.0, 1.0), lambda: sigma_for(1.0, 1e-5, 0.0), lambda: sigma_for(1.0, 1e-5, 1.0, 0),
])  # fmt: skip
def test_the_ends_of_the_ranges_are_refused(call):
    with pytest.raises(ValueError, match="must be"):
        call()
