"""A sensitive attribute: read where there is no noise, guessed by its frequency where there is nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch

from attacks.attribute import ATTACKS
from attacks.config import config
from attacks.knowledge import Knowledge, profile_named
from attacks.metrics import wilson
from attacks.prior import prior_from
from attacks.probes import Sample, choose, discriminant, pooled, token_classifier
from attacks.simulated import clean_rows, framed
from attacks.threat import Threat
from attacks.view import Key, Noise, PublicModel, ServerView, Sighting
from securesplit.model.store import load_middle

VOCABULARY = 120
LENGTH = 16
CLIP = 60.0
WORDS = {0: (100, 101), 1: (102, 103), 2: (104, 105)}  # Each class has two telling words, at any place.


def draw(count, seed, *, shares=(0.5, 0.3, 0.2)):
    """Token rows of 10 to 16 tokens with one or two telling words among common ones, and their classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(shares), size=count, p=shares)
    texts = []
    for label in labels:
        row = rng.integers(1, 60, rng.integers(10, LENGTH + 1))
        row[rng.integers(1, len(row))] = rng.choice(WORDS[int(label)])
        texts.append(tuple(int(i) for i in row))
    return texts, [int(label) for label in labels]


@pytest.fixture(scope="module")
def know(fronts, model_dirs):
    middle = load_middle(model_dirs(0))

    def make(sigma=0.0, *, count=400, labels=None, seed=0):
        front, embedding = fronts(0)
        texts, classes = draw(count, 50)
        prior = prior_from([" ".join(map(str, t)) for t in texts], lambda t: [int(w) for w in t.split()], VOCABULARY)
        return Knowledge(
            model=PublicModel(front, embedding, middle=lambda: middle, sentinel=0), prior=prior,
            noise=Noise(sigma, CLIP), length=LENGTH, profile=profile_named("smoke"), seed=seed,
            attributes=tuple(classes if labels is None else labels(classes)),
        )  # fmt: skip

    return make


def view_of(known, texts, *, releases=1, seed=3, output=False, classes=0):
    clean = clean_rows(known, framed(texts, LENGTH, 0, classes=classes > 0))
    generator = torch.Generator().manual_seed(seed)
    rows = [clean + known.noise.sigma * torch.randn(clean.shape, generator=generator) for _ in range(releases)]
    out = [None] * len(texts)
    if output:
        with torch.no_grad():
            out = list(known.model.middle()(rows[0]).numpy())
    mean = torch.stack(rows).mean(0).numpy()
    sightings = tuple(
        Sighting(Key("a", 0, i), rows[0][i].numpy(), mean[i], releases, output=out[i]) for i in range(len(texts))
    )
    return ServerView(sightings, known.noise, classes=classes)


def accuracy(name, view, known, truth):
    attack = next(a for a in ATTACKS if a.name == name)
    assert attack.blocked(view, Threat()) is None
    answer = attack.run(view, known, lambda done, total: None)
    assert answer.keys == tuple(s.key for s in view.sightings)
    return sum(a == b for a, b in zip(answer.labels, truth, strict=True)) / len(truth)


def test_without_noise_the_attribute_is_read(know):
    texts, truth = draw(100, 1)
    known = know()
    assert accuracy("attribute", view_of(known, texts), known, truth) >= 0.95
    # The layout of classification jobs, with padding in front.
    short = [t[: LENGTH - 1] for t in texts]
    lost = [all(w not in t for w in WORDS[c]) for t, c in zip(short, truth, strict=True)]
    kept = [(t, c) for t, c, gone in zip(short, truth, lost, strict=True) if not gone]
    view = view_of(known, [t for t, _ in kept], classes=3)
    assert accuracy("attribute", view, known, [c for _, c in kept]) >= 0.9


def test_infinite_noise_leaves_the_commonest_class(know):
    texts, truth = draw(100, 1)
    known = know(1e6)
    view = view_of(known, texts, output=True)
    expected = Counter(truth)[0] / 100
    for name in ("attribute", "attribute-output"):
        assert accuracy(name, view, known, truth) == pytest.approx(expected, abs=0.02)


def test_less_noise_and_more_releases_read_more(know):
    texts, truth = draw(150, 1)
    found = []
    for sigma in (0.05, 0.4, 0.8, 8.0):
        known = know(sigma)
        found.append(accuracy("attribute", view_of(known, texts), known, truth))
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.9
    known = know(0.8)
    averaged = accuracy("attribute-averaged", view_of(known, texts, releases=16), known, truth)
    single = know(0.2)
    alone = accuracy("attribute", view_of(single, texts), single, truth)
    assert averaged > found[2]
    assert averaged == pytest.approx(alone, abs=3 * math.sqrt(0.25 / 150))


def test_labels_that_say_nothing_teach_nothing(know):
    texts, truth = draw(150, 1)

    def shuffled(classes):
        return [int(c) for c in np.random.default_rng(8).permutation(classes)]

    known = know(labels=shuffled)
    low, high = wilson(round(150 * accuracy("attribute", view_of(known, texts), known, truth)), 150)
    share = Counter(truth)[0] / 150
    # At chance: no better than naming the commonest, no worse than naming classes by their frequency.
    assert low <= share
    assert high >= sum((truth.count(c) / 150) * s for c, s in enumerate((0.5, 0.3, 0.2))) - 0.05


def test_the_output_of_b_joins_in_and_does_no_harm(know):
    texts, truth = draw(150, 1)
    known = know(0.3)
    view = view_of(known, texts, output=True)
    rows = accuracy("attribute", view, known, truth)
    both = accuracy("attribute-output", view, known, truth)
    assert both >= rows - 0.05
    # Sequences that were not answered are judged by their rows.
    half = dataclasses.replace(
        view,
        sightings=tuple(
            dataclasses.replace(s, output=s.output if i % 2 else None) for i, s in enumerate(view.sightings)
        ),
    )
    assert accuracy("attribute-output", half, known, truth) >= rows - 0.07


def test_texts_without_labels_give_no_guess(know):
    texts, truth = draw(5, 1)
    for labels in (lambda _: (), lambda classes: [-1] * len(classes), lambda classes: [0] * len(classes)):
        known = know(labels=labels)
        answer = ATTACKS[0].run(view_of(known, texts), known, lambda done, total: None)
        assert answer.labels == (-1,) * len(truth)
    known = know(labels=lambda classes: [c if i % 3 else -1 for i, c in enumerate(classes)])
    texts, truth = draw(60, 1)
    assert accuracy("attribute", view_of(known, texts), known, truth) > 0.85


# --- the pieces -----------------------------------------------------------------------------------------------------


def sample_of(count=400, width=5, length=4, classes=3, seed=1):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    rows = rng.normal(size=(count, length, width)) + rng.normal(size=(classes, 1, width))[labels]
    ids = rng.integers(0, 9, (count, length))
    return Sample(torch.tensor(rows), torch.tensor(ids), torch.tensor(labels), classes)


def test_the_discriminant_is_bayes_rule_for_gaussians():
    sample, sigma, shrinkage = sample_of(), 0.8, 0.1
    form = discriminant(sample, sigma, last=False, shrinkage=shrinkage)
    x, y = sample.rows[:, 1:].numpy().mean(1), sample.labels.numpy()
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    within = np.cov((x - means[y]).T, bias=True)
    sphere = np.trace(within) / 5
    covariance = (1 - shrinkage) * within + (shrinkage * sphere + sigma**2 / 3 + 1e-6 * sphere) * np.eye(5)
    counts = np.bincount(y) + 1
    expected = np.stack(
        [
            scipy.stats.multivariate_normal(m, covariance).logpdf(x) + np.log(n / counts.sum())
            for m, n in zip(means, counts, strict=True)
        ],
        1,
    )
    found = torch.log_softmax(form(sample.rows), -1).numpy()
    assert found == pytest.approx(expected - np.logaddexp.reduce(expected, axis=1, keepdims=True), abs=1e-6)


def test_the_token_classifier_is_bayes_rule_for_bags():
    sample, sigma = sample_of(count=30, length=3), 0.5
    form = token_classifier(sample, sigma, vocabulary=50, smoothing=2.0)
    rows, ids, y = sample.rows[:, 1:].numpy(), sample.ids[:, 1:].numpy(), sample.labels.numpy()
    tokens = np.unique(ids)
    means = {v: rows[ids == v].mean(0) for v in tokens}
    flat, names = rows.reshape(-1, 5), ids.reshape(-1)
    residual = flat - np.stack([means[v] for v in names])
    floor = 1e-3 * ((flat - flat.mean(0)) ** 2).mean() + 1e-30
    covariance = residual.T @ residual / len(flat) + (sigma**2 + floor) * np.eye(5)
    common = np.array([(ids == v).sum() for v in tokens])
    expected = np.zeros((len(y), 3))
    for c in range(3):
        counts = np.array([(ids[y == c] == v).sum() for v in tokens]) + 2.0 * common / common.sum()
        near = np.stack([scipy.stats.multivariate_normal(means[v], covariance).pdf(rows) for v in tokens], -1)
        expected[:, c] = np.log(near @ (counts / counts.sum())).sum(1) + float(sample.log_prior[c])
    found = torch.log_softmax(form(sample.rows), -1).numpy()
    assert found == pytest.approx(expected - np.logaddexp.reduce(expected, axis=1, keepdims=True), abs=1e-6)


def test_a_single_telling_word_is_diluted_by_pooling_and_not_by_tokens(know):
    """Why there are two kinds: at some noise one of them alone is much the weaker."""
    known = know(0.5)
    texts, truth = draw(300, 2)
    public, labels = draw(400, 50)
    sample = Sample(
        clean_rows(known, framed(public, LENGTH, 0, classes=False)), framed(public, LENGTH, 0, classes=False),
        torch.tensor(labels), 3,
    )  # fmt: skip
    rows = torch.stack([torch.tensor(s.rows) for s in view_of(known, texts).sightings])
    right = [
        float((form(rows).argmax(1) == torch.tensor(truth)).double().mean())
        for form in (
            discriminant(sample, 0.5, last=False, shrinkage=0.01),
            token_classifier(sample, 0.5, vocabulary=500, smoothing=20.0),
        )
    ]
    assert right[1] > right[0] + 0.03


def test_what_is_useless_is_not_chosen():
    sample = sample_of(seed=2)
    train, judged = sample.part(torch.arange(200)), sample.part(torch.arange(200, 400))

    def blind(_):
        return lambda rows: torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(1)).double() * 5

    def good(part):
        return discriminant(part, 0.0, last=False, shrinkage=0.01)

    chosen = choose([blind, good], train, judged, judged.rows)
    alone = discriminant(train, 0.0, last=False, shrinkage=0.01)(judged.rows).argmax(1)
    together = chosen(judged.rows).argmax(1)
    truth = judged.labels
    assert float((together == truth).double().mean()) >= float((alone == truth).double().mean()) - 0.03


def test_pooling_leaves_position_0_out():
    rows = torch.arange(24.0).view(1, 4, 6)
    assert pooled(rows, last=False).tolist() == [rows[0, 1:].mean(0).tolist()]
    assert pooled(rows, last=True)[0, 6:].tolist() == rows[0, -1].tolist()
    assert pooled(rows[:, :1], last=False).tolist() == rows[:, 0].tolist()


def test_what_is_missing_is_said_beforehand(know):
    known = know()
    view = view_of(known, draw(3, 1)[0])
    by_name = {a.name: a for a in ATTACKS}
    assert config().attacks["attribute-output"].channel == "O2"
    assert "labelled" in (by_name["attribute"].blocked(view, Threat(text="none")) or "")
    assert "average" in (by_name["attribute-averaged"].blocked(view, Threat()) or "")
    assert "answered" in (by_name["attribute-output"].blocked(view, Threat()) or "")
    assert "permuted" in (by_name["attribute"].blocked(dataclasses.replace(view, permuted="rows"), Threat()) or "")
    assert by_name["attribute"].blocked(ServerView((), known.noise), Threat())
