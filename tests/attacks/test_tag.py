"""Gradient matching, the published way: it works without noise, and the exact attacks are never below it."""

from __future__ import annotations

import pytest

from attacks.labels import ATTACKS as CLOSED
from attacks.leftward import ATTACKS as LEFTWARD
from attacks.tag import ATTACKS
from tests.attacks.lesson import draw, known_of, lesson, recovery, run, site

TAG, BISR = ATTACKS


@pytest.mark.parametrize("back", [0, 1])
def test_without_noise_most_labels_are_matched_and_the_exact_attack_gets_all(unsafe, back):
    where, tokens = site(back), draw(2, 10, seed=1)
    view = lesson(where, tokens, unsafe)
    known = known_of(where, view, steps=1.0)
    found = recovery(run(TAG, view, known), tokens)
    exact = recovery(run((LEFTWARD if back else CLOSED)[0], view, known), tokens)
    assert found >= 0.6
    assert exact == 1.0 >= found


def test_from_an_inverters_guess_few_epochs_serve(unsafe):
    where, tokens = site(1), draw(3, 10, seed=2)
    view = lesson(where, tokens, unsafe)
    known = known_of(where, view, steps=1.0)
    assert recovery(run(BISR, view, known), tokens) >= 0.5


def test_noise_takes_it_down(unsafe):
    where, tokens = site(0), draw(6, 12, seed=3)
    got = []
    for backward in (0.0, 50.0):
        view = lesson(where, tokens, unsafe, backward=backward)
        got.append(recovery(run(TAG, view, known_of(where, view, steps=1.0)), tokens))
    assert got[0] > got[1] + 0.3
    assert got[1] <= 0.25


def test_a_repeated_run_is_the_same(unsafe):
    where, tokens = site(0), draw(2, 8, seed=4)
    view = lesson(where, tokens, unsafe, backward=1.0)
    known = known_of(where, view)
    assert run(TAG, view, known).tokens == run(TAG, view, known).tokens
