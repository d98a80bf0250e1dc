"""Unknown noise: it is read off the rows, never off the view, and costs next to nothing against knowing it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import inverter
from attacks.config import config
from attacks.inverter import study_of
from attacks.knowledge import learn
from attacks.mixture import ATTACKS, estimated_sigma, grouped
from attacks.prior import Prior
from attacks.view import Key, Noise, PublicModel, ServerView, Sighting

LENGTH = 12
(MIXTURE,) = ATTACKS


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def scene(fronts, draw):
    """``scene(sigmas)``: sequences with noises of their own; the view states another sigma."""

    def make(sigmas, *, layers=0, stated=123.0, length=LENGTH):
        front, embedding = fronts(layers)
        truth = draw(len(sigmas), length, 901)
        generator = torch.Generator().manual_seed(2)
        with torch.inference_mode():
            hidden = front(truth).float()
            rows = hidden + torch.tensor(sigmas)[:, None, None] * torch.randn(hidden.shape, generator=generator)
        view = ServerView(
            tuple(Sighting(Key("spiffe://t/a", i, 0), r.numpy(), r.numpy(), 1) for i, r in enumerate(rows)),
            Noise(stated, None),
        )
        texts = draw(250, length, 5)
        counts = torch.bincount(texts.flatten(), minlength=len(embedding)).double() + 0.1
        log_probability = (counts / counts.sum()).log().float()
        favourites = torch.argsort(log_probability, descending=True, stable=True)
        prior = Prior(log_probability, favourites, (), tuple(map(tuple, texts.tolist())))
        profile = config().profiles["smoke"].model_copy(update={"rows": 1500})
        return view, learn(PublicModel(front, embedding), prior, view, profile), truth

    return make


def hits(answer, truth) -> float:
    return float((torch.tensor(answer.tokens) == truth).double().mean())


@pytest.mark.parametrize("layers", [0, 1])
def test_the_noise_of_each_sequence_is_measured(scene, layers):
    sigmas = [0.5] * 10 + [2.0] * 10 + [40.0] * 10
    view, known, _ = scene(sigmas, layers=layers)
    unaware = replace(known, noise=Noise(0.0, None))
    rows = torch.stack([torch.from_numpy(seen.rows) for seen in view.sightings])
    found = estimated_sigma(study_of(unaware), rows, 1e-3)
    # 11 rows of 16 weak directions: about 5 % by chance, and the rows' own variation besides.
    assert found[10:] == pytest.approx(torch.tensor(sigmas[10:], dtype=torch.float64), rel=0.4)
    assert float(found[:10].mean()) < float(found[10:20].mean()) < float(found[20:].mean())


def test_no_noise_counts_as_none_at_an_embedding_cut(scene):
    view, known, _ = scene([0.0] * 20)
    rows = torch.stack([torch.from_numpy(seen.rows) for seen in view.sightings])
    study = study_of(replace(known, noise=Noise(0.0, None)))
    # The tiny embedding has no silent direction, so that only an upper bound can be had.
    assert float(estimated_sigma(study, rows, 1e-3).max()) < 0.5 * float(study.train.rows.square().mean().sqrt())


def test_it_ignores_what_the_view_says_and_is_close_to_the_inverter_that_knows(scene):
    known_at = []
    for sigma in (0.0, 0.5, 1.0):
        view, known, truth = scene([sigma] * 60, stated=123.0)
        unaware = hits(MIXTURE.run(view, known, quiet), truth)
        aware_view = replace(view, noise=Noise(sigma, None))
        aware = inverter.ATTACKS[0].run(aware_view, replace(known, noise=Noise(sigma, None)), quiet)
        known_at.append((unaware, hits(aware, truth)))
    assert known_at[0][0] > 0.97
    assert all(abs(unaware - aware) <= 0.04 for unaware, aware in known_at)
    assert known_at[0][0] > known_at[1][0] + 0.1 > known_at[2][0] + 0.2


def test_mixed_noises_are_inverted_each_at_its_own(scene):
    view, known, truth = scene([0.0] * 20 + [3.0] * 20)
    answer = MIXTURE.run(view, known, quiet)
    assert answer.keys == tuple(seen.key for seen in view.sightings)
    assert float((torch.tensor(answer.tokens) == truth)[:20].double().mean()) > 0.95


def test_at_infinite_noise_it_falls_to_the_prior(scene):
    view, known, truth = scene([1e6] * 80)
    share = float((truth == known.prior.favourites[0]).double().mean())
    assert abs(hits(MIXTURE.run(view, known, quiet), truth) - share) < 0.04


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([0.0]) | st.floats(1e-100, 1e100), min_size=1, max_size=40), st.integers(1, 5))
def test_groups_hold_every_sequence_once_and_are_few(values, experts):
    groups = grouped(torch.tensor(values, dtype=torch.float64), experts, 1.15)
    assert sorted(i for _, members in groups for i in members) == list(range(len(values)))
    assert len([level for level, _ in groups if level > 0]) <= experts
    assert len([level for level, _ in groups if level == 0]) <= 1
    for level, members in groups:
        assert min(values[i] for i in members) - 1e-9 <= level <= max(values[i] for i in members) * (1 + 1e-9) + 1e-9
