"""Texts that the tiny model writes itself: its prior is then the true one, and a decoder that knows it must gain by it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attacks import beam
from attacks.beam import RULES, Settings, answers, best_rule
from attacks.config import config, settings_of
from attacks.knowledge import learn
from attacks.language import Reader
from attacks.likelihood import errors_of, log_evidence
from attacks.particles import kept
from attacks.prior import prior_from
from attacks.refine import Effort, refine
from attacks.threat import Threat
from attacks.view import Key, Noise, PublicModel, ServerView, Sighting
from attacks.vocabulary import Scoring
from securesplit.model.bayes import Prior
from securesplit.model.store import load_front, load_whole

V, T, N = 120, 8, 10
SENTINEL = 0


@pytest.fixture(scope="module")
def settings():
    return settings_of("beamclean", Settings).model_copy(update={"share": 0.1, "validation": 4, "hypotheses": 6})


@pytest.fixture(scope="module")
def whole(model_dirs):
    return load_whole(model_dirs(2))


def written(whole, count, seed):
    """(count, T) tokens that the model writes behind the sentinel, sampled; without a cache: an oracle for ours."""
    generator, ids = torch.Generator().manual_seed(seed), torch.full((count, 1), SENTINEL)
    with torch.inference_mode():
        for _ in range(T):
            chance = torch.softmax(whole(ids).logits[:, -1], dim=-1)
            ids = torch.cat([ids, torch.multinomial(chance, 1, generator=generator)], dim=1)
    return ids[:, 1:]


@pytest.fixture(scope="module")
def world(model_dirs, whole):
    """``world(layers, level)``: private tokens, their rows with noise of ``level`` times their rms, the view, knowledge."""
    tokens, public = written(whole, N, 1), written(whole, 300, 2)
    prior = prior_from([str(i) for i in range(len(public))], lambda i: public[int(i)].tolist(), V)

    def make(layers, level, *, seed=0, releases=1):
        front = load_front(model_dirs(layers))
        with torch.inference_mode():
            hidden = front(tokens)
        clip = 0.9 * float(hidden.flatten(1).norm(dim=1).median())
        noise = Noise(level * clip / math.sqrt(T * hidden.shape[-1]), clip)
        factor = (clip / hidden.flatten(1).norm(dim=1)).clamp_max(1)[:, None, None]
        generator = torch.Generator().manual_seed(seed)
        fresh = [
            factor * hidden + noise.sigma * torch.randn(hidden.shape, generator=generator) for _ in range(releases)
        ]
        mean = torch.stack(fresh).mean(0)
        view = ServerView(
            sightings=tuple(Sighting(Key("a", 0, i), fresh[0][i].numpy(), mean[i].numpy(), releases) for i in range(N)),
            noise=noise,
        )
        model = PublicModel(
            front, front.base.get_input_embeddings().weight.detach(), whole=lambda: whole, sentinel=SENTINEL
        )
        profile = config().profiles["smoke"].model_copy(update={"candidates": 24, "rows": 1500})
        return SimpleNamespace(
            tokens=tokens, rows=fresh[0], mean=mean, noise=noise, view=view, known=learn(model, prior, view, profile)
        )

    return make


def share(found, place):
    return float((found == place.tokens).float().mean())


def every(place, settings, rows=None, noise=None):
    return answers(place.known, place.rows if rows is None else rows, noise or place.noise, settings, codec="f32")


@pytest.mark.parametrize("layers", [0, 2])
def test_with_hardly_any_noise_every_answer_is_the_text(world, settings, layers):
    place = world(layers, 0.01)
    found = every(place, settings)
    assert set(found) == set(RULES)
    assert {rule: share(tokens, place) for rule, tokens in found.items()} == dict.fromkeys(RULES, 1.0)


def test_a_language_prior_gains_over_the_greedy_unigram_where_the_noise_bites(world, settings):
    gains = []
    for layers, level, seed in ((1, 1.0, 1), (1, 1.5, 2)):
        place = world(layers, level, seed=seed)
        found = every(place, settings)
        gains.append(share(found["refined"], place) - share(found["greedy"], place))
    assert np.mean(gains) > 0.03, gains


def test_recovery_falls_with_the_noise_down_to_the_prior(world, settings):
    shares = []
    for level in (0.05, 1000.0):
        place = world(1, level)
        found = every(place, settings)
        shares.append(share(found[best_rule(place.known, T, place.noise, settings, codec="f32")], place))
    assert shares[0] >= 0.99
    favourite = float((place.tokens == int(place.known.prior.favourites[0])).float().mean())
    # 80 tokens: a standard error of about 0.04.
    assert shares[1] <= favourite + 0.13


def test_the_mean_of_releases_is_attacked_at_the_noise_that_is_left(world, settings):
    place = world(1, 3.0, releases=16)
    averaged = every(place, settings, rows=place.mean, noise=place.noise.averaged(16))["refined"]
    assert share(averaged, place) > share(every(place, settings)["refined"], place) + 0.2


def test_the_attack_answers_for_every_row_of_the_view(world, settings, monkeypatch):
    monkeypatch.setattr(beam, "settings_of", lambda *_: settings)
    place, told = world(1, 0.2, releases=2), []
    for attack in beam.ATTACKS:
        assert attack.blocked(place.view, Threat()) is None
        answer = attack.run(place.view, place.known, lambda *now: told.append(now))
        assert [key.row for key in answer.keys] == list(range(N))
        assert share(torch.tensor(answer.tokens), place) > 0.9
    assert told[-1] == (N * T, N * T)
    assert "one release" in str(beam.ATTACKS[1].blocked(place.view, Threat(releases=1)))
    bare = ServerView(place.view.sightings, Noise(0.0, None))
    assert "no noise" in str(beam.ATTACKS[0].blocked(bare, Threat()))


def test_without_a_language_model_the_unigram_serves(world, settings):
    place = world(1, 0.05)
    known = learn(
        PublicModel(place.known.model.front, place.known.model.embedding),
        place.known.prior,
        place.view,
        place.known.profile,
    )
    found = answers(known, place.rows, place.noise, settings, codec="f32")
    assert share(found["refined"], place) >= share(found["greedy"], place) > 0.95


def joint(place, whole, tokens, settings):
    """Oracle: the joint log posterior without caches: rows through A, and the language model, by whole sequences."""
    rows, layer = place.rows.double(), place.known.layer
    with torch.inference_mode():
        h = place.known.model.front(tokens).double()
        logits = whole(torch.cat([torch.full((len(tokens), 1), SENTINEL), tokens], 1)).logits[:, :-1]
    mixed = (1 - settings.share) * torch.softmax(logits, -1) + settings.share * place.known.prior.log_probability.exp()
    prior = mixed.log().gather(2, tokens[..., None])[..., 0].double().sum(1)
    cross, energy = (rows * h).sum((1, 2)) / place.noise.sigma**2, h.square().sum((1, 2)) / place.noise.sigma**2
    return log_evidence(cross, energy, layer) + prior


def test_refining_raises_the_joint_posterior_and_mends_planted_faults(world, whole, settings):
    place = world(2, 0.3)
    found = every(place, settings)
    broken = place.tokens.clone()
    broken[:, 4] = (broken[:, 4] + 7) % V
    shortlist = torch.stack([place.tokens, found["marginal"], found["greedy"]], dim=2)
    scoring = Scoring(place.noise.sigma, place.known.layer, None, torch.empty(0, dtype=torch.long))
    reader = Reader(whole, SENTINEL, Prior(place.known.prior.log_probability, settings.share), N)
    effort = Effort(sweeps=3, window=T, spoken=T, margin=1e9)
    mended = refine(place.known.model.front, reader, place.rows, broken, shortlist, scoring, effort)
    assert share(mended, place) > share(broken, place)
    assert bool((joint(place, whole, mended, settings) >= joint(place, whole, broken, settings) - 1e-3).all())
    again = refine(place.known.model.front, reader, place.rows, mended, shortlist, scoring, effort)
    assert torch.equal(again, mended), "a maximum stays where it is"


def test_the_reader_says_what_the_whole_model_says(whole, world, settings):
    place = world(1, 1.0)
    prior = Prior(place.known.prior.log_probability, settings.share)
    reader, tokens = Reader(whole, SENTINEL, prior, N), place.tokens
    with torch.inference_mode():
        for position in range(3):
            reader.read(tokens[:, position])
        twin = reader.twin()
        twin.read(tokens[:, 3])
        who = torch.tensor([5, 5, 0])
        spoken = reader.continuation(who, tokens[who, 3:7])
        logits = whole(torch.cat([torch.full((N, 1), SENTINEL), tokens], 1)).logits
        mixed = (1 - prior.share) * torch.softmax(logits, -1) + prior.share * prior.log_unigram.exp()
    assert reader.next.exp() == pytest.approx(mixed[:, 3].numpy(), abs=1e-5)
    expected = mixed[:, 3:7].log().gather(2, tokens[:, 3:7, None])[..., 0].sum(1)[who]
    assert spoken.numpy() == pytest.approx(expected.numpy(), abs=1e-3)


def test_what_is_kept_is_unbiased_and_keeps_the_heavy_ones():
    """Oracle: the mean of the kept weights over many draws is the weights themselves."""
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([[0.5, 0.2, 0.1, 0.06, 0.05, 0.04, 0.03, 0.02, 0.0]], dtype=torch.float64)
    total = torch.zeros(9, dtype=torch.float64)
    for _ in range(4000):
        index, weight = kept(p.log(), 4, generator)
        assert set(index[0, :2].tolist()) == {0, 1}
        assert len(set(index[0].tolist())) == 4
        total[index[0]] += weight[0].exp()
    assert total / 4000 == pytest.approx(p[0].numpy(), abs=0.01)
    index, weight = kept(p.log()[:, :3], 5, generator)
    assert weight[0, 3:].isneginf().all()
    assert weight[0, :3].exp().sum() == pytest.approx(1.0)
    lonely, weight = kept(torch.tensor([[0.0, -math.inf, -math.inf]]), 2, generator)
    assert int(lonely[0, 0]) == 0
    assert weight[0].tolist() == [0.0, -math.inf]


def test_the_errors_of_a_codec_hold_what_it_rounds():
    """Oracle: rounding itself, by torch's bfloat16 and by the int8 rule."""
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 64)
    scale = rows.abs().amax(-1, keepdim=True) / 127
    for codec, seen in (("bf16", rows.bfloat16().float()), ("int8", (rows / scale).round() * scale)):
        errors = errors_of(seen, 0.0, codec)
        assert bool(((seen - rows).abs() <= errors.half * (1 + 1e-5)).all()), codec
        assert bool(((seen - rows).square().sum(-1) <= errors.ball()).all())
        assert bool(errors.boxed(seen, rows[:, None]).all())
        assert not bool(errors.boxed(seen, rows.roll(1, 0)[:, None]).any())
