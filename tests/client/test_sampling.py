"""Choosing tokens: transformers' own warpers are the oracle; they share no code with the subject."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from securesplit.client import generate
from securesplit.client.sampling import Sampling, choose, likely, nucleus, penalised, probabilities, top
from securesplit.errors import InputError

LOGITS = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.from_numpy(np.random.default_rng(seed).normal(scale=3.0, size=50))
)
FEW = settings(deadline=None, max_examples=40)


def oracle(logits: torch.Tensor, *steps) -> torch.Tensor:
    scores, ids = logits[None].clone(), torch.tensor([[0]])
    for step in steps:
        scores = step(ids, scores)
    return scores[0]


def same(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.equal(torch.isinf(mine), torch.isinf(theirs))
    torch.testing.assert_close(mine, theirs)


@FEW
@given(LOGITS, st.integers(1, 80))
def test_top_k(logits, k):
    same(top(logits, k), oracle(logits, TopKLogitsWarper(top_k=k)))


@FEW
@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p(logits, p):
    same(nucleus(logits, p), oracle(logits, TopPLogitsWarper(top_p=p)))


@FEW
@given(LOGITS, st.floats(0.001, 1.0))
def test_min_p(logits, share):
    same(likely(logits, share), oracle(logits, MinPLogitsWarper(min_p=share)))


@FEW
@given(LOGITS, st.lists(st.integers(0, 49), min_size=1, max_size=30), st.floats(0.5, 2.0))
def test_repetition_penalty(logits, seen, penalty):
    theirs = RepetitionPenaltyLogitsProcessor(penalty=penalty)(torch.tensor([seen]), logits[None].clone())[0]
    same(penalised(logits, seen, penalty), theirs)


@FEW
@given(LOGITS, st.floats(0.2, 3.0), st.integers(1, 40), st.floats(0.1, 0.99), st.floats(0.01, 0.5))
def test_all_of_them_in_the_usual_order(logits, temperature, k, p, share):
    steps = TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p), MinPLogitsWarper(share)
    want = torch.softmax(oracle(logits, *steps), -1)
    got = probabilities(logits, Sampling(temperature, top_k=k, top_p=p, min_p=share))
    torch.testing.assert_close(got, want)
    assert float(got.sum()) == pytest.approx(1.0)


def test_draws_follow_the_probabilities_and_the_seed():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampling = Sampling(1.0, top_k=3)
    generator = torch.Generator().manual_seed(4)
    drawn = [choose(logits, sampling, generator) for _ in range(4000)]
    shares = np.bincount(drawn, minlength=4) / 4000
    want = np.exp([2.0, 1.0, 0.0]) / np.exp([2.0, 1.0, 0.0]).sum()
    assert shares[:3] == pytest.approx(want, abs=0.03)
    assert shares[3] == 0
    again = torch.Generator().manual_seed(4)
    assert [choose(logits, sampling, again) for _ in range(50)] == drawn[:50]


def test_greedy_takes_the_largest_of_the_penalised_and_draws_nothing():
    logits, generator = torch.tensor([1.0, 3.0, 2.9]), torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert choose(logits, Sampling(), generator, [1]) == 1
    assert choose(logits, Sampling(repetition_penalty=1.2), generator, [1]) == 2
    assert choose(logits, Sampling(top_k=1, top_p=0.1, min_p=1.0), generator) == 1
    assert torch.equal(generator.get_state(), before)
    assert logits.tolist() == pytest.approx([1.0, 3.0, 2.9]), "what came is left as it was"


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e300])
def test_no_temperature_is_too_extreme(temperature):
    found = probabilities(torch.tensor([1.0, 3.0, 2.0]), Sampling(temperature))
    assert torch.isfinite(found).all()
    assert int(found.argmax()) == 1 or temperature > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number_still_gives_a_token(bad, temperature):
    """A server can provoke it; whether generation stops there would depend on the private text."""
    for logits in ([bad, 1.0, 2.0], [bad] * 3):
        for sampling in (Sampling(temperature), Sampling(temperature, top_k=2, top_p=0.5, min_p=0.1)):
            assert choose(torch.tensor(logits), sampling, torch.Generator().manual_seed(1), [0]) in {0, 1, 2}
    if bad != math.inf:
        assert choose(torch.tensor([bad, 1.0, 90.0]), Sampling(temperature), torch.Generator().manual_seed(1)) == 2


@pytest.mark.parametrize("penalty", [5e-324, 1e-45, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_penalty_is_too_extreme(penalty, temperature):
    sampling = Sampling(temperature, repetition_penalty=penalty)
    assert choose(torch.tensor([0.0, 1.0, -2.0]), sampling, torch.Generator().manual_seed(1), [0, 1, 2]) in {0, 1, 2}


def test_every_fault_of_a_sampling_is_told_at_once():
    with pytest.raises(InputError, match="SS-1440") as caught:
        Sampling(-1.0, 1 << 64, 0, 0.0, 1.5, 0.0, ("",))
    assert len(caught.value.details) == 7
    for bad in (
        {"temperature": math.nan}, {"temperature": math.inf}, {"seed": 1.5}, {"seed": True}, {"top_k": 2.0}, {"top_k": -1}, {"top_p": 1.1},
        {"min_p": -0.1}, {"repetition_penalty": math.inf}, {"repetition_penalty": -1.0}, {"stop": "end"}, {"stop": ("a", 1)},
        {"stop": ("x" * 257,)}, {"stop": tuple("abcdefghijklmnopq")},
    ):  # fmt: skip
        with pytest.raises(InputError, match="SS-1440") as caught:
            Sampling(**bad)
        assert caught.value.details == ()
    assert Sampling(0.7, 3, 40, 0.9, 0.05, 1.1, ("\n\n",)).top_k == 40


def test_it_has_its_old_name_too():
    assert generate.Sampling is Sampling
