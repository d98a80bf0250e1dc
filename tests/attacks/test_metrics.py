"""Every metric against values worked out by hand, and the faults of others' metrics as cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.metrics import interval, recovery, rouge_l, score_sequence, span_of
from securesplit.errors import CheckFailed

PIECES = {1: "Ann", 2: " Lee", 3: " of", 4: " York", 5: " fell", 6: ".", 7: " Bob", 0: "<s>"}


def decode(ids):
    return "".join(PIECES.get(i, "?") for i in ids)


def score(truth, guess, **more):
    rules = {"special": frozenset({0}), "common": frozenset({3, 6}), "decode": decode, **more}
    return score_sequence(truth, guess, **rules)


def test_positions_count_and_special_tokens_do_not():
    s = score([0, 1, 2, 3, 4, 5, 6], [0, 1, 7, 3, 4, 4, 6, 6, 6, 6])
    assert (s.hits, s.total) == (4, 6)  # 1, 3, 4 and 6 are right; 2 and 5 are not; 0 is left out.
    assert (s.content_hits, s.content_total) == (2, 4)  # Of 1, 2, 4, 5.
    assert not s.exact


def test_the_right_tokens_in_the_wrong_places_are_misses():
    s = score([1, 2, 3, 4], [2, 1, 4, 3])
    assert (s.hits, s.total) == (0, 4)  # A set or bag metric would say 1.0.


def test_a_guess_that_ends_early_misses_the_rest():
    s = score([1, 2, 3, 4], [1, 2])
    assert (s.hits, s.total) == (2, 4)


def test_pii_counts_when_every_token_of_the_piece_is_right():
    pii = ("Ann Lee", "York", "Berlin")
    assert (
        score([1, 2, 3, 4, 5], [1, 2, 3, 7, 5], pii=pii).pii_hits,
        score([1, 2, 3, 4, 5], [1] * 5, pii=pii).pii_total,
    ) == (1, 2)
    assert score([1, 2, 3, 4], [7, 2, 3, 4], pii=pii).pii_hits == 1  # York alone.


def test_a_span_is_found_where_its_characters_are():
    assert span_of("Lee of", [1, 2, 3, 4], decode) == range(1, 3)
    assert span_of("ork", [1, 2, 3, 4], decode) == range(3, 4)
    assert span_of("Lee fell", [1, 2, 3, 4], decode) is None
    assert span_of("", [1, 2], decode) is None


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat sat": 3 words; precision 3/4, recall 3/5, F1 2/3.
    assert rouge_l("the black cat sat down", "the cat dog sat") == pytest.approx(2 / 3)
    assert rouge_l("Ann Lee", "ann lee") == 1.0
    assert rouge_l("Ann Lee", "") == 0.0
    assert rouge_l("...", "!") == 1.0
    assert rouge_l("头疼怎么办", "头疼") == pytest.approx(4 / 7)  # Characters count in Chinese: 2/2 and 2/5.


def test_recovery_weighs_positions_not_sequences():
    assert recovery([1, 9], [1, 10]) == pytest.approx(10 / 11)


def test_a_metric_without_anything_to_measure_fails():
    with pytest.raises(CheckFailed) as caught:
        recovery([], [])
    assert caught.value.code == "SS-1571"
    with pytest.raises(CheckFailed):
        score([0, 0], [0, 0])


def test_the_interval_resamples_sequences():
    low, high = interval([10, 0] * 20, [10] * 40)
    # Oracle: the mean of 40 fair coins has standard error 0.5/sqrt(40) = 0.079.
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.079, 0.5 + 1.96 * 0.079), abs=0.03)
    # Counted by token the same figures would give an interval a third as wide.
    assert high - low > 0.25


def test_sequences_that_agree_leave_an_interval():
    """Twelve of twelve exclude 1 no more than 0.76: Wilson's published interval for 12 hits of 12."""
    assert interval([10] * 12, [10] * 12) == (pytest.approx(0.7575, abs=1e-3), 1.0)
    assert interval([0] * 12, [10] * 12) == (0.0, pytest.approx(0.2425, abs=1e-3))
    # By hand: z^2 / 2 = 1.92 of 4.84 around it, wherever one sequence alone lies.
    low, high = interval([3], [4])
    assert low < 0.2
    assert 0.9 < high < 1
    assert interval([5], [5]) == (pytest.approx(1 / 4.8415, abs=1e-4), 1.0)
    # One long sequence beside many short ones is little more than one.
    assert interval([1000, 1, 1], [1000, 1, 1])[0] < 0.22


@pytest.mark.parametrize("chance", [0.5, 0.9])
def test_a_verdicts_floor_is_above_the_truth_as_rarely_as_is_said(chance):
    """A thousand honest runs whose true value is the ceiling itself; sequences stand or fall as a whole, the worst case."""
    draws = np.random.default_rng(6).random((1000, 12)) < chance
    floors = [interval(10 * d, [10] * 12, resamples=50, alarm=5e-5)[0] for d in draws.astype(float)]
    assert max(floors) <= chance
    ends = [interval(10 * d, [10] * 12, resamples=200)[0] for d in draws.astype(float)]
    assert np.mean(np.array(ends) > chance) <= 0.05


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(9, 20)), min_size=1, max_size=12))
def test_the_interval_holds_the_estimate(counts):
    hits, totals = zip(*counts, strict=True)
    low, high = interval(hits, totals, resamples=400)
    assert 0 <= low <= high <= 1
    assert low - 1e-9 <= recovery(hits, totals) + np.std([h / n for h, n in counts]) + 1e-9


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=12), st.data())
def test_hits_are_bounded_and_a_perfect_guess_is_perfect(truth, data):
    guess = data.draw(st.lists(st.integers(1, 7), max_size=20))
    s = score(truth, guess)
    assert 0 <= s.hits <= s.total == len(truth)
    perfect = score(truth, [*truth, 3, 3], pii=(decode(truth[:2]),))
    assert perfect.exact
    assert perfect.hits == perfect.total
    assert perfect.pii_hits == perfect.pii_total == 1
    assert perfect.rouge_l == 1.0
