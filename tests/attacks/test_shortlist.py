"""The first list of a search: under noise the learnt ranking holds the right token more often than the linear map's."""

from __future__ import annotations

import math

import pytest
import torch

from attacks.config import config
from attacks.knowledge import learn
from attacks.prior import prior_from
from attacks.shortlist import proposals
from attacks.view import Key, Noise, PublicModel, ServerView, Sighting

V, T = 120, 10


@pytest.fixture(scope="module")
def known(fronts, draw):
    front, embedding = fronts(2)
    prior = prior_from([str(i) for i in range(300)], lambda i: draw(300, T, 2)[int(i)].tolist(), V)

    def make(sigma, clip=None):
        rows = torch.zeros(1, T, 32).numpy()
        view = ServerView((Sighting(Key("a", 0, 0), rows[0], rows[0], 1),), Noise(sigma, clip))
        profile = config().profiles["smoke"].model_copy(update={"rows": 1500})
        return learn(PublicModel(front, embedding), prior, view, profile)

    return make


def listed(propose, rows, tokens, count):
    """Share of positions whose token is among the first ``count``; a loop over positions, as the search goes."""
    hits = [(propose(rows[:, t], t, count) == tokens[:, t, None]).any(1).float().mean() for t in range(T)]
    return float(torch.stack(hits).mean())


def test_without_noise_the_ridge_ranks(known):
    place = known(0.0)
    assert proposals(place, 0.0) == place.inverter.propose


@pytest.mark.parametrize("clipped", [False, True])
def test_under_noise_the_learnt_list_holds_more(known, fronts, draw, clipped):
    front, _ = fronts(2)
    tokens = draw(60, T, 9)
    with torch.inference_mode():
        hidden = front(tokens)
    norms = hidden.flatten(1).norm(dim=1)
    clip = 0.5 * float(norms.median()) if clipped else None
    hidden = hidden if clip is None else hidden * (clip / norms).clamp_max(1)[:, None, None]
    sigma = 1.0 * float(hidden.square().mean().sqrt())
    place = known(sigma, clip)
    rows = (hidden + sigma * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))) / place.layer.factor
    propose = proposals(place, sigma)
    found = propose(rows[:, 1], 1, 7)
    assert found.shape == (60, 7)
    assert all(len(set(row)) == 7 for row in found.tolist()), "every token once"
    ours, ridges = listed(propose, rows, tokens, 8), listed(place.inverter.propose, rows, tokens, 8)
    assert ours >= ridges + 0.02, (ours, ridges)
    assert listed(propose, rows, tokens, V) == 1.0


def test_noise_that_drowns_everything_leaves_the_prior(known, draw):
    place = known(1e6)
    rows = 1e6 * torch.randn(40, T, 32, generator=torch.Generator().manual_seed(1))
    commonest = place.prior.log_probability.topk(8).indices
    share = (proposals(place, 1e6)(rows[:, 3], 3, 8)[..., None] == commonest).any(1).float().mean()
    assert float(share) > 0.8
    assert math.isfinite(float(share))
