"""The client's skip: exact mixtures, weights that are found again, and a gate that stays shut when it should."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.model.fusion import (
    LAGS,
    Evidence,
    Gate,
    fit_gate,
    fit_weight,
    lower_bound,
    mismatches,
    mix,
)


def random_log_p(*shape, seed, low=0.001, high=0.9):
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(*shape, dtype=torch.float64).uniform_(low, high, generator=generator).log()


@settings(deadline=None, max_examples=50)
@given(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0), st.floats(0.0, 1.0))
def test_a_mixture_is_the_arithmetic_mean_of_probabilities(mine, theirs, weight):
    found = mix(torch.tensor(mine, dtype=torch.float64).log(), torch.tensor(theirs, dtype=torch.float64).log(), weight)
    assert math.exp(found) == pytest.approx((1 - weight) * mine + weight * theirs, rel=1e-9)


def test_a_weight_of_zero_is_the_client_alone_even_when_the_server_is_certain_of_the_wrong():
    client, server = torch.tensor([-1.5, -0.2]), torch.tensor([-math.inf, -800.0])
    assert torch.equal(mix(client, server, 0.0), client)
    assert torch.equal(mix(client, torch.tensor([-1.0, -2.0]), 1.0), torch.tensor([-1.0, -2.0]))


def test_the_lower_bound_of_equal_gains_is_the_gain_and_of_one_gain_is_nothing():
    assert lower_bound(torch.full((9,), 0.25)) == pytest.approx(0.25)
    assert lower_bound(torch.tensor([3.0])) == -math.inf
    gains = torch.tensor([0.0, 2.0, 0.0, 2.0])
    assert lower_bound(gains) == pytest.approx(1.0 - 1.645 * math.sqrt(4 / 3) / 2)


def test_the_best_weight_is_found_against_a_grid():
    client, server = random_log_p(24, 30, seed=1), random_log_p(24, 30, seed=2)
    fit = fit_weight(client, server)
    grid = [float(mix(client, server, w / 1000).mean()) for w in range(1001)]
    assert fit.weight == pytest.approx(max(range(1001), key=grid.__getitem__) / 1000, abs=2e-3)
    assert 0 < fit.margin < fit.gain


def test_a_server_that_knows_nothing_gets_no_weight():
    client = random_log_p(24, 30, seed=1, low=0.2)
    fit = fit_weight(client, client - 3.0)
    assert fit.weight == 0.0
    assert fit.margin <= 0


@pytest.mark.parametrize("seed", range(6))
def test_a_gain_on_few_sequences_does_not_open_the_gate(seed):
    # One sequence of sixteen gains much, the others nothing: a mean gain, but no confidence.
    client = random_log_p(16, 20, seed=seed, low=0.3)
    server = client - 2.0
    server[seed] = 0.0
    assert fit_weight(client, server).weight == 0.0


def naive_mismatches(guessed, truth):
    out = []
    for guess, true in zip(guessed.tolist(), truth.tolist(), strict=True):
        rows = []
        for one in guess:
            wrong = [a != b for a, b in zip(one, true, strict=True)][::-1]
            bins = [wrong[start:stop] for start, stop in LAGS]
            rows.append([sum(b) / len(b) if b else 0.0 for b in bins])
        out.append(rows)
    return torch.tensor(out)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(0, 999))
def test_mismatches_count_wrong_tokens_by_distance(length, seed):
    generator = torch.Generator().manual_seed(seed)
    guessed = torch.randint(3, (2, 4, length), generator=generator)
    truth = torch.randint(3, (2, length), generator=generator)
    assert torch.allclose(mismatches(guessed, truth), naive_mismatches(guessed, truth), atol=1e-6)


def scene(count=24, length=40, answers=3, seed=0):
    """One of three answers is good at each position, and a feature tells which; the client is mediocre."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.randint(answers, (count, length), generator=generator)
    wrong = torch.nn.functional.one_hot(right, answers) == 0
    server = torch.where(wrong, math.log(0.001), math.log(0.8)).double()
    client = torch.full((count, length), math.log(0.1)).double()
    evidence = Evidence(wrong.double()[..., None], client[..., None], torch.ones_like(wrong))
    return evidence, client, server


def test_a_gate_learns_to_pick_the_answer_that_the_evidence_favours():
    evidence, client, server = scene()
    fit = fit_gate(evidence, client, server, decay=1e-4)
    assert fit.gate.open
    assert -fit.gate.mix(evidence, client, server).mean() < 0.3  # 0.22 is the good answer alone, 1.32 a blind pick.
    assert fit.margin > 1.5
    weights = fit.gate.log_weights(evidence).exp()
    assert torch.allclose(weights.sum(-1), torch.ones_like(client))
    assert weights[..., 1:][evidence.server[..., 0] == 0].mean() > 0.9


def test_a_gate_that_gains_nothing_stays_shut_and_is_the_client_bit_by_bit():
    evidence, client, _ = scene()
    server = torch.full((*client.shape, 3), math.log(0.01)).double()
    fit = fit_gate(evidence, client, server)
    assert not fit.gate.open
    assert torch.allclose(fit.gate.mix(evidence, client, server), client, atol=0, rtol=1e-12)


def test_an_absent_answer_gets_no_weight_whatever_stands_in_its_place():
    evidence, client, server = scene()
    fit = fit_gate(evidence, client, server)
    present = evidence.present.clone()
    present[..., 1] = False
    some = Evidence(evidence.server, evidence.client, present)
    spoiled = server.clone()
    spoiled[..., 1] = -math.inf
    assert (fit.gate.log_weights(some)[..., 2] == -math.inf).all()
    assert fit.gate.mix(some, client, spoiled).isfinite().all()


def test_a_gate_mixes_probabilities_by_its_weights():
    evidence, client, server = scene(count=2, length=3)
    gate = Gate(torch.tensor([-1.0]).double(), torch.tensor([0.5]).double(), torch.tensor(0.25).double())
    for s in range(2):
        for t in range(3):
            scores = [0.5 * float(evidence.client[s, t, 0])]
            scores += [0.25 - float(evidence.server[s, t, k, 0]) for k in range(3)]
            weight = [math.exp(x) / sum(map(math.exp, scores)) for x in scores]
            answers = [math.exp(client[s, t]), *(math.exp(server[s, t, k]) for k in range(3))]
            expected = sum(w * p for w, p in zip(weight, answers, strict=True))
            assert math.exp(gate.mix(evidence, client, server)[s, t]) == pytest.approx(expected, rel=1e-9)
