"""Patched inversion: all of a text without noise, less with it, the prior when there is nothing but noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks.embedded import nearest, rows_of, table_of
from attacks.patched import ATTACKS
from tests.attacks.lesson import draw, known_of, lesson, recovery, run, shuffled, site

(PATCHED,) = ATTACKS


@pytest.fixture(scope="module")
def where():
    return site(1)


def quick(where, view):
    return known_of(where, view, steps=0.15)


def test_without_noise_it_recovers_a_text_of_many_patches(unsafe, where):
    tokens = draw(3, 26, seed=1)
    view = lesson(where, tokens, unsafe)
    answer = run(PATCHED, view, quick(where, view))
    assert recovery(answer, tokens) >= 0.97
    assert answer.unresolved <= 3


def test_noise_takes_it_back_to_the_prior(unsafe, where):
    tokens = draw(6, 12, seed=2)
    got = []
    for forward in (0.0, 1.0, 50.0):
        view = lesson(where, tokens, unsafe, forward=forward)
        got.append(recovery(run(PATCHED, view, quick(where, view)), tokens))
    assert got[0] >= 0.97
    assert got[0] + 0.05 >= got[1] >= got[2] - 0.05
    # The commonest token is a fifth of the text; 72 positions, so three standard errors are 0.14.
    assert got[2] <= float((tokens == 1).float().mean()) + 0.14


def test_a_shuffled_recording_tells_of_other_texts_alone(unsafe, where):
    tokens = draw(4, 10, seed=3)
    view = shuffled(lesson(where, tokens, unsafe))
    answer = run(PATCHED, view, quick(where, view))
    agreement = float((tokens == tokens.roll(-1, 0)).float().mean())
    assert recovery(answer, tokens) == pytest.approx(agreement, abs=0.06)


def test_optimising_beats_the_start_that_it_is_given(unsafe, where):
    """From a poor start, forty public rows, the inverter alone is wrong where the patches are right."""
    from attacks.matching import ATTACKS as MATCHING

    tokens = draw(4, 12, seed=4)
    view = lesson(where, tokens, unsafe)
    known = known_of(where, view, draw(2, 12, seed=9), steps=0.3, rows=40)
    ridge = next(attack for attack in MATCHING if attack.name == "ridge")
    assert recovery(run(PATCHED, view, known), tokens) > recovery(run(ridge, view, known), tokens)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_embeddings_go_through_a_as_tokens_do(kind):
    where, tokens = site(1, kind), draw(2, 9, seed=5)
    table = table_of(where.front)
    with torch.no_grad():
        straight = where.front(tokens)
        cache = where.front.new_cache()
        assert torch.allclose(rows_of(where.front, table[tokens], cache), straight, atol=1e-5)
        where.front(tokens[:, :4], cache=cache)
        assert torch.allclose(rows_of(where.front, table[tokens[:, 4:]], cache), straight[:, 4:], atol=1e-4)
        assert cache.length == 4
    assert torch.equal(nearest(table, table[:7], 3)[:, 0], torch.arange(7))


def test_nothing_to_attack_is_said(unsafe, where):
    view = lesson(where, draw(1, 8, seed=6), unsafe)
    assert PATCHED.blocked(replace(view, sightings=()), quick(where, view).threat) is not None
