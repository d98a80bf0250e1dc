"""BiSR's SIP: it learns what its text shows, with the noise that it is trained on, and nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attacks.config import config, settings_of
from attacks.knowledge import learn
from attacks.prior import Prior
from attacks.rehearsal import rehearse, released, windows
from attacks.sip import ATTACKS, Settings, train_sip
from attacks.threat import Threat
from attacks.view import Key, Noise, PublicModel, ServerView, Sighting

LENGTH = 12
QUICK = Settings(hidden=96, dropout=0.1, rate=3e-3, decay=1e-5, batch=6, epochs=12)
(SIP,) = ATTACKS


def prior_of(texts: torch.Tensor, vocabulary: int) -> Prior:
    counts = torch.bincount(texts.flatten(), minlength=vocabulary).double() + 0.1
    log_probability = (counts / counts.sum()).log().float()
    favourites = torch.argsort(log_probability, descending=True, stable=True)
    return Prior(log_probability, favourites, (), tuple(map(tuple, texts.tolist())))


@pytest.fixture(scope="module")
def public(fronts, draw):
    """Rows of public text behind the embedding, and a prior."""
    front, embedding = fronts(0)
    prior = prior_of(draw(250, LENGTH, 5), len(embedding))
    tokens = windows(prior, 3000, LENGTH, torch.Generator().manual_seed(1))
    return rehearse(front, tokens, Noise(0.0, None)), prior


def share_named(sip, front, truth, sigma, seed=3):
    with torch.inference_mode():
        rows = released(front(truth).float(), sigma, torch.Generator().manual_seed(seed))
    return float((sip.tokens(rows) == truth).double().mean())


def test_the_shipped_numbers_are_the_published_ones():
    shipped = settings_of("bisr_sip", Settings)
    assert shipped == Settings(hidden=256, dropout=0.1, rate=1e-3, decay=1e-5, batch=6, epochs=20)


def test_it_learns_the_tokens_that_its_text_shows_and_recovery_falls_with_the_noise(public, fronts, draw):
    (train, test), _ = public
    front, _ = fronts(0)
    truth = draw(60, LENGTH, 901)
    figures = []
    for sigma in (0.0, 0.2, 100.0):
        sip = train_sip(train, test, sigma, QUICK, epochs=12 if sigma < 10 else 4, seed=1)
        figures.append(share_named(sip, front, truth, sigma))
    assert figures[0] > 0.9
    assert figures[0] > figures[1] > figures[2] + 0.2
    prior = float((truth == 1).double().mean())
    assert abs(figures[2] - prior) < 0.06


def test_tokens_that_its_text_lacks_are_never_named(public, fronts):
    (train, test), _ = public
    front, embedding = fronts(0)
    sip = train_sip(train, test, 0.0, QUICK, epochs=2, seed=1)
    missing = sorted(set(range(len(embedding))) - set(train.tokens.flatten().tolist()))
    with torch.inference_mode():
        named = sip.tokens(front(torch.tensor(missing)[:, None]).float())
    assert missing
    assert not set(named.flatten().tolist()) & set(missing)


def test_the_best_epoch_is_kept_and_a_seed_repeats_it(public):
    (train, test), _ = public
    state = torch.get_rng_state()
    one, two, other = (train_sip(train, test, 0.5, QUICK, epochs=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    rows = test.rows
    assert torch.equal(one.tokens(rows), two.tokens(rows))
    assert one.hits == two.hits
    assert not torch.equal(one.network.head.bias, other.network.head.bias)


def test_as_an_attack_it_answers_for_every_row_and_says_what_keeps_it_from_running(public, fronts, draw):
    _, prior = public
    front, embedding = fronts(0)
    truth = draw(30, LENGTH, 902)
    with torch.inference_mode():
        hidden = front(truth).float().numpy()
    keys = [Key("spiffe://t/a", step, 0) for step in range(len(hidden))]
    view = ServerView(
        tuple(Sighting(key, row, row, 1) for key, row in zip(keys, hidden, strict=True)), Noise(0.0, None)
    )
    profile = config().profiles["smoke"].model_copy(update={"rows": 1500})
    known = learn(PublicModel(front, embedding), prior, view, profile, seed=4)
    ticks = []
    answer = SIP.run(view, known, lambda done, total: ticks.append((done, total)))
    assert answer.attack == "bisr-sip"
    assert answer.keys == tuple(keys)
    assert ticks == [(n, 5) for n in range(1, 6)]
    assert np.mean(np.array(answer.tokens) == truth.numpy()) > 0.4
    assert SIP.blocked(view, Threat()) is None
    assert SIP.blocked(view, Threat(text="none")) is not None
    assert SIP.blocked(ServerView((), Noise(0.0, None)), Threat()) is not None
