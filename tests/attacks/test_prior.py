"""Counting public text."""

from __future__ import annotations

import math

import pytest
import torch

from attacks.prior import prior_from, public_sequences


def ids(text):
    return [int(part) for part in text.split()]


def test_counts_by_hand():
    prior = prior_from(["3 1 1", "3 2", "4 1 5 6"], ids, 10)
    assert prior.favourites[0] == 1
    assert float(prior.log_probability[1]) == pytest.approx(math.log(3.1 / 10.0))  # 9 tokens and 10 times 0.1.
    assert float(prior.log_probability.exp().sum()) == pytest.approx(1.0)
    assert prior.positional == (3, 1, 1, 6)
    assert prior.informed


def test_without_text_the_rank_decides():
    prior = prior_from([], ids, 50)
    assert not prior.informed
    assert prior.positional == ()
    assert torch.equal(prior.favourites, torch.arange(50))
    assert float(prior.log_probability.exp().sum()) == pytest.approx(1.0)


def test_public_sequences_come_from_the_text_and_from_chance():
    text = list(range(100))
    prior = prior_from([" ".join(map(str, text))], ids, 200)
    drawn = public_sequences(prior, rows=300, length=10)
    assert drawn.shape == (30, 10)
    windows = sum(bool((row.diff() == 1).all()) for row in drawn)
    assert windows == 20
    assert torch.equal(drawn, public_sequences(prior, rows=300, length=10)), "public and repeatable"


@pytest.mark.parametrize("texts", [["1 2"], ["1 2", "3"], []])
def test_short_or_absent_texts_do(texts):
    assert public_sequences(prior_from(texts, ids, 20), rows=40, length=8).shape == (5, 8)
