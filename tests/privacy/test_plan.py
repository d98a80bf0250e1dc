"""A budget is divided in integers, so that no division overspends it and no noise is too small for its charge."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError
from securesplit.policy.schema import Channel, Gaussian
from securesplit.privacy.calibrate import mu_for
from securesplit.privacy.plan import UNITS, plan_for

CLIPS = st.floats(1e-6, 1e9)
RELEASES = st.integers(1, 10_000)
# Cuts of the interval (0, 1]: the differences are shares that add up to at most 1.
DECIMALS = st.sampled_from([(0.1, 0.2, 0.3, 0.4), (0.3, 0.3, 0.3, 0.1), (0.7, 0.1, 0.1, 0.1), (0.6, 0.2, 0.1, 0.1)])
WEIGHTS = st.tuples(*[st.integers(1, 100)] * 4).map(lambda w: tuple(x / sum(w) for x in w))


def privacy(epsilon, delta, channels, regime="round"):
    names = ("activations", "gradients", "updates", "generation")
    stated = {n: Channel(clip=c, share=s, releases=r) for n, (c, s, r) in zip(names, channels, strict=False)}
    return Gaussian(
        mechanism="gaussian",
        unit="sequence",
        relation="replace-one",
        epsilon=epsilon,
        delta=delta,
        regime=regime,
        **stated,
    )


def channels_of(plan):
    return [c for c in (plan.cut, plan.gradient, plan.update, plan.decode) if c is not None]


@given(
    epsilon=st.floats(0.1, 1000), delta=st.floats(1e-12, 9e-4),
    clips=st.tuples(*[CLIPS] * 4), shares=DECIMALS | WEIGHTS, releases=st.tuples(*[RELEASES] * 4),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_the_parts_never_exceed_the_budget_and_the_noise_pays_for_each(epsilon, delta, clips, shares, releases):
    plan = plan_for(privacy(epsilon, delta, list(zip(clips, shares, releases, strict=True))))
    assert sum(c.units * c.releases for c in channels_of(plan)) <= plan.budget
    assert Fraction(plan.budget, UNITS) <= Fraction(mu_for(epsilon, delta)) ** 2
    for c, clip, share, count in zip(channels_of(plan), clips, shares, releases, strict=True):
        assert (c.clip, c.releases) == (clip, count)
        assert (2 * Fraction(c.clip) / Fraction(c.sigma)) ** 2 <= Fraction(
            c.units, UNITS
        )  # mu = 2C/sigma, in exact numbers
        assert 2 * c.clip / c.sigma >= c.mu * (1 - 1e-12)  # and no more noise than that
        assert c.units >= plan.budget * share / count * (1 - 1e-6) - 1  # nothing but the rounding is lost


def test_shares_at_the_tolerated_excess_are_scaled_back():
    plan = plan_for(privacy(8.0, 1e-5, [(1.0, 0.25, 1)] * 3 + [(1.0, 0.25 + 9e-10, 1)]))
    assert sum(c.units for c in channels_of(plan)) <= plan.budget


def test_closed_channels_are_none():
    plan = plan_for(privacy(8.0, 1e-5, [(1.0, 1.0, 1)], regime="frozen"))
    assert plan.channel("cut") is plan.cut
    assert [plan.channel(at) for at in ("gradient", "decode", "update")] == [None, None, None]
    assert math.isclose(plan.cut.mu, mu_for(8.0, 1e-5), rel_tol=1e-9)


def test_each_place_of_release_has_its_own_channel():
    plan = plan_for(privacy(8.0, 1e-5, [(1.0, 0.1, 1), (2.0, 0.2, 1), (3.0, 0.3, 1), (4.0, 0.4, 1)]))
    assert [plan.channel(at).clip for at in ("cut", "gradient", "update", "decode")] == [1.0, 2.0, 3.0, 4.0]


def test_a_budget_too_small_to_count_is_refused():
    with pytest.raises(InputError) as caught:
        plan_for(privacy(1e-3, 1e-9, [(1.0, 1e-6, 1_000_000)], regime="frozen"))
    assert caught.value.code == "SS-1533"
    assert caught.value.hint
