"""Metrics on scores, links and lengths, against hand counts, brute force and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.exposure import exposure, sampled_exposure
from attacks.rates import (
    auc,
    auc_interval,
    extraction,
    length_errors,
    log_points,
    pairwise,
    roc,
    tpr_at,
)
from securesplit.errors import CheckFailed

few = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=14)


def by_pairs(members, others):
    return sum((x > y) + 0.5 * (x == y) for x in members for y in others) / (len(members) * len(others))


@settings(deadline=None, max_examples=60)
@given(few, few)
def test_auc_counts_pairs_and_is_the_area_under_the_curve(members, others):
    curve = roc(members, others)
    area = sum(
        (curve.false[i + 1] - curve.false[i]) * (curve.true[i + 1] + curve.true[i]) / 2
        for i in range(len(curve.false) - 1)
    )
    assert auc(members, others) == pytest.approx(by_pairs(members, others))
    assert area == pytest.approx(by_pairs(members, others))
    assert (curve.false[0], curve.true[0], curve.false[-1], curve.true[-1]) == (0, 0, 1, 1)
    low, high = auc_interval(members, others)
    assert 0 <= low <= auc(members, others) + 1e-12
    assert auc(members, others) - 1e-12 <= high <= 1


def test_auc_is_scipys_statistic():
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.7, 1, 60).round(1), rng.normal(0, 1, 45).round(1)
    u = scipy.stats.mannwhitneyu(members, others).statistic
    assert auc(members, others) == pytest.approx(u / (60 * 45))


def test_the_interval_of_delong_by_hand():
    # Members 3, 2, 0 against 1, 1.5: placements 1, 1, 0 of members, 2/3 and 2/3 of others.
    members, others = (3.0, 2.0, 0.0), (1.0, 1.5)
    variance = (np.var([1, 1, 0], ddof=1)) / 3 + 0.0 / 2
    reach = 1.959964 * math.sqrt(variance) / (2 / 3 * 1 / 3)
    expected = [1 / (1 + math.exp(-(math.log(2) + s * reach))) for s in (-1, 1)]
    assert auc_interval(members, others) == pytest.approx(expected, abs=1e-5)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    shift = math.sqrt(2) * scipy.stats.norm.ppf(0.75)
    for mean, truth in ((0.0, 0.5), (shift, 0.75)):
        inside = 0
        for _ in range(400):
            low, high = auc_interval(rng.normal(mean, 1, 40), rng.normal(0, 1, 40))
            inside += low <= truth <= high
        assert inside >= 400 * 0.95 - 3 * math.sqrt(400 * 0.95 * 0.05)


def test_a_perfect_separation_is_not_certainty():
    assert auc_interval((2.0,) * 50, (1.0,) * 50) == (pytest.approx(0.025 ** (1 / 50)), 1.0)
    assert auc_interval((1.0,) * 50, (2.0,) * 50) == (0.0, pytest.approx(1 - 0.025 ** (1 / 50)))
    assert auc_interval((0.5,), (0.1, 0.9)) == (0.0, 1.0)


def test_recall_at_a_false_positive_rate_by_hand():
    others = [float(i) for i in range(100)]
    members = [98.5, 99.0, 99.5, 97.0, -1.0]
    none = tpr_at(members, others, 0.0)
    assert (none.recall, none.reached) == (0.2, 0.0)
    one = tpr_at(members, others, 0.01)
    assert (one.recall, one.reached, one.resolved) == (0.6, 0.01, True)
    strict = tpr_at(members, others, 0.001)
    assert (strict.recall, strict.reached, strict.resolved) == (0.2, 0.0, False)
    assert strict.reached_high == pytest.approx(3.8415 / 103.8415, rel=1e-4)
    assert tpr_at(members, others, 1.0).recall == 1.0
    with pytest.raises(ValueError, match="rate"):
        tpr_at(members, others, 1.5)


def test_equal_scores_are_one_step():
    # A score that never varies must not find anybody at a small rate.
    assert tpr_at((1.0,) * 5, (1.0,) * 5, 0.5).recall == 0.0
    assert roc((1.0,) * 5, (1.0,) * 5).true == (0.0, 1.0)
    assert auc((1.0,) * 5, (1.0,) * 5) == 0.5


def test_log_points_are_the_positive_corners():
    curve = roc((5.0, 3.0, 3.0, 1.0), (4.0, 2.0, 0.0, 0.0))
    assert log_points(curve) == ((0.25, 0.75), (0.5, 1.0), (1.0, 1.0))


def test_scores_that_are_none_stop_the_run():
    for members, others in (((), (1.0,)), ((1.0,), ()), ((math.nan,), (1.0,))):
        with pytest.raises(CheckFailed, match="SS-1571"):
            auc(members, others)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_links_are_counted_over_pairs(groups):
    true, claimed = [a for a, _ in groups], [b for _, b in groups]
    pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
    together = sum(true[i] == true[j] and claimed[i] == claimed[j] for i, j in pairs)
    of_true = sum(true[i] == true[j] for i, j in pairs)
    of_claimed = sum(claimed[i] == claimed[j] for i, j in pairs)
    found = pairwise(true, claimed)
    assert (found.common, found.true, found.claimed) == (together, of_true, of_claimed)
    assert found.precision == (together / of_claimed if of_claimed else None)
    assert found.recall == (together / of_true if of_true else None)
    if found.precision and found.recall:
        assert found.f1 == pytest.approx(2 / (1 / found.precision + 1 / found.recall))


def test_lengths_and_pieces_by_hand():
    found = length_errors((5, 7, 9), (5, 9, 6))
    assert (found.mean_error, found.exact, found.count) == (pytest.approx(5 / 3), pytest.approx(1 / 3), 3)
    with pytest.raises(CheckFailed, match="SS-1571"):
        length_errors((), ())
    got = extraction(["Ann  Lee", "Ann Lee", "01632 960111", "", "no"], ["Ann Lee", "01632 960112", "WN-1", "WN-1"])
    assert (got.hits, got.named, got.pieces, got.precision) == (1, 3, 3, pytest.approx(1 / 3))
    assert got.recall == pytest.approx(1 / 3)
    assert extraction((), ["x"]).precision is None
    with pytest.raises(CheckFailed, match="SS-1571"):
        extraction(["x"], ())


# --- exposure -------------------------------------------------------------------------------------------------------


def test_all_siblings_give_the_exact_exposure():
    siblings = [float(i) for i in range(255)]
    assert exposure(300.0, siblings, 256) == 8.0
    assert exposure(-1.0, siblings, 256) == 0.0
    assert exposure(252.5, siblings, 256) == pytest.approx(8 - math.log2(3))


def test_a_canary_that_was_never_seen_has_about_a_bit_and_a_half():
    rng = np.random.default_rng(2)
    drawn = [exposure(rng.normal(), rng.normal(size=500), 10**9) for _ in range(300)]
    # Of a uniform rank -log2 U has mean 1 / ln 2 = 1.44 and deviation 1.44.
    assert np.mean(drawn) == pytest.approx(1 / math.log(2), abs=3 * 1.44 / math.sqrt(300))


@pytest.mark.parametrize("shape", [0.0, 3.0, -3.0])
@pytest.mark.parametrize("deviations", [3.0, 5.0, 6.5])
def test_the_tail_is_scipys_skew_normal(shape, deviations):
    family = scipy.stats.skewnorm(shape, loc=-40, scale=5)
    siblings = family.ppf((np.arange(4000) + 0.5) / 4000)
    canary = float(family.mean() + deviations * family.std())
    expected = -family.logsf(canary) / math.log(2)
    # scipy gives up where its difference of two tails cancels.
    if not math.isfinite(expected) or shape < 0:
        expected = -math.log2(scipy.integrate.quad(family.pdf, canary, canary + 60, epsabs=0, limit=400)[0])
    assert exposure(canary, siblings, 2**300) == pytest.approx(expected, rel=0.04)


def test_exposure_never_exceeds_the_space_and_rises_with_the_score():
    siblings = np.random.default_rng(3).normal(size=800)
    assert exposure(50.0, siblings, 10**4) == pytest.approx(math.log2(10**4))
    assert sampled_exposure(50.0, siblings, 10**4) == pytest.approx(math.log2(801))
    rising = [exposure(x, siblings, 2**200) for x in (-1.0, 0.0, 1.0, 2.5, 3.5, 4.5, 8.0)]
    assert rising == sorted(rising)


def test_siblings_that_are_all_alike_or_missing():
    assert exposure(1.0, (0.0, 0.0, 0.0), 1000) == 2.0
    assert exposure(0.0, (0.0,) * 3, 1000) == pytest.approx(2 - math.log2(2.5))
    with pytest.raises(CheckFailed, match="SS-1571"):
        exposure(1.0, (), 10)
    with pytest.raises(CheckFailed, match="SS-1571"):
        exposure(math.nan, (1.0,), 10)
    with pytest.raises(ValueError, match="more siblings"):
        exposure(1.0, (1.0,) * 10, 10)
