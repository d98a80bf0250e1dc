"""Which attacks run on which view, and that averaging uses what order links."""

from __future__ import annotations

import numpy as np
import pytest

from attacks.config import config
from attacks.knowledge import Knowledge, learn
from attacks.prior import prior_from
from attacks.suite import all_attacks, fitting
from attacks.suite import run as suite_run
from attacks.threat import Threat
from attacks.view import Key, Noise, PublicModel, ServerView, Sighting
from securesplit.errors import InputError

CLIP = 20.0


def sighting(number, rows, linked, releases):
    return Sighting(Key("p", number, 0), rows.astype(np.float32), linked.astype(np.float32), releases)


def view(sigma, releases=1):
    rows = np.zeros((4, 8))
    return ServerView((sighting(0, rows, rows, releases),), Noise(sigma, CLIP if sigma else None))


SMOKE = config().profiles["smoke"]


def names(view, wanted=(), threat=None):
    chosen, skipped = fitting(view, wanted, threat or Threat(), SMOKE)
    return tuple(a.name for a in chosen), {s.attack: s.why for s in skipped}


def test_the_attacks_fit_the_view():
    bare, left_out = names(view(0.0))
    assert bare[:2] == ("ridge", "vocabulary-nn")
    assert "there is no noise" in left_out["vocabulary-map"]
    assert {"ridge", "vocabulary-nn", "vocabulary-map"} <= set(names(view(1.0))[0])
    assert "averaged-map" in names(view(1.0, 3))[0]
    assert names(view(1.0), ("vocabulary-map", "ridge", "ridge"))[0] == ("ridge", "vocabulary-map")
    with pytest.raises(InputError) as caught:
        names(view(1.0), ("averaged-map",))
    assert caught.value.code == "SS-1704"


def test_what_is_not_run_is_named_with_its_reason():
    """Every attack of the release is either run or left out for a reason."""
    chosen, left_out = names(view(1.0), threat=Threat(weights="none"))
    assert set(chosen) | set(left_out) == set(config().attacks)
    assert not set(chosen) & set(left_out)
    assert "'none' weights" in left_out["ridge"]


def test_every_attack_has_a_note_and_every_note_an_attack():
    assert [a.name for a in all_attacks()]
    assert {a.name for a in all_attacks()} == set(config().attacks)


def run(name, view, known, report):
    attack = next(a for a in all_attacks() if a.name == name)
    return suite_run(attack, view, known, report)


@pytest.fixture(scope="module")
def repeated(fronts, draw) -> tuple[Knowledge, ServerView, np.ndarray]:
    """Sixteen fresh releases of each of twelve records, and what an attacker knows."""
    front, embedding = fronts(1)
    tokens = draw(12, 10, seed=1)
    hidden = front(tokens).detach().numpy()
    hidden *= np.minimum(1, CLIP / np.linalg.norm(hidden.reshape(12, -1), axis=1))[:, None, None]
    sigma = 1.5 * CLIP / np.sqrt(10 * hidden.shape[-1])
    releases = hidden + sigma * np.random.default_rng(1).standard_normal((16, *hidden.shape))
    seen = ServerView(
        tuple(sighting(i, releases[0, i], releases[:, i].mean(0), 16) for i in range(12)), Noise(float(sigma), CLIP)
    )
    public = draw(150, 10, seed=2)
    prior = prior_from([str(i) for i in range(150)], lambda i: public[int(i)].tolist(), len(embedding))
    known = learn(PublicModel(front, embedding), prior, seen, SMOKE)
    return known, seen, tokens.numpy()


def test_averaging_recovers_more_than_one_release(repeated):
    known, seen, tokens = repeated
    told = []
    shares = {
        name: np.mean(np.array(run(name, seen, known, told.append).tokens) == tokens)
        for name in ("ridge", "vocabulary-map", "averaged-map")
    }
    assert shares["averaged-map"] > shares["vocabulary-map"] + 0.2
    assert {(event.attack, event.done, event.total) for event in told} >= {(name, 120, 120) for name in shares}


def test_a_shuffled_recording_gives_no_more_than_chance(repeated):
    known, seen, tokens = repeated
    rows = np.stack([s.linked for s in seen.sightings])
    shuffled = np.random.default_rng(2).permutation(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
    mixed = ServerView(tuple(sighting(i, row, row, 16) for i, row in enumerate(shuffled)), seen.noise)
    share = np.mean(np.array(run("averaged-map", mixed, known, lambda _: None).tokens) == tokens)
    # Two tokens drawn from the same law are equal with the sum of its squared frequencies, 0.056 here.
    assert share < 0.2
