"""The attack succeeds without noise, falls to the prior with much noise, and does what lies between in order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from attacks.prior import prior_from
from attacks.ridge import fit
from attacks.view import Noise, fork
from attacks.vocabulary import Scoring, _Match, _Ranked, decode

V, T, N = 120, 12, 24
NONE = torch.empty(0, dtype=torch.long)


@pytest.fixture(scope="module")
def world(fronts, draw):
    """``world(layers)``: front, embedding, private tokens and their states, public sequences, prior."""

    def make(layers):
        front, embedding = fronts(layers)
        tokens = draw(N, T, seed=1)
        with torch.inference_mode():
            hidden = front(tokens)
        public = draw(200, T, seed=2)
        prior = prior_from([str(i) for i in range(len(public))], lambda i: public[int(i)].tolist(), V)
        return front, embedding, tokens, hidden, public, prior

    return make


def released(hidden, noise, seed=0):
    if noise.clip is None:
        return hidden.clone()
    factor = (noise.clip / hidden.flatten(1).norm(dim=1)).clamp_max(1)[:, None, None]
    generator = torch.Generator().manual_seed(seed)
    return hidden * factor + noise.sigma * torch.randn(hidden.shape, generator=generator)


def attack(world, noise, search, *, rows=None, posterior=False, propose=None, budget=10**9):
    front, embedding, tokens, hidden, public, prior = world
    inverter, layer = fit(front, embedding, public, noise)
    scoring = Scoring(
        sigma=noise.sigma,
        layer=layer,
        log_prior=prior.log_probability if posterior else None,
        favourites=prior.favourites[: 32 if noise.sigma else 0],
    )
    answer = decode(
        front, released(hidden, noise) if rows is None else rows, propose or inverter.propose, scoring, search,
        vocabulary=V, budget=budget, candidates=32 if noise.sigma else None,
    )  # fmt: skip
    return answer, float((answer.tokens == tokens).float().mean())


def backwards(world):
    """Proposals that name the right token last, whatever the row: the worst inverter there is."""
    front, embedding, _, _, public, _ = world
    inverter, _ = fit(front, embedding, public, Noise(0.0, None))

    def propose(rows, position, count):
        return inverter.propose(rows, position, V).flip(1)[:, :count]

    return propose


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_without_noise_every_token_is_found(world, search, layers):
    answer, share = attack(world(layers), Noise(0.0, None), search)
    assert share == 1.0
    assert answer.unresolved == 0


@pytest.mark.parametrize("layers", [1, 2])
def test_a_failing_inverter_costs_time_but_nothing_else(world, search, layers):
    place = world(layers)
    answer, share = attack(place, Noise(0.0, None), search, propose=backwards(place))
    assert share == 1.0
    assert answer.unresolved == 0
    assert answer.spent > 0, "the search had to widen"


def test_a_spent_budget_is_admitted(world, search):
    place = world(1)
    answer, share = attack(place, Noise(0.0, None), search, propose=backwards(place), budget=0)
    assert share < 0.9
    assert answer.unresolved > 0
    assert answer.spent == 0


def test_rounding_to_bfloat16_hides_nothing(world, search):
    place = world(2)
    _, share = attack(place, Noise(0.0, None), search, rows=place[3].bfloat16().float())
    assert share == 1.0


def test_small_drift_of_the_adapters_is_tolerated(world, search):
    place = world(2)
    generator = torch.Generator().manual_seed(5)
    drift = torch.randn(place[3].shape, generator=generator)
    scale = 0.02 * place[3].norm(dim=-1, keepdim=True) / drift.norm(dim=-1, keepdim=True)
    _, share = attack(place, Noise(0.0, None), search, rows=place[3] + drift * scale)
    assert share >= 0.99


def test_recovery_falls_with_the_noise_down_to_the_prior(world, search):
    place = world(1)
    clip = 0.9 * float(place[3].flatten(1).norm(dim=1).median())
    rms = clip / math.sqrt(T * place[3].shape[-1])
    shares = [attack(place, Noise(k * rms, clip), search, posterior=True)[1] for k in (0.02, 0.3, 1.0, 100.0)]
    assert shares[0] >= 0.97
    assert all(low <= high + 0.03 for high, low in itertools.pairwise(shares)), shares
    favourite = int(place[5].favourites[0])
    prior = float((place[2] == favourite).float().mean())
    assert abs(shares[-1] - prior) < 0.08, "with everything hidden the posterior names the commonest token"


def test_the_posterior_beats_the_nearest_neighbour(world, search):
    place = world(1)
    clip = 0.9 * float(place[3].flatten(1).norm(dim=1).median())
    rms = clip / math.sqrt(T * place[3].shape[-1])
    near, posterior = [], []
    for k, seed in ((0.5, 1), (0.7, 2), (1.0, 3)):
        noise = Noise(k * rms, clip)
        rows = released(place[3], noise, seed)
        near.append(attack(place, noise, search, rows=rows)[1])
        posterior.append(attack(place, noise, search, rows=rows, posterior=True)[1])
    assert np.mean(posterior) > np.mean(near)
    assert 0.1 < np.mean(posterior) < 0.98, "a noise level at which the two could differ"


def test_averaging_k_releases_is_one_release_with_less_noise(world, search):
    place = world(1)
    clip = 0.9 * float(place[3].flatten(1).norm(dim=1).median())
    noise = Noise(1.6 * clip / math.sqrt(T * place[3].shape[-1]), clip)
    mean = torch.stack([released(place[3], noise, seed) for seed in range(16)]).mean(0)
    averaged = attack(place, noise.averaged(16), search, rows=mean, posterior=True)[1]
    once = attack(place, noise.averaged(16), search, posterior=True)[1]
    single = attack(place, noise, search, posterior=True)[1]
    assert noise.averaged(16).sigma == pytest.approx(noise.sigma / 4)
    # 288 tokens in 24 sequences: standard errors of about 0.03 each.
    assert abs(averaged - once) < 0.1
    assert averaged > single + 0.2


def test_candidates_are_scored_as_the_whole_model_would(world):
    """Oracle: no cache, no batch: each candidate's sequence through the front by itself."""
    front, embedding, tokens, hidden, public, _ = world(2)
    inverter, layer = fit(front, embedding, public, Noise(0.0, None))
    scoring = Scoring(0.0, layer, None, NONE)
    cache = front.new_cache()
    with torch.inference_mode():
        front(tokens[:, :5], cache=cache)
        match = _Match(
            front, cache, hidden[:, 5], scoring,
            seen=torch.zeros(2, N, dtype=torch.float64), propose=_Ranked(inverter.propose, hidden, 1.0, 8), position=5,
        )  # fmt: skip
        who, ids = torch.tensor([3, 7]), torch.tensor([[4, 9, 2], [1, 1, 80]])
        _, distance, size = match.scores(who, ids)
        for i, sequence in enumerate(who.tolist()):
            for j in range(3):
                whole = torch.cat([tokens[sequence, :5], ids[i, j : j + 1]])[None]
                state = front(whole)[0, -1]
                expected = float((state - hidden[sequence, 5]).square().sum())
                assert float(distance[i, j]) == pytest.approx(expected, rel=1e-3, abs=1e-8)
                assert float(size[i, j]) == pytest.approx(float(state.square().sum()), rel=1e-4)


def test_forking_leaves_the_cache_alone(world):
    front, _, tokens, _, _, _ = world(2)
    cache = front.new_cache()
    with torch.inference_mode():
        front(tokens[:4, :3], cache=cache)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.past.layers]
        twin = fork(cache, torch.tensor([0, 0, 2]))
        front(torch.tensor([[5], [6], [7]]), cache=twin)
    assert (cache.length, twin.length) == (3, 4)
    for layer, (keys, values) in zip(cache.past.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_the_posterior_is_the_integral_over_the_clipping_factor(world):
    """Oracle: numerical integration of the Gaussian likelihood over s, on a grid."""
    front, embedding, tokens, hidden, public, prior = world(1)
    noise = Noise(0.4, 0.5 * float(hidden.flatten(1).norm(dim=1).median()))
    inverter, layer = fit(front, embedding, public, noise)
    rows = released(hidden, noise)
    scoring = Scoring(noise.sigma, layer, prior.log_probability, NONE)
    prefix, cache = 4, front.new_cache()
    with torch.inference_mode():
        front(tokens[:, :prefix], cache=cache)
        y, h = rows[:, :prefix].double(), hidden[:, :prefix].double()
        seen = torch.stack(((y * h).sum((1, 2)), h.square().sum((1, 2))))
        ranked = _Ranked(inverter.propose, rows, layer.factor, 8)
        match = _Match(front, cache, rows[:, prefix], scoring, seen=seen, propose=ranked, position=prefix)
        ids = torch.tensor([[3, 50, 110, 7]])
        score = match.scores(torch.tensor([0]), ids)[0][0].double().numpy()
        states = (
            torch.stack([front(torch.cat([tokens[0, :prefix], i[None]])[None])[0] for i in ids[0]]).double().numpy()
        )
    s = np.linspace(layer.factor - 12 * layer.factor_std, layer.factor + 12 * layer.factor_std, 20001)
    target = rows[0, : prefix + 1].double().numpy()
    expected = []
    for i, state in zip(ids[0].tolist(), states, strict=True):
        misfit = (target**2).sum() - 2 * s * (target * state).sum() + s**2 * (state**2).sum()
        exponent = -misfit / (2 * noise.sigma**2) - (s - layer.factor) ** 2 / (2 * layer.factor_std**2)
        peak = exponent.max()
        expected.append(peak + math.log(np.exp(exponent - peak).sum()) + float(prior.log_probability[i]))
    assert score - score[0] == pytest.approx(np.array(expected) - expected[0], abs=2e-3)
