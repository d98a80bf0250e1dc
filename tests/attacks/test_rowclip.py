"""Under unit ``token`` rows are clipped one by one: attacks simulate that, or they would look for rows that never crossed."""

from __future__ import annotations

import pytest
import torch

from attacks.config import config
from attacks.knowledge import learn
from attacks.matching import ATTACKS
from attacks.prior import prior_from
from attacks.rowclip import row_clipped
from attacks.view import Key, Noise, PublicModel, ServerView, Sighting, noise_of
from securesplit.policy.schema import Policy

V, T, N = 120, 8, 10


def test_the_front_clips_each_row_and_knows_its_cache(fronts, draw):
    front, _ = fronts(2)
    tokens = draw(4, T, 5)
    with torch.inference_mode():
        plain = front(tokens).double()
        norms = plain.norm(dim=2, keepdim=True)
        bound = float(norms.median())
        short = row_clipped(front, bound)
        expected = plain * (bound / norms).clamp(max=1)
        cache = short.new_cache()
        stepwise = torch.cat([short(tokens[:, :3], cache=cache), short(tokens[:, 3:], cache=cache)], 1)
    assert float((stepwise - expected).abs().max()) < 1e-4
    assert row_clipped(front, None) is front
    assert len(list(short.parameters())) == len(list(front.parameters())), "no weight twice"


@pytest.mark.parametrize("name", ["vocabulary-nn", "vocabulary-map"])
def test_rows_that_were_clipped_one_by_one_are_recovered(fronts, draw, name):
    """With the noise of a hundredth of the clip the tokens are known, though most rows lost most of their length."""
    front, embedding = fronts(2)
    tokens = draw(N, T, 1)
    with torch.inference_mode():
        plain = front(tokens)
    norms = plain.norm(dim=2, keepdim=True)
    bound = 0.3 * float(norms.min())
    sigma = 0.01 * bound / plain.shape[-1] ** 0.5
    rows = plain * (bound / norms) + sigma * torch.randn(plain.shape, generator=torch.Generator().manual_seed(2))
    sightings = tuple(Sighting(Key("a", 0, i), rows[i].numpy(), rows[i].numpy(), 1) for i in range(N))
    view = ServerView(sightings, Noise(sigma, None, bound))
    prior = prior_from([str(i) for i in range(200)], lambda i: draw(200, T, 3)[int(i)].tolist(), V)
    attack = next(a for a in ATTACKS if a.name == name)

    def share(front):
        profile = config().profiles["smoke"].model_copy(update={"rows": 1200})
        known = learn(PublicModel(front, embedding), prior, view, profile)
        found = torch.tensor(attack.run(view, known, lambda done, total: None).tokens)
        return float((found == tokens).float().mean())

    aware = share(row_clipped(front, bound))
    assert aware > 0.99
    assert aware >= share(front), "who ignores the clip does not do better"


def test_the_policys_bound_reaches_the_noise(private):
    rules = private(8.0, 10.0).model_dump(mode="json")
    rules["privacy"]["unit"] = "token"
    rules["privacy"]["relation"] = "replace-one"
    noise = noise_of(Policy.model_validate(rules, strict=False), 1)
    assert (noise.clip, noise.row_clip) == (None, 10.0)
    assert noise.averaged(4).row_clip == 10.0
