"""MultiRC's measures by hand, and against a plain reading of their definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.measures.multirc import em0, em1, f1a, f1m, question_row

PAIRS = st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=8)


def sums(questions):
    return np.sum([question_row([g for g, _ in q], [p for _, p in q]) for q in questions], axis=0, keepdims=True)


def all_of(questions):
    total = sums(questions)
    return tuple(float(measure(total)[0]) for measure in (f1m, f1a, em0, em1))


def test_two_questions_by_hand():
    # Question 1: right 1 1 0, said 1 0 0: P 1, R 1/2, one wrong. Question 2: right 1 0 0, said 1 1 1: P 1/3, R 1, two wrong.
    found = all_of([[(True, True), (True, False), (False, False)], [(True, True), (False, True), (False, True)]])
    precision, recall = (1 + 1 / 3) / 2, (1 / 2 + 1) / 2
    assert found[0] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found[1] == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert found[2:] == (0, 0.5)


def test_f1m_is_not_the_mean_of_f1():
    found = all_of([[(True, True)], [(True, False), (True, True)]])
    assert found[0] == pytest.approx(2 * 1 * 0.75 / 1.75)
    assert found[0] != pytest.approx((1 + 2 / 3) / 2)


def test_nothing_right_and_nothing_said():
    assert all_of([[(False, False), (False, False)]]) == (1, 1, 1, 1), "no denominator counts as 1"
    assert all_of([[(True, False)]])[:2] == (0, 0), "P is 1 by convention, R is 0"
    assert all_of([[(False, True)]])[:2] == (0, 0)


def plainly(questions):
    """The definitions with sets of positions and no sums."""
    precisions, recalls, wrongs, right_all, said_all = [], [], [], set(), set()
    for number, question in enumerate(questions):
        right = {i for i, (g, _) in enumerate(question) if g}
        said = {i for i, (_, p) in enumerate(question) if p}
        precisions.append(len(right & said) / len(said) if said else 1.0)
        recalls.append(len(right & said) / len(right) if right else 1.0)
        wrongs.append(len(right ^ said))
        right_all |= {(number, i) for i in right}
        said_all |= {(number, i) for i in said}
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    hits = len(right_all & said_all)
    p_all, r_all = hits / len(said_all) if said_all else 1.0, hits / len(right_all) if right_all else 1.0

    def harmonic(a, b):
        return 2 * a * b / (a + b) if a + b else 0.0

    share = [sum(w <= most for w in wrongs) / len(wrongs) for most in (0, 1)]
    return harmonic(precision, recall), harmonic(p_all, r_all), *share


@settings(deadline=None, max_examples=80)
@given(PAIRS)
def test_against_the_definition(questions):
    assert all_of(questions) == pytest.approx(plainly(questions), abs=1e-12)
