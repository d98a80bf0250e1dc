"""A budget is divided in integers, so that no division overspends it and no noise is too small for its charge."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from securesplit.errors import InputError
from securesplit.policy.schema import Channel, Gaussian, Labels
from securesplit.privacy.lattice import step_for
from securesplit.privacy.plan import UNITS, enforced_epsilon, enforced_mu, plan_for

NOISE = 256**2 * (1 + 64**2 + 64**4)  # Variance of the noise on every channel, in lattice steps^2.
CLIPS = st.floats(1e-6, 1e9)
RELEASES = st.integers(1, 10_000)
UNIT = st.sampled_from(["sequence", "token", "user"])
ROWS = st.sampled_from([1, 2, 3, 7, 512, 4095])
# Cuts of the interval (0, 1]: the differences are shares that add up to at most 1.
DECIMALS = st.sampled_from([(0.1, 0.2, 0.3, 0.4), (0.3, 0.3, 0.3, 0.1), (0.7, 0.1, 0.1, 0.1), (0.6, 0.2, 0.1, 0.1)])
WEIGHTS = st.tuples(*[st.integers(1, 100)] * 4).map(lambda w: tuple(x / sum(w) for x in w))


def privacy(epsilon, delta, channels, regime="round", unit="sequence", labels=None):
    names = ("activations", "gradients", "updates", "generation")
    stated = {n: Channel(clip=c, share=s, releases=r) for n, (c, s, r) in zip(names, channels, strict=False)}
    if labels is not None:
        del stated["gradients"]
    return Gaussian(
        mechanism="gaussian", unit=unit, relation="replace-one", epsilon=epsilon, delta=delta, regime=regime, labels=labels,
        **stated,
    )  # fmt: skip


def channels_of(plan):
    return [c for c in (plan.cut, plan.gradient, plan.update, plan.decode) if c is not None]


# ---- which mu a budget buys ------------------------------------------------------------------------------------------


def rdp_epsilon(mu: float, delta: float) -> float:
    """dp-accounting's Renyi accountant at orders close to the best one; its own default orders lie far apart."""
    rdp = pytest.importorskip("dp_accounting.rdp.rdp_privacy_accountant")
    best = 1 + math.sqrt(2 * math.log(1 / delta)) / mu
    orders = sorted({1 + (best - 1) * factor for factor in np.geomspace(0.2, 5, 4000)})
    epsilon, _ = rdp.compute_epsilon(orders, [order * mu * mu / 2 for order in orders], delta)
    return float(epsilon)


GRID = [(e, d) for e in (0.1, 0.5, 1.0, 2.0, 8.0, 16.0, 32.0, 128.0) for d in (1e-5, 1e-6, 1e-8)]


@pytest.mark.parametrize(("epsilon", "delta"), GRID)
def test_the_enforced_mu_is_what_both_accountants_allow(epsilon, delta):
    events = pytest.importorskip("dp_accounting")
    mu = enforced_mu(epsilon, delta)
    exact = 1 / events.get_sigma_gaussian(epsilon, delta)
    assert mu <= exact * (1 + 1e-9)
    assert rdp_epsilon(mu, delta) <= epsilon * (1 + 1e-6)
    # One of the two is met: a budget is not given away. The Renyi one is the dearer, by some percent.
    assert rdp_epsilon(mu * 1.001, delta) > epsilon
    assert mu > 0.7 * exact


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 1.6, 5.0, 20.0])
def test_the_printed_epsilon_is_the_larger_of_the_two(mu):
    events = pytest.importorskip("dp_accounting")
    exact, renyi = events.get_epsilon_gaussian(1 / mu, 1e-5), rdp_epsilon(mu, 1e-5)
    assert enforced_epsilon(mu, 1e-5) >= max(exact, renyi * (1 - 1e-6))
    assert enforced_epsilon(mu, 1e-5) == pytest.approx(max(exact, renyi), rel=1e-4)
    assert enforced_epsilon(0.0, 1e-5) == 0.0


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-6), (8.0, 1e-5), (30.0, 1e-5)])
@pytest.mark.parametrize("unit", ["sequence", "token", "user"])
def test_all_releases_of_a_policy_together_stay_within_epsilon_and_delta(epsilon, delta, unit):
    """dp-accounting composes them from sigma and sensitivity alone; PLD for the Gaussian law, Renyi for the lattice's."""
    events = pytest.importorskip("dp_accounting")
    pld, rdp = pytest.importorskip("dp_accounting.pld"), pytest.importorskip("dp_accounting.rdp")
    plan = plan_for(
        privacy(epsilon, delta, [(600.0, 0.3, 3), (2.0, 0.2, 7), (3.0, 0.3, 4), (100.0, 0.2, 20)], unit=unit), rows=64
    )
    sensitivity = {600.0: 1200.0 * (8 if unit == "token" else 1), 2.0: 4.0, 3.0: 6.0, 100.0: 200.0}
    orders = 1 + (math.sqrt(2 * math.log(1 / delta)) / plan.mu) * np.geomspace(0.3, 3, 600)
    accountants = (
        pld.PLDAccountant(events.NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=1e-3),
        rdp.RdpAccountant(list(orders), events.NeighboringRelation.REPLACE_SPECIAL),
    )
    for accountant in accountants:
        for channel in channels_of(plan):
            noise = events.GaussianDpEvent(channel.sigma / sensitivity[channel.clip])
            accountant.compose(noise, channel.releases)
        assert accountant.get_epsilon(delta) <= epsilon * (1 + 1e-6)
    assert accountants[1].get_epsilon(delta) > epsilon * 0.999


# ---- division --------------------------------------------------------------------------------------------------------


@given(
    epsilon=st.floats(0.1, 1000), delta=st.floats(1e-12, 9e-4),
    clips=st.tuples(*[CLIPS] * 4), shares=DECIMALS | WEIGHTS, releases=st.tuples(*[RELEASES] * 4), unit=UNIT, rows=ROWS,
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_the_parts_never_exceed_the_budget_and_the_noise_pays_for_each(
    epsilon, delta, clips, shares, releases, unit, rows
):
    plan = plan_for(privacy(epsilon, delta, list(zip(clips, shares, releases, strict=True)), unit=unit), rows=rows)
    assert sum(c.units * c.releases for c in channels_of(plan)) <= plan.budget
    assert Fraction(plan.budget, UNITS) <= Fraction(enforced_mu(epsilon, delta)) ** 2
    for c, clip, share, count in zip(channels_of(plan), clips, shares, releases, strict=True):
        assert (c.clip, c.releases) == (clip, count)
        assert c.per_row == (unit == "token" and c is plan.cut)
        moved = rows if c.per_row else 1
        # mu = 2 C sqrt(rows) / sigma, in exact numbers; and no more noise than that.
        assert moved * (2 * Fraction(c.clip) / Fraction(c.sigma)) ** 2 <= Fraction(c.units, UNITS)
        assert 2 * c.clip * math.sqrt(moved) / c.sigma >= c.mu * (1 - 1e-12)
        assert c.sensitivity == pytest.approx(2 * c.clip * math.sqrt(moved))
        # The same in whole lattice steps, where the noise is: no row is longer than C / step of them.
        longest = math.floor((Fraction(c.clip) / Fraction(step_for(c.sigma))) ** 2)
        assert Fraction(4 * moved * longest, NOISE) <= Fraction(c.units, UNITS)
        assert c.units >= plan.budget * share / count * (1 - 1e-6) - 1  # nothing but the rounding is lost


def test_shares_at_the_tolerated_excess_are_scaled_back():
    plan = plan_for(privacy(8.0, 1e-5, [(1.0, 0.25, 1)] * 3 + [(1.0, 0.25 + 9e-10, 1)]))
    assert sum(c.units for c in channels_of(plan)) <= plan.budget


def test_labels_have_their_part_of_the_budget():
    channels = [(1.0, 0.1, 1), (2.0, 0.9, 1), (3.0, 0.3, 1), (4.0, 0.1, 1)]  # The second, for gradients, is left out.
    plan = plan_for(privacy(8.0, 1e-5, channels, labels=Labels(share=0.5 + 9e-10, classes=7)))
    assert plan.gradient is None
    assert plan.labels.classes == 7
    assert plan.labels.units + sum(c.units * c.releases for c in channels_of(plan)) <= plan.budget
    assert plan.labels.units == pytest.approx(plan.budget / 2, rel=1e-6)
    # e^epsilon is the odds of the best guess that the charged mu allows, Phi(mu/2) against Phi(-mu/2).
    half = math.sqrt(plan.labels.units / UNITS) / 2
    assert math.exp(plan.labels.epsilon) == pytest.approx(stats.norm.cdf(half) / stats.norm.cdf(-half), rel=1e-9)


def test_closed_channels_are_none():
    plan = plan_for(privacy(8.0, 1e-5, [(1.0, 1.0, 1)], regime="frozen"))
    assert plan.channel("cut") is plan.cut
    assert [plan.channel(at) for at in ("gradient", "decode", "update", "labels")] == [None] * 4
    assert plan.labels is None
    assert math.isclose(plan.cut.mu, plan.mu, rel_tol=1e-12)
    assert math.isclose(plan.mu, enforced_mu(8.0, 1e-5), rel_tol=1e-9)


def test_each_place_of_release_has_its_own_channel():
    plan = plan_for(privacy(8.0, 1e-5, [(1.0, 0.1, 1), (2.0, 0.2, 1), (3.0, 0.3, 1), (4.0, 0.4, 1)]))
    assert [plan.channel(at).clip for at in ("cut", "gradient", "update", "decode")] == [1.0, 2.0, 3.0, 4.0]
    assert plan.channel("labels") is None


def test_a_budget_too_small_to_count_is_refused():
    with pytest.raises(InputError) as caught:
        plan_for(privacy(1e-3, 1e-9, [(1.0, 1e-6, 1_000_000)], regime="frozen"))
    assert caught.value.code == "SS-1533"
    assert caught.value.hint
