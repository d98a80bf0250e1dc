"""Without weights: a cipher of equal rows is broken by frequency and order, and rows that hide their equality give the prior."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from attacks.config import config, settings_of
from attacks.frequency import ATTACKS, Settings, clustered, deciphered
from attacks.knowledge import learn
from attacks.prior import Prior
from attacks.threat import Threat
from attacks.view import Key, Noise, Passage, PublicModel, ServerView, Sighting

LENGTH = 16
VOCABULARY = 120
WIDTH = 32
(FREQUENCY,) = ATTACKS


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def language():
    """``language(count, seed)``: sequences of a Markov chain in which every token has a few likely successors."""
    generator = torch.Generator().manual_seed(1)
    common = 1 / torch.arange(1, VOCABULARY + 1).double()
    table = torch.rand(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64) ** 12 * common

    def sample(count, seed):
        draws = torch.Generator().manual_seed(seed)
        token = torch.multinomial(common, count, replacement=True, generator=draws)
        found = [token]
        for _ in range(LENGTH - 1):
            token = torch.multinomial(table[token], 1, generator=draws)[:, 0]
            found.append(token)
        return torch.stack(found, dim=1)

    return sample


def prior_of(texts: torch.Tensor) -> Prior:
    counts = torch.bincount(texts.flatten(), minlength=VOCABULARY).double() + 0.1
    log_probability = (counts / counts.sum()).log().float()
    favourites = torch.argsort(log_probability, descending=True, stable=True)
    return Prior(log_probability, favourites, (), tuple(map(tuple, texts.tolist())))


@pytest.fixture(scope="module")
def table():
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(6))


def scene(language, table, sigma, *, rows=None, factor=False):
    """A view of 40 sequences among 600 that crossed."""
    truth = language(600, 77)
    generator = torch.Generator().manual_seed(2)
    hidden = table[truth] if rows is None else rows(truth)
    if factor:
        hidden = hidden * (1 + 0.02 * torch.rand(len(hidden), 1, 1, generator=generator))
    hidden = (hidden + sigma * torch.randn(hidden.shape, generator=generator)).numpy().astype(np.float32)
    keys = [Key("spiffe://t/a", step, 0) for step in range(len(hidden))]
    view = ServerView(
        tuple(Sighting(keys[i], hidden[i], hidden[i], 1) for i in range(40)), Noise(sigma, None),
        traffic=tuple(Passage(keys[i], i, hidden[i], 100) for i in range(len(hidden))),
    )  # fmt: skip

    class NoWeights:
        def __call__(self, *_, **__):
            raise AssertionError("an attack without weights ran the model")

    model = PublicModel(NoWeights(), torch.zeros(VOCABULARY, 1))
    profile = config().profiles["smoke"]
    return view, learn(model, prior_of(language(2000, 5)), view, profile, Threat(weights="none")), truth[:40]


def hits(answer, truth) -> float:
    return float((torch.tensor(answer.tokens) == truth).double().mean())


def mode_share(known, truth) -> float:
    return float((truth == known.prior.favourites[0]).double().mean())


@pytest.mark.parametrize("factor", [False, True])
def test_equal_rows_without_noise_are_deciphered(language, table, factor):
    view, known, truth = scene(language, table, 0.0, factor=factor)
    assert hits(FREQUENCY.run(view, known, quiet), truth) > 0.9


def test_a_little_noise_does_not_stop_it(language, table):
    view, known, truth = scene(language, table, 0.3)
    assert hits(FREQUENCY.run(view, known, quiet), truth) > 0.8


@pytest.mark.parametrize("sigma", [3.0, 1e6])
def test_strong_noise_leaves_the_prior(language, table, sigma):
    view, known, truth = scene(language, table, sigma)
    share = mode_share(known, truth)
    assert hits(FREQUENCY.run(view, known, quiet), truth) == pytest.approx(share, abs=0.05)


def test_rows_that_never_repeat_leave_the_prior(language, table):
    def unlike(truth):
        return torch.randn(*truth.shape, WIDTH, generator=torch.Generator().manual_seed(3))

    view, known, truth = scene(language, table, 0.0, rows=unlike)
    assert hits(FREQUENCY.run(view, known, quiet), truth) == pytest.approx(mode_share(known, truth))


def test_recovery_falls_with_the_noise(language, table):
    figures = []
    for sigma in (0.0, 0.3, 0.6, 1.2, 5.0):
        view, known, truth = scene(language, table, sigma)
        figures.append(hits(FREQUENCY.run(view, known, quiet), truth))
    assert figures[0] > figures[-1] + 0.5
    assert all(later <= earlier + 0.05 for earlier, later in itertools.pairwise(figures))


def test_order_says_what_frequency_alone_cannot(language):
    numbers = settings_of("frequency", Settings)
    truth = language(600, 77)
    hidden = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(4))[truth]
    named, inverse = torch.unique(hidden, return_inverse=True)
    prior = prior_of(language(2000, 5))
    both = deciphered(list(inverse), prior, numbers)[inverse]
    alone = deciphered(list(inverse), prior, numbers.model_copy(update={"kinship": 1e-9}))[inverse]
    assert len(named) <= VOCABULARY
    assert float((both == truth).double().mean()) > float((alone == truth).double().mean()) + 0.1


def test_clusters_are_the_tokens(table):
    tokens = torch.randint(0, VOCABULARY, (700,), generator=torch.Generator().manual_seed(8))
    for sigma in (0.0, 0.2):
        rows = table[tokens] + sigma * torch.randn(700, WIDTH, generator=torch.Generator().manual_seed(9))
        number = clustered(rows, Noise(sigma, None), 0.005)
        same_token, same_number = tokens[:, None] == tokens, number[:, None] == number
        assert float((same_token == same_number).double().mean()) > 0.999
        assert set(number.tolist()) == set(range(int(number.max()) + 1))


def test_it_needs_sequences_and_no_weights():
    assert FREQUENCY.blocked(ServerView((), Noise(0.0, None)), Threat(weights="none")) is not None
    assert config().attacks["frequency"].weights == "none"
