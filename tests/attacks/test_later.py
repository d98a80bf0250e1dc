"""Later rows give a token away behind attention, and nothing at an embedding cut: there the answer is the prior, exactly."""

from __future__ import annotations

import itertools

import pytest
import torch

from attacks.config import config
from attacks.knowledge import learn
from attacks.later import ATTACKS, Settings, from_later_rows
from attacks.prior import prior_from
from attacks.ridge import fit
from attacks.threat import Threat
from attacks.view import Key, Noise, PublicModel, ServerView, Sighting
from attacks.vocabulary import Scoring

V, T, N = 120, 8, 10
SETTINGS = Settings(window=4, candidates=16, spoken=0, rounds=1)


@pytest.fixture(scope="module")
def world(fronts, draw):
    def make(layers):
        front, embedding = fronts(layers)
        tokens, public = draw(N, T, seed=1), draw(150, T, seed=2)
        prior = prior_from([str(i) for i in range(len(public))], lambda i: public[int(i)].tolist(), V)
        with torch.inference_mode():
            return front, embedding, tokens, front(tokens), public, prior

    return make


def name(place, noise, *, seed=0, rows=None, settings=SETTINGS, codec="f32", budget=10**9):
    front, embedding, tokens, hidden, public, prior = place
    _, layer = fit(front, embedding, public, noise)
    generator = torch.Generator().manual_seed(seed)
    rows = hidden + noise.sigma * torch.randn(hidden.shape, generator=generator) if rows is None else rows
    scoring = Scoring(noise.sigma, layer, None, prior.favourites, codec=codec)
    return from_later_rows(front, rows, tokens, scoring, prior.log_probability, settings, budget=budget)


def share(found, tokens):
    """Of the positions that have a later row."""
    return float((found == tokens)[:, :-1].float().mean())


@pytest.mark.parametrize("layers", [1, 2])
def test_behind_attention_later_rows_name_every_token(world, layers):
    place = world(layers)
    found = name(place, Noise(0.0, None))
    assert share(found, place[2]) == 1.0
    assert bool((found[:, -1] == place[5].favourites[0]).all()), "the last token has no later row"


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_at_an_embedding_cut_they_are_exactly_the_prior(world, sigma):
    place = world(0)
    found = name(place, Noise(sigma, None))
    assert bool((found == place[5].favourites[0]).all())


def test_the_row_itself_is_never_looked_at(world):
    """Oracle: garbage in row t changes nothing for t, whatever it does to the others."""
    place, noise = world(1), Noise(0.3, None)
    for position in (3,):
        rows = place[3] + noise.sigma * torch.randn(place[3].shape, generator=torch.Generator().manual_seed(4))
        spoilt = rows.clone()
        spoilt[:, position] = 100.0
        assert torch.equal(name(place, noise, rows=rows)[:, position], name(place, noise, rows=spoilt)[:, position])


def test_recovery_falls_with_the_noise_down_to_the_prior(world):
    place = world(1)
    rms = float(place[3].square().mean().sqrt())
    shares = [share(name(place, Noise(k * rms, None)), place[2]) for k in (0.001, 0.1, 100.0)]
    assert shares[0] > 0.9
    assert all(low <= high + 0.03 for high, low in itertools.pairwise(shares)), shares
    favourite = float((place[2][:, :-1] == place[5].favourites[0]).float().mean())
    assert abs(shares[2] - favourite) < 0.05


def test_rounding_to_int8_leaves_most_of_it(world):
    place = world(1)
    scale = place[3].abs().amax(-1, keepdim=True) / 127
    found = name(place, Noise(0.0, None), rows=(place[3] / scale).round() * scale, codec="int8")
    assert share(found, place[2]) > 0.8


def test_a_spent_budget_leaves_the_best_so_far(world):
    place = world(1)
    found = name(place, Noise(0.0, None), settings=Settings(window=2, candidates=1, spoken=0, rounds=0), budget=0)
    assert share(found, place[2]) < 0.5


def test_the_attack_recovers_what_it_hypothesises_by_itself(world):
    front, embedding, tokens, hidden, _, prior = world(1)
    view = ServerView(
        tuple(Sighting(Key("a", 0, i), row, row, 1) for i, row in enumerate(hidden.numpy())), Noise(0.0, None)
    )
    profile = config().profiles["smoke"].model_copy(update={"rows": 1200})
    known, told = learn(PublicModel(front, embedding), prior, view, profile), []
    attack = ATTACKS[0]
    assert attack.blocked(view, Threat()) is None
    answer = attack.run(view, known, lambda *now: told.append(now))
    assert share(torch.tensor(answer.tokens), tokens) == 1.0
    assert told[-1] == (N * T, N * T)
    assert attack.blocked(ServerView((), Noise(0.0, None)), Threat()) is not None
