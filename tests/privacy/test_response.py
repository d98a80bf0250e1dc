"""A label's answer: its probabilities are exact integers, its privacy is epsilon, and its bias can be undone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from securesplit.privacy import response
from securesplit.privacy.calibrate import pure_mu

SHARED = Path(__file__).parents[3] / "shared" / "kat" / "dp_kat.json"
CLASSES = st.integers(2, 100_000)
EPSILONS = st.floats(1e-6, 600)


@pytest.mark.skipif(not SHARED.is_file(), reason="the full table of known answers lies beside the repository only")
def test_known_answers():
    for row in json.loads(SHARED.read_text())["N_pure_eps_to_mu"]:
        assert math.isclose(pure_mu(float(row["eps"])), float(row["mu"]), rel_tol=1e-9)
        for classes, keep in row["keep_prob"].items():
            assert math.isclose(response.keep_probability(float(row["eps"]), int(classes)), float(keep), rel_tol=1e-9)


@given(epsilon=EPSILONS, classes=CLASSES)
@settings(max_examples=100, deadline=None)
def test_the_privacy_of_the_drawn_integers_is_epsilon(epsilon, classes):
    """The exact probabilities of :func:`respond`: t / 2^128 to keep, the rest shared evenly."""
    threshold = response._threshold(epsilon, classes)
    with mpmath.workprec(2000):
        keep = mpmath.mpf(threshold) / 2**128
        other = (1 - keep) / (classes - 1)
        most = mpmath.exp(mpmath.mpf(epsilon))
        assert other > 0
        assert keep / other <= most
        assert other / keep <= most
        true = most / (most + classes - 1)
        assert 0 <= true - keep < mpmath.mpf(2) ** -127
        assert abs(true - response.keep_probability(epsilon, classes)) < 1e-14


@pytest.mark.parametrize(("epsilon", "classes"), [(1.0, 2), (1.0, 5), (3.0, 20), (0.1, 3)])
def test_answers_come_as_often_as_they_should(monkeypatch, epsilon, classes):
    generator = np.random.default_rng(5)
    monkeypatch.setattr(response.os, "urandom", generator.bytes)
    monkeypatch.setattr(response.secrets, "randbelow", lambda n: int(generator.integers(n)))
    label, n = classes - 1, 20_000
    seen = np.bincount([response.respond(label, classes, epsilon) for _ in range(n)], minlength=classes)
    keep = math.exp(epsilon) / (math.exp(epsilon) + classes - 1)
    expected = np.full(classes, (1 - keep) / (classes - 1))
    expected[label] = keep
    assert stats.chisquare(seen, expected * n).pvalue > 1e-4


def test_the_coin_is_compared_as_an_integer(monkeypatch):
    threshold = response._threshold(1.0, 4)
    monkeypatch.setattr(response.secrets, "randbelow", lambda n: n - 1)  # The other label is the one before.
    for coin, answer in ((0, 2), (threshold - 1, 2), (threshold, 1), (2**128 - 1, 1)):
        monkeypatch.setattr(response.os, "urandom", lambda n, coin=coin: coin.to_bytes(n, "little"))
        assert response.respond(2, 4, 1.0) == answer


@given(epsilon=st.floats(1e-6, 600), classes=st.integers(2, 50), data=st.data())
@settings(max_examples=60, deadline=None)
def test_answers_are_labels(epsilon, classes, data):
    label = data.draw(st.integers(0, classes - 1))
    assert 0 <= response.respond(label, classes, epsilon) < classes


def test_seeds_do_not_touch_it():
    drawn = set()
    for _ in range(4):
        np.random.seed(1)
        drawn.add(tuple(response.respond(0, 1000, 0.5) for _ in range(8)))
    assert len(drawn) == 4


@given(epsilon=st.floats(0.05, 20), classes=st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_debiasing_gives_the_true_loss_on_average(epsilon, classes):
    keep = math.exp(epsilon) / (math.exp(epsilon) + classes - 1)
    answers = np.full((classes, classes), (1 - keep) / (classes - 1))
    np.fill_diagonal(answers, keep)
    losses = np.linspace(-1, 3, classes)
    undone = response.debiasing(epsilon, classes)
    assert answers @ (undone @ losses) == pytest.approx(losses, abs=1e-9)
    assert undone.sum(axis=1) == pytest.approx(np.ones(classes), abs=1e-9)


@pytest.mark.parametrize("call", [
    lambda: response.respond(0, 1, 1.0), lambda: response.respond(-1, 3, 1.0), lambda: response.respond(3, 3, 1.0),
    lambda: response.respond(0, 3, 0.0), lambda: response.respond(0, 3, math.nan), lambda: response.respond(0, 3, 601.0),
    lambda: response.keep_probability(0.0, 3), lambda: response.keep_probability(1.0, 1),
    lambda: response.debiasing(-1.0, 3),
])  # fmt: skip
def test_what_is_out_of_range_is_refused(call):
    with pytest.raises(ValueError, match="must be"):
        call()
