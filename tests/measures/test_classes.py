"""Which class a text names, and the measures over classes, against counts by hand and a second way to count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.measures.classes import Label, accuracy, class_row, macro_f1, named_class

TRUTH = (Label("true", ("yes", "1")), Label("false", ("no", "0")))
ENTAILED = (Label("entailment", ("yes", "true")), Label("not_entailment", ("no", "false")))
CHOICE = (Label("0", ("a", "choice 1")), Label("1", ("b", "choice 2")))


@pytest.mark.parametrize(
    ("text", "labels", "index"),
    [
        ("yes", TRUTH, 0), ("  Yes, because it rains", TRUTH, 0), ("NO.", TRUTH, 1), ("'no'", TRUTH, 1), ("1", TRUTH, 0),
        ("Nothing is known", TRUTH, None), ("not sure", TRUTH, None), ("I know: no", TRUTH, None), ("", TRUTH, None), ("?!", TRUTH, None),
        ("yesterday", TRUTH, None), ("10", TRUTH, None), ("ｙｅｓ", TRUTH, 0),
        ("not_entailment", ENTAILED, 1), ("not entailment", ENTAILED, 1), ("entailment", ENTAILED, 0), ("Not at all", ENTAILED, None),
        ("A", CHOICE, 0), ("b.", CHOICE, 1), ("B: it fell", CHOICE, 1), ("A man came in", CHOICE, None), ("(A)", CHOICE, 0), ("Choice 2", CHOICE, 1),
        ("是", (Label("是"), Label("不是")), 0), ("不是。", (Label("是"), Label("不是")), 1), ("不知道", (Label("是"), Label("不是")), None),
    ],
)  # fmt: skip
def test_a_text_names_a_class_with_its_first_whole_word_or_none(text, labels, index):
    assert named_class(text, labels) == index


def measured(pairs, count):
    total = np.sum([class_row(g, p, count) for g, p in pairs], axis=0, keepdims=True)
    return float(accuracy(total)[0]), float(macro_f1(total)[0])


def test_three_classes_by_hand():
    # Gold 0 0 1 2, named 0 1 1 none. F1 of 0: 2/3, of 1: 2/3, of 2: 0.
    assert measured([(0, 0), (0, 1), (1, 1), (2, None)], 3) == (0.5, pytest.approx((2 / 3 + 2 / 3 + 0) / 3))
    assert measured([(0, 0), (1, 1)], 3) == (1, 1), "a class that is nowhere has no F1"
    assert measured([(0, None)], 2) == (0, 0), "unparsable is wrong"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), st.integers(0, 2))), min_size=1, max_size=20))
def test_against_precision_and_recall(pairs):
    scores = []
    for c in {g for g, _ in pairs} | {p for _, p in pairs if p is not None}:
        said, true = [g for g, p in pairs if p == c], [p for g, p in pairs if g == c]
        precision = said.count(c) / len(said) if said else 0.0
        recall = true.count(c) / len(true) if true else 0.0
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    want = sum(g == p for g, p in pairs) / len(pairs), sum(scores) / len(scores)
    assert measured(pairs, 3) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    "names",
    [
        ("-1", "0", "1"), ("+", "-"), ("Good", "good"), ("<5", ">5", "5"), ("😀", "😢"), ("阳性", "阴性"), ("C", "C++", "C#"),
        ("not_x", "not x"), ("B-PER", "B-LOC", "O"), ("1", "10", "1.5"), ("positive!", "positive"), ("-", "--"),
    ],
)  # fmt: skip
def test_a_class_is_named_by_its_own_name(names):
    labels = [Label(name) for name in names]
    for spelled in ("{}", " {}", "{}\n"):
        assert [named_class(spelled.format(name), labels) for name in names] == list(range(len(names)))


def test_marks_before_a_class_count_only_where_a_class_has_them():
    signed = [Label("-1"), Label("0"), Label("1")]
    assert [named_class(t, signed) for t in ("-1.", "**-1**", '"1"', "1, because", "- 1", "+1", "2")] == [
        0,
        0,
        2,
        2,
        2,
        2,
        None,
    ]
    assert named_class("1", [Label("-1"), Label("+1")]) is None, "neither of the two"
    assert named_class("-1", [Label("0"), Label("1")]) == 1
    assert [named_class(t, [Label("+"), Label("-")]) for t in ("+", "'-'", "- bad", "+-")] == [0, 1, 1, 0]
    assert [named_class(t, [Label("Good"), Label("good")]) for t in ("Good.", "good.")] == [0, 1]
