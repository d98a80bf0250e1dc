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
from scipy import stats
from scipy.integrate import quad

from securesplit.privacy.calibrate import (
    delta_for,
    epsilon_for,
    epsilon_rdp_for,
    mu_for,
    mu_rdp_for,
    pure_mu,
    sigma_for,
)

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


SHARED_ONLY = pytest.mark.skipif(
    not SHARED.is_file(), reason="the full table of known answers lies beside the repository only"
)


@SHARED_ONLY
def test_the_full_table():
    table = json.loads(SHARED.read_text())
    for row in table["A_analytic_gaussian_sigma"]:
        epsilon, delta = float(row["eps"]), float(row["delta"])
        assert close(sigma_for(epsilon, delta, float(row["sensitivity"])), row["sigma"]), row
        assert close(mu_for(epsilon, delta), row["mu"]), row
    for row in table["B_composition_identical"]:
        mu = math.sqrt(row["k"]) / float(row["z"])
        assert close(mu, row["mu"]), row
        assert close(epsilon_for(mu, float(row["delta"])), row["eps_exact_gdp"]), row
        assert close(epsilon_rdp_for(mu, float(row["delta"])), row["eps_rdp_opt"]), row
    for row in table["C_delta_of_eps_mu"]:
        assert close(delta_for(float(row["mu"]), float(row["eps"])), row["delta"]), row
    for row in table["D_heterogeneous"]:
        for delta, epsilon in row["eps_exact"].items():
            assert close(epsilon_for(float(row["mu"]), float(delta)), epsilon), row
        for delta, epsilon in row["eps_rdp_opt"].items():
            assert close(epsilon_rdp_for(float(row["mu"]), float(delta)), epsilon), row
    for row in table["E_noise_multiplier_for_budget"]:
        assert close(sigma_for(float(row["eps"]), float(row["delta"]), 1.0, row["k"]), row["z_exact"]), row


@SHARED_ONLY
def test_the_full_table_of_geometry_ceilings_and_pure_budgets():
    table = json.loads(SHARED.read_text())
    for row in table["H_noise_geometry"]:
        mu = mu_for(float(row["eps"]), float(row["delta"]))
        assert close(mu, row["mu"]), row
        assert close(sigma_for(float(row["eps"]), float(row["delta"]), 2.0), row["sigma_over_C_replace"]), row
        for name, ratio in row["noise_to_clip_ratio"].items():
            width, rows = (int(part[1:]) for part in name.split("_"))
            assert close(math.sqrt(width * rows) * 2 / mu, ratio), row
        assert close(0.5 * math.erfc(-mu / math.sqrt(8)), row["max_balanced_binary_accuracy_any_decoder"]), row
    for name, epsilon in table["H2_eps_needed_for_noise_norm_equal_clip_norm_delta1e-5"].items():
        width, rows = (int(part[1:]) for part in name.split("_"))
        assert close(epsilon_for(2 * math.sqrt(width * rows), 1e-5), epsilon), name
    for row in table["O_information_ceiling_bits"]:
        mu = mu_for(float(row["eps"]), float(row["delta"]))
        assert close(mu, row["mu"]), row
        assert close(mu * mu / 8 / math.log(2), row["bits_per_release"]), row
        assert close(0.5 * math.erfc(-mu / math.sqrt(8)), row["max_binary_accuracy"]), row
    for row in table["N_pure_eps_to_mu"]:
        assert close(pure_mu(float(row["eps"])), row["mu"]), row


def renyi_epsilon(mu: float, delta: float, order: float) -> float:
    """The conversion at one order, written out."""
    return order * mu * mu / 2 + math.log((order - 1) / order) - (math.log(delta) + math.log(order)) / (order - 1)


def test_the_renyi_curve_of_a_gaussian():
    for mu, order in ((0.3, 1.5), (1.0, 2.0), (2.0, 7.0)):

        def integrand(x: float, mu: float = mu, order: float = order) -> float:
            return math.exp(order * stats.norm.logpdf(x, mu) + (1 - order) * stats.norm.logpdf(x))

        mass = quad(integrand, order * mu - 12, order * mu + 12, epsabs=0, epsrel=1e-10)[0]
        assert math.isclose(math.log(mass) / (order - 1), order * mu * mu / 2, rel_tol=1e-9)


@given(mu=MUS, delta=DELTAS)
@settings(max_examples=25, deadline=None)
def test_renyi_epsilon_is_the_best_of_all_orders(mu, delta):
    epsilon = epsilon_rdp_for(mu, delta)
    assert epsilon >= epsilon_for(mu, delta)  # It is an upper bound on what is exact for a Gaussian.
    tried = [renyi_epsilon(mu, delta, 1 + excess) for excess in np.geomspace(1e-2, 1e4, 121) if mu * excess < 300]
    assert epsilon <= max(0.0, min(tried)) * (1 + 1e-9)
    assert epsilon >= min(tried) * (1 - 5e-3) or epsilon == 0.0


@given(epsilon=EPSILONS, delta=DELTAS)
@settings(max_examples=25, deadline=None)
def test_renyi_mu_is_the_largest_that_the_budget_allows(epsilon, delta):
    mu = mu_rdp_for(epsilon, delta)
    assert epsilon_rdp_for(mu, delta) <= epsilon
    assert epsilon_rdp_for(mu * (1 + 1e-9), delta) > epsilon
    assert mu <= mu_for(epsilon, delta)


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_another_accountant_agrees(mu, delta):
    events = pytest.importorskip("dp_accounting")
    pld, rdp = pytest.importorskip("dp_accounting.pld"), pytest.importorskip("dp_accounting.rdp")
    # Two releases alike and a third: 2 (mu / 4)^2 + 7 / 8 mu^2 = mu^2.
    parts = [(2, mu / 4), (1, mu * math.sqrt(7 / 8))]
    event = events.ComposedDpEvent([events.SelfComposedDpEvent(events.GaussianDpEvent(1 / m), k) for k, m in parts])
    exact = pld.PLDAccountant(value_discretization_interval=1e-4).compose(event).get_epsilon(delta)
    assert math.isclose(epsilon_for(mu, delta), exact, rel_tol=1e-4)
    orders = [1 + excess for excess in np.geomspace(0.05, 500, 4000)]
    assert math.isclose(
        epsilon_rdp_for(mu, delta), rdp.RdpAccountant(orders=orders).compose(event).get_epsilon(delta), rel_tol=1e-5
    )


def two_labels_as_gdp(epsilon: float, mu: float) -> bool:
    """Whether mu-GDP's trade-off curve lies below that of epsilon-DP, on a grid of false alarm rates."""
    alphas = np.geomspace(1e-12, 0.5, 4001)
    gaussian = stats.norm.cdf(stats.norm.isf(alphas) - mu)
    pure = np.maximum(0, np.maximum(1 - math.exp(epsilon) * alphas, math.exp(-epsilon) * (1 - alphas)))
    return bool((gaussian <= pure * (1 + 1e-9) + 1e-15).all())


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1, 3, 8])
def test_pure_mu_is_the_smallest_whose_curve_lies_below(epsilon):
    mu = pure_mu(epsilon)
    assert two_labels_as_gdp(epsilon, mu)
    corner = 1 / (1 + math.exp(epsilon))  # Where false alarms and misses are equally many.
    assert stats.norm.cdf(stats.norm.isf(corner) - mu * (1 - 1e-6)) > corner
    assert math.isclose(mu, -2 * stats.norm.ppf(corner), rel_tol=1e-12)


def test_pure_mu_at_its_ends():
    assert pure_mu(0.0) == 0.0
    assert math.isclose(pure_mu(1e-9), math.sqrt(2 * math.pi) * 1e-9 / 2, rel_tol=1e-5)
    assert math.isclose(pure_mu(600.0), -2 * stats.norm.ppf(math.exp(-600)), rel_tol=1e-12)
    for bad in (-1.0, 600.1, math.nan):
        with pytest.raises(ValueError, match="epsilon"):
            pure_mu(bad)


def test_renyi_at_its_edges():
    assert epsilon_rdp_for(0.0, 1e-5) == 0.0
    assert epsilon_rdp_for(1e-200, 1e-5) == 0.0
    assert math.isclose(epsilon_rdp_for(1e5, 1e-5), 1e10 / 2, rel_tol=1e-3)
    for bad in BAD:
        for call in (
            lambda bad=bad: epsilon_rdp_for(bad, 1e-5),
            lambda bad=bad: epsilon_rdp_for(1.0, bad),
            lambda bad=bad: mu_rdp_for(bad, 1e-5),
            lambda bad=bad: mu_rdp_for(1.0, bad),
        ):
            with pytest.raises(ValueError, match="must be"):
                call()


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
