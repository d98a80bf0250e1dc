"""ROUGE, BLEU-4 and perplexity: by hand, and against sacrebleu's own whole-corpus path and a plain LCS."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.measures.overlap import bleu, bleu_row, perplexity, rouge, words

CHINESE = st.text(alphabet="你好世界 ab，。", min_size=1, max_size=12)


def harmonic(hits: float, wanted: int, got: int) -> float:
    return 2 * hits / (wanted + got)


def test_rouge_by_hand_in_english():
    one, two, long = rouge(["the cat sat on the mat"], "The cat lay on a mat.", "en")
    assert one == pytest.approx(harmonic(4, 6, 6)), "the, cat, on, mat"
    assert two == pytest.approx(harmonic(1, 5, 5)), "the cat"
    assert long == pytest.approx(harmonic(4, 6, 6))
    assert rouge(["cats running"], "cat run", "en")[0] == 1, "stems are compared, as published figures do"


def test_rouge_by_hand_in_chinese():
    assert words("感冒了 Take 2片，OK") == ["感", "冒", "了", "take", "2", "片", "ok"]
    one, two, long = rouge(["多喝热水"], "喝热水多", "zh")
    assert one == 1
    assert two == pytest.approx(harmonic(2, 3, 3))
    assert long == pytest.approx(harmonic(3, 4, 4))
    assert rouge(["多喝热水", "休息"], "休息", "zh") == (1, 1, 1), "the best reference counts"
    assert rouge(["多喝热水"], "", "zh") == (0, 0, 0)


def subsequence(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + subsequence(a[1:], b[1:])
    return max(subsequence(a[1:], b), subsequence(a, b[1:]))


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet="甲乙丙", min_size=1, max_size=7), st.text(alphabet="甲乙丙", min_size=1, max_size=7))
def test_rouge_l_is_the_longest_common_subsequence(gold, said):
    assert rouge([gold], said, "zh")[2] == pytest.approx(
        harmonic(subsequence(list(gold), list(said)), len(gold), len(said))
    )


def test_bleu_by_hand():
    # Characters: matches of order 1 to 4 are 4/5, 3/4, 2/3, 1/2; equal lengths, so no penalty.
    row = np.array([bleu_row(["一二三四五"], "一二三四六", "zh")])
    assert row.tolist() == [[4, 3, 2, 1, 5, 4, 3, 2, 5, 5]]
    assert bleu(row)[0] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # One character shorter: the brevity penalty is exp(1 - 5/4), all matches are right.
    short = np.array([bleu_row(["一二三四五"], "一二三四", "zh")])
    assert bleu(short)[0] == pytest.approx(math.exp(1 - 5 / 4))
    assert bleu(np.array([bleu_row(["一二"], "", "zh")]))[0] == 0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(CHINESE, CHINESE), min_size=1, max_size=5))
def test_sums_of_rows_are_the_corpus(pairs):
    total = np.sum([bleu_row([gold], said, "zh") for gold, said in pairs], axis=0, keepdims=True)
    whole = sacrebleu.corpus_bleu([said for _, said in pairs], [[gold for gold, _ in pairs]], tokenize="zh").score
    assert bleu(total)[0] == pytest.approx(whole / 100, abs=1e-12)


def test_corpus_bleu_is_no_mean_of_sentences():
    rows = [bleu_row(["the cat sat on the mat"], "the cat sat on the mat", "en"), bleu_row(["a b c d e f"], "x", "en")]
    assert bleu(np.sum(rows, axis=0, keepdims=True))[0] != pytest.approx(
        np.mean([bleu(np.array([r]))[0] for r in rows])
    )


def test_perplexity_weighs_tokens():
    assert perplexity(np.array([[2 * math.log(2) + math.log(32), 3.0]]))[0] == pytest.approx(2 ** (7 / 3))


def test_no_figure_leaves_its_range():
    same = "答案是甲乙丙"
    assert bleu(np.array([bleu_row([same], same, "zh")]))[0] == 1, "not a rounding error more"
    assert np.isfinite(perplexity(np.array([[1e300, 1.0]]))).all()
