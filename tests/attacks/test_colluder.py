"""A colluding client's pairs: they teach what public weights do not say, and never make the attack worse than without them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks import inverter
from attacks.colluder import ATTACKS, Settings, adapted, taught
from attacks.config import config, settings_of
from attacks.inverter import fitted, study_of
from attacks.knowledge import Pair, learn
from attacks.prior import Prior
from attacks.threat import Threat
from attacks.view import Key, Noise, Passage, PublicModel, ServerView, Sighting

LENGTH = 12
COLLUDES = Threat(text="colluder")
(COLLUDER,) = ATTACKS


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def scene(fronts, draw):
    """``scene(sigma, drift)``: 40 victims and 80 sequences of a colluder, through weights that drifted from the public ones."""

    def make(sigma, *, drift=0.0, layers=0):
        front, embedding = fronts(layers)
        tokens = draw(120, LENGTH, 901)
        generator = torch.Generator().manual_seed(2)
        with torch.inference_mode():
            hidden = front(tokens).float()
            turn = torch.linalg.qr(
                torch.eye(hidden.shape[-1]) + drift * torch.randn(hidden.shape[-1:] * 2, generator=generator)
            )
            hidden = hidden @ (turn.Q * turn.R.diagonal().sign())
            rows = (hidden + sigma * torch.randn(hidden.shape, generator=generator)).numpy()
        keys = [Key("spiffe://t/a", step, 0) for step in range(120)]
        view = ServerView(
            tuple(Sighting(keys[i], rows[i], rows[i], 1) for i in range(40)), Noise(sigma, None),
            traffic=tuple(Passage(keys[i], i, rows[i], 100) for i in range(120)),
        )  # fmt: skip
        texts = draw(250, LENGTH, 5)
        counts = torch.bincount(texts.flatten(), minlength=len(embedding)).double() + 0.1
        log_probability = (counts / counts.sum()).log().float()
        favourites = torch.argsort(log_probability, descending=True, stable=True)
        prior = Prior(log_probability, favourites, (), tuple(map(tuple, texts.tolist())))
        profile = config().profiles["smoke"].model_copy(update={"rows": 1500})
        pairs = tuple(Pair(keys[i], tuple(tokens[i].tolist())) for i in range(40, 120))
        known = learn(PublicModel(front, embedding), prior, view, profile, COLLUDES, colluder=pairs)
        return view, known, tokens[:40]

    return make


def hits(answer, truth) -> float:
    return float((torch.tensor(answer.tokens) == truth).double().mean())


def test_it_runs_only_with_a_colluder_and_traffic(scene):
    view, _, _ = scene(0.0)
    assert COLLUDER.blocked(view, COLLUDES) is None
    assert COLLUDER.blocked(view, Threat()) is not None
    assert COLLUDER.blocked(replace(view, traffic=()), COLLUDES) is not None
    assert COLLUDER.blocked(replace(view, sightings=()), COLLUDES) is not None


def test_without_noise_it_reads_everything(scene):
    view, known, truth = scene(0.0)
    assert hits(COLLUDER.run(view, known, quiet), truth) > 0.98


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_it_learns_how_the_clients_weights_drifted(scene, sigma):
    view, known, truth = scene(sigma, drift=0.5)
    alone = hits(inverter.ATTACKS[0].run(view, known, quiet), truth)
    told = hits(COLLUDER.run(view, known, quiet), truth)
    assert told > alone + 0.05
    # Position 0 has no lesson of its own.
    if not sigma:
        assert told > 0.85


def test_where_nothing_drifted_it_is_as_good_as_without_the_pairs(scene):
    view, known, truth = scene(0.15)
    alone = hits(inverter.ATTACKS[0].run(view, known, quiet), truth)
    assert hits(COLLUDER.run(view, known, quiet), truth) >= alone - 0.04


def test_wrong_pairs_are_found_out_on_held_out_ones(scene):
    view, known, _ = scene(0.05)
    lesson = taught(view, known.colluder)
    order = torch.randperm(len(lesson.tokens), generator=torch.Generator().manual_seed(1))
    lies = replace(lesson, tokens=lesson.tokens[order])
    reader = fitted(known, 0.05).reader
    numbers = settings_of("seed_decoder", Settings)
    study = study_of(known)
    assert adapted(reader, study, lesson, 0.05, numbers).hits > adapted(reader, study, lies, 0.05, numbers).hits + 0.3


def test_at_infinite_noise_it_falls_to_the_prior(scene):
    view, known, truth = scene(1e6)
    share = float((truth == known.prior.favourites[0]).double().mean())
    assert abs(hits(COLLUDER.run(view, known, quiet), truth) - share) < 0.06


def test_victims_and_strangers_are_no_lessons(scene):
    view, known, truth = scene(0.0)
    told = tuple(Pair(seen.key, tuple(t.tolist())) for seen, t in zip(view.sightings, truth, strict=True))
    assert taught(view, told) is None
    assert taught(view, (Pair(Key("spiffe://t/b", 0, 0), (1, 2, 3)),)) is None
    short = taught(view, (replace(known.colluder[0], tokens=known.colluder[0].tokens[:5]),))
    assert len(short.tokens) == 4
    without = replace(known, colluder=())
    assert COLLUDER.run(view, without, quiet).keys == tuple(seen.key for seen in view.sightings)
