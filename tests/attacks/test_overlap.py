"""Auxiliary text that holds a record, whole or nearly, is refused; text that shares a template with it is not."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.overlap import refuse_overlap
from securesplit.data.notes import ward_notes
from securesplit.errors import InputError

SIXTY = [f"word{i}" for i in range(60)]
CHINESE = "患者因反复胸痛三天入院,既往有高血压病史十年,建议立即进行冠状动脉造影检查并给予阿司匹林治疗。"
OTHER = "您好,根据您的描述,考虑是普通感冒引起的发热,建议多喝水,注意休息,必要时到医院就诊检查血常规。"


WHAT = r"the auxiliary text holds a record of the recording or a candidate, whole or nearly: \d+ of \d+ texts, first number \d+"


def refused(records, texts):
    if (caught := _fault(records, texts)) is None:
        return False
    assert (caught.code, caught.exit_code, caught.details) == ("SS-1703", 2, ())
    assert re.fullmatch(WHAT, caught.what), "it says where, and nothing of what stands there"
    return True


def _fault(records, texts):
    try:
        refuse_overlap(records, texts)
    except InputError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("record", "aux"),
    [
        ("one two three four five six seven", "before one two three four five six seven after"),
        ("one two three four five six seven", "one  two three\nfour five six"),
        ("one two three four five", "one two three four five"),
        ("one two three four five", "so one two three four five it was"),
        ("One Two three four five six", "ONE two, three: four five SIX!"),
        (" ".join(SIXTY), " ".join(SIXTY[:59]) + " another tail that goes on"),
        (" ".join(SIXTY), " ".join([*SIXTY[:30], "changed", *SIXTY[31:]])),
        ("yes no", "Yes, no"),
        ("???", "???"),
        (CHINESE, CHINESE),
        (CHINESE, OTHER + CHINESE + OTHER),
        (CHINESE, CHINESE[:-2] + "请"),
        (CHINESE, CHINESE[5:30]),
        (CHINESE.replace("三天", "3 days"), CHINESE.replace("三天", "3 days")),
    ],
)  # fmt: skip
def test_a_record_or_nearly_one_is_refused_wherever_it_stands(record, aux):
    assert refused([record], [aux])
    assert refused(["something quite different", record], ["and something else again", aux])


@pytest.mark.parametrize(
    ("record", "aux"),
    [
        ("one two three four five six seven", "something quite different from it all"),
        ("one two three four five six seven", "one two three"),
        ("yes no", "yes no maybe"),
        (" ".join(SIXTY), " ".join(SIXTY[:30]) + " " + " ".join(f"other{i}" for i in range(30))),
        (" ".join(SIXTY), " ".join(reversed(SIXTY))),
        (CHINESE, OTHER),
        ("", "one two three"),
        ("one two three", ""),
    ],
)  # fmt: skip
def test_other_text_is_let_through(record, aux):
    assert not refused([record], [aux])


@pytest.mark.parametrize(("count", "seed", "public"), [(60, 7, 99), (60, 8, 9)])
def test_a_shared_template_is_no_record(count, seed, public):
    records = [note.text for note in ward_notes(count, seed=seed)]
    texts = [note.text for note in ward_notes(1000, seed=public)]
    assert not refused(records, texts)
    for copied in records[:5]:
        assert refused(records, [*texts, copied.upper()])


@given(
    st.lists(st.sampled_from("abcdefghijklmnop"), min_size=5, max_size=30),
    st.tuples(*[st.integers(0, 30)] * 2),
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from("abz")), max_size=2),
    st.lists(st.sampled_from("abcdefgh"), max_size=8),
)
@settings(deadline=None, max_examples=150)
def test_the_index_finds_what_comparing_everything_finds(record, ends, changes, tail):
    """The oracle: nine tenths of the one's distinct 5-grams stand in the other, pair by pair, without any index."""

    def grams(words):
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    def inside(a, b):
        return bool(grams(a)) and 10 * len(grams(a) & grams(b)) >= 9 * len(grams(a))

    text = [*record[min(ends) // 3 : max(ends)], *tail]
    for place, letter in changes:
        text[place : place + 1] = [letter]
    texts = [text, tail]
    expected = any(inside(record, text) or (len(text) > 5 and inside(text, record)) for text in texts)
    assert refused([" ".join(record)], [" ".join(text) for text in texts]) == expected
