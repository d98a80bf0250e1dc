"""The attack succeeds without noise, falls to the prior with much noise, and does what lies between in order."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks.candidates import Ranked
from attacks.likelihood import errors_of
from attacks.prior import prior_from, public_sequences
from attacks.ridge import fit
from attacks.view import Noise, fork
from attacks.vocabulary import Scoring, _Match, decode
from securesplit.cli.model import default_cache
from securesplit.data.corpus import read_corpus
from securesplit.model.architectures import architecture_of
from securesplit.model.parts import build_part
from securesplit.model.plan import CutPlan
from securesplit.model.resolve import resolve_model
from securesplit.model.store import load_tokenizer, load_whole

MULTIRC = Path(__file__).parents[3] / "shared" / "data" / "multirc"

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


def attack(world, noise, search, *, rows=None, posterior=False, propose=None, budget=10**9, codec="f32"):
    front, embedding, tokens, hidden, public, prior = world
    inverter, layer = fit(front, embedding, public, noise)
    scoring = Scoring(
        sigma=noise.sigma,
        layer=layer,
        log_prior=prior.log_probability if posterior else None,
        favourites=prior.favourites[: 32 if noise.sigma else 0],
        codec=codec,
    )
    answer = decode(
        front, released(hidden, noise) if rows is None else rows, propose or inverter.propose, scoring, search,
        vocabulary=V, budget=budget, candidates=32 if noise.sigma else None, estimate=None if propose else inverter.estimate,
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


def rounded(rows, codec):
    """Oracle: what crosses under a codec, by torch's own rounding."""
    if codec == "bf16":
        return rows.bfloat16().float()
    scale = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / scale).round() * scale


@pytest.mark.parametrize("codec", ["bf16", "int8"])
@pytest.mark.parametrize("layers", [0, 2])
def test_the_rounding_of_a_codec_hides_nothing(world, search, layers, codec):
    place = world(layers)
    answer, share = attack(place, Noise(0.0, None), search, rows=rounded(place[3], codec), codec=codec)
    assert share == 1.0
    assert answer.unresolved == 0


def test_without_knowing_the_codec_the_right_token_is_rejected(world, search):
    place, strict = world(2), search.model_copy(update={"exact": 1e-9, "drifted": 1e-9})
    rows = rounded(place[3], "int8")
    blind, _ = attack(place, Noise(0.0, None), strict, rows=rows)
    aware, share = attack(place, Noise(0.0, None), strict, rows=rows, codec="int8")
    assert blind.unresolved > 0
    assert (aware.unresolved, share) == (0, 1.0)


def test_rounding_beside_noise_counts_as_noise(world, search):
    """Rounding of half the noise's size: an attacker who knows it does not search on for what is not there."""
    place = world(1)
    clip = float(place[3].flatten(1).norm(dim=1).max())
    noise = Noise(0.02 * clip / math.sqrt(T * place[3].shape[-1]), clip)
    rows = rounded(released(place[3], noise), "int8")
    blind, _ = attack(place, noise, search, rows=rows, posterior=True)
    aware, share = attack(place, noise, search, rows=rows, posterior=True, codec="int8")
    assert share > 0.95
    assert aware.unresolved <= blind.unresolved
    assert aware.spent <= blind.spent


def test_descent_finds_what_a_failing_inverter_does_not_name(world, search):
    """The inverter's ranking is turned round; the token must come from the gradients, not from the whole vocabulary."""
    place = world(2)
    front, embedding, tokens, hidden, public, _ = place
    inverter, layer = fit(front, embedding, public, Noise(0.0, None))
    last = backwards(place)
    answer = decode(
        front, hidden, last, Scoring(0.0, layer, None, NONE), search, vocabulary=V, budget=10**9,
        candidates=64, estimate=inverter.estimate,
    )  # fmt: skip
    assert torch.equal(answer.tokens, tokens)
    descents = N * T * 112
    assert answer.spent <= descents, "no search went on beyond the descent"


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


@pytest.mark.parametrize("posterior", [False, True])
def test_k_releases_equal_one_release_with_sigma_over_root_k(world, search, posterior):
    """Paired by sequence: the mean difference lies within its own 99.9 % interval of zero, over several noises."""
    place = world(1)
    clip = 0.9 * float(place[3].flatten(1).norm(dim=1).median())
    noise = Noise(1.6 * clip / math.sqrt(T * place[3].shape[-1]), clip)
    assert noise.averaged(16).sigma == pytest.approx(noise.sigma / 4)
    differences = []
    for seed in range(2):
        mean = torch.stack([released(place[3], noise, 100 * seed + k) for k in range(16)]).mean(0)
        fresh = released(place[3], noise.averaged(16), 1000 + seed)
        many, one = (
            attack(place, noise.averaged(16), search, rows=rows, posterior=posterior)[0].tokens == place[2]
            for rows in (mean, fresh)
        )
        differences += (many.double().mean(1) - one.double().mean(1)).tolist()
    single = attack(place, noise, search, posterior=posterior)[1]
    spread = np.std(differences, ddof=1) / math.sqrt(len(differences))
    assert abs(np.mean(differences)) < 3.3 * spread
    assert spread < 0.04, "the interval says something"
    assert float(many.double().mean()) > single + 0.15


def test_candidates_are_scored_as_the_whole_model_would(world):
    """Oracle: no cache, no batch: each candidate's sequence through the front by itself."""
    front, embedding, tokens, hidden, public, _ = world(2)
    inverter, layer = fit(front, embedding, public, Noise(0.0, None))
    scoring = Scoring(0.0, layer, None, NONE)
    cache = front.new_cache()
    with torch.inference_mode():
        front(tokens[:, :5], cache=cache)
        match = _Match(
            front, cache, hidden[:, 5], scoring, errors=errors_of(hidden[:, 5], 0.0, "f32"),
            seen=torch.zeros(2, N, dtype=torch.float64), propose=Ranked(inverter.propose, hidden, 1.0, 8), position=5,
        )  # fmt: skip
        who, ids = torch.tensor([3, 7]), torch.tensor([[4, 9, 2], [1, 1, 80]])
        scored = match.scores(who, ids)
        for i, sequence in enumerate(who.tolist()):
            for j in range(3):
                whole = torch.cat([tokens[sequence, :5], ids[i, j : j + 1]])[None]
                state = front(whole)[0, -1]
                expected = float((state - hidden[sequence, 5]).square().sum())
                assert float(scored.distance[i, j]) == pytest.approx(expected, rel=1e-3, abs=1e-8)
                assert float(scored.size[i, j]) == pytest.approx(float(state.square().sum()), rel=1e-4)


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
        seen = torch.stack(((y * h).sum((1, 2)), h.square().sum((1, 2)))) / noise.sigma**2
        ranked = Ranked(inverter.propose, rows, layer.factor, 8)
        errors = errors_of(rows[:, prefix], noise.sigma, "f32")
        match = _Match(
            front, cache, rows[:, prefix], scoring, errors=errors, seen=seen, propose=ranked, position=prefix
        )
        ids = torch.tensor([[3, 50, 110, 7]])
        score = match.scores(torch.tensor([0]), ids).score[0].double().numpy()
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


@pytest.fixture(scope="module")
def pretrained():
    """``pretrained(cut)``: partition A of the 135M model; its embedding; 5 passages of 24 tokens; public text's prior."""
    if not MULTIRC.is_dir():
        pytest.skip("the shared research data sets are not on this machine")
    directory = resolve_model("smollm2-135m", default_cache(), CutPlan(2, 2))
    whole, tokenizer = load_whole(directory), load_tokenizer(directory)
    tensors = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    embedding = whole.get_input_embeddings().weight.detach()
    public = [record.text for record in read_corpus(MULTIRC / "train.jsonl")]
    prior = prior_from(public, tokenizer.encode, len(embedding))
    passages = [record.text for record in read_corpus(MULTIRC / "val.jsonl") if record.text not in set(public)]
    tokens = torch.tensor([tokenizer.encode(text)[:24] for text in passages[:5]])

    def cut(layers):
        return build_part("front", whole.config, architecture_of(whole.config), range(layers), tensors.get)

    return cut, embedding, tokens, prior


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 4, 8])
def test_unprotected_passages_are_read_whole_behind_any_cut_and_codec(pretrained, search, layers):
    cut, embedding, tokens, prior = pretrained
    front = cut(layers)
    with torch.inference_mode():
        hidden = front(tokens)
    inverter, layer = fit(front, embedding, public_sequences(prior, 12_000, 24), Noise(0.0, None))
    for codec in ("f32", "bf16", "int8"):
        start = time.process_time()
        answer = decode(
            front, hidden if codec == "f32" else rounded(hidden, codec), inverter.propose,
            Scoring(0.0, layer, None, NONE, codec=codec), search, vocabulary=len(embedding), budget=200_000,
            estimate=inverter.estimate,
        )  # fmt: skip
        share = float((answer.tokens == tokens).double().mean())
        assert share == 1.0 if codec == "f32" else share >= 0.95, (codec, share)
        assert (time.process_time() - start) / tokens.numel() < 1.0, "seconds of one processor per token"
