"""Exact match and F1 of short answers: by hand, and against a second way to count."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.measures.spans import best, exact, f1, leave_one_out, normalised

WORDS = st.text(alphabet="ab t.,'\n", max_size=12)


def test_normalisation_by_hand():
    assert normalised("The  Cat's\ta hat, an... umbrella!") == "cats hat umbrella"
    assert normalised("Theatre another") == "theatre another", "articles are whole words"
    assert normalised("a-b") == "ab", "marks vanish before articles are looked for"
    assert normalised("Straße 東京") == "straße 東京"


@pytest.mark.parametrize(
    ("gold", "said", "em", "score"),
    [
        ("the red house", "Red house.", 1, 1),
        ("red house", "a red boat", 0, 1 / 2),
        ("x y z", "x", 0, 2 * 1 * (1 / 3) / (4 / 3)),
        ("x x y", "x x x x", 0, 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
        ("red", "blue", 0, 0),
        ("red", "", 0, 0),
        ("the", "an", 1, 1),
        ("the", "red", 0, 0),
    ],
)
def test_scores_by_hand(gold, said, em, score):
    assert exact(gold, said) == em
    assert f1(gold, said) == pytest.approx(score, abs=1e-12)


def by_matching(gold: str, said: str) -> float:
    """F1 by striking words out of a list, one after another."""
    left, got = normalised(gold).split(), normalised(said).split()
    size, hits = len(left) + len(got), 0
    if not left or not got:
        return 1.0 if size == 0 else 0.0
    for word in got:
        if word in left:
            left.remove(word)
            hits += 1
    return 2 * hits / size


@settings(deadline=None, max_examples=60)
@given(WORDS, WORDS)
def test_f1_is_twice_the_common_words_over_all_words(gold, said):
    assert f1(gold, said) == pytest.approx(by_matching(gold, said), abs=1e-12)
    assert f1(gold, said) == f1(said, gold)
    assert exact(gold, said) <= f1(gold, said)


def test_the_best_gold_answer_counts_for_each_measure_by_itself():
    found = best(["one two three", "four"], "one two")
    assert (found.exact, found.f1) == (0, pytest.approx(0.8))
    assert best(["one", "two"], "two").exact == 1


def test_coqa_leaves_each_person_out_once():
    # Golds: white, white, pale, snow. Said: white. Leaving out a "white" leaves the other, leaving out others leaves both.
    found = leave_one_out(["white", "white", "pale", "snow"], "White")
    assert (found.exact, found.f1) == (1, 1)
    # Only one person said it: in one of the four comparisons nobody else agrees.
    found = leave_one_out(["white", "pale", "grey", "snow"], "white")
    assert (found.exact, found.f1) == (3 / 4, 3 / 4)
    # By hand: golds "red hat", "hat"; said "hat". Without the first: 1. Without the second: F1 of "red hat" is 2/3.
    assert leave_one_out(["red hat", "hat"], "hat").f1 == pytest.approx((1 + 2 / 3) / 2)
    assert leave_one_out(["red hat"], "hat").f1 == pytest.approx(2 / 3), "with one answer there is nobody to leave out"
