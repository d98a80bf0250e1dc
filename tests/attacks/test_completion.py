"""B's output names the next token as well as the whole model does, and noise on the activations is all that stops it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks.completion import ATTACKS
from attacks.consistent import Shares, beam, shares_for
from attacks.head import Head
from attacks.outputs import outlook_for, public_texts
from tests.attacks.lesson import known_of, lesson, recovery, run, shuffled, site

PLAIN, CONSISTENT = ATTACKS


def written(where, count, length, seed):
    """Text that the model writes itself, by sampling: it is the one kind of text that a random model foretells."""
    tokens, generator = torch.full((count, 1), 1), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(length - 1):
            chance = torch.softmax(where.whole(tokens).logits[:, -1], 1)
            tokens = torch.cat([tokens, torch.multinomial(chance, 1, generator=generator)], 1)
    return tokens


@pytest.fixture(scope="module")
def texts():
    where = site(1)
    return where, written(where, 8, 12, seed=1), written(where, 60, 12, seed=2)


@pytest.mark.parametrize("back", [0, 1, 2])
def test_without_noise_it_is_the_whole_models_own_prediction(unsafe, back, texts):
    _, tokens, public = texts
    where = site(back)
    view = lesson(where, tokens, unsafe)
    answer = run(PLAIN, view, known_of(where, view, public))
    with torch.no_grad():
        own = where.whole(tokens).logits[:, :-1].argmax(-1)
    assert [row[1:] for row in answer.tokens] == [tuple(row) for row in own.tolist()]
    assert answer.first == 1
    assert recovery(answer, tokens) > float((tokens[:, 1:] == tokens[:, 1:].mode().values[:, None]).float().mean())


def test_an_answer_that_was_not_recorded_is_computed_again(unsafe, texts):
    where, tokens, public = texts
    view = lesson(where, tokens, unsafe, forward=1.0)
    bare = replace(view, sightings=tuple(replace(seen, output=None) for seen in view.sightings))
    known = known_of(where, view, public)
    assert run(PLAIN, bare, known).tokens == run(PLAIN, view, known).tokens


def test_noise_takes_it_back_to_the_unigram(unsafe, texts):
    where, tokens, public = texts
    commonest = int(torch.bincount(public.flatten()).argmax())
    prior = float((tokens[:, 1:] == commonest).float().mean())
    got = []
    for forward in (0.0, 0.5, 50.0):
        view = lesson(where, tokens, unsafe, forward=forward)
        got.append(recovery(run(PLAIN, view, known_of(where, view, public)), tokens))
    assert got[0] >= got[1] - 0.08
    assert got[0] > got[2] + 0.1
    assert got[2] == pytest.approx(prior, abs=0.12)


def test_a_shuffled_recording_tells_of_other_texts_alone(unsafe, texts):
    where, tokens, public = texts
    view = shuffled(lesson(where, tokens, unsafe))
    answer = run(PLAIN, view, known_of(where, view, public))
    with torch.no_grad():
        own = where.whole(tokens).logits[:, :-1].argmax(-1).roll(-1, 0)
    assert recovery(answer, tokens) == pytest.approx(float((own == tokens[:, 1:]).float().mean()), abs=1e-6)


def test_the_prior_learns_how_far_to_trust_b_and_is_a_distribution(unsafe, texts):
    where, tokens, public = texts
    head, trusted = Head(where.back), []
    for forward in (0.0, 50.0):
        view = lesson(where, tokens, unsafe, forward=forward)
        known = known_of(where, view, public)
        outlook = outlook_for(view, known, head, public_texts(known, 12))
        trusted.append(outlook.share)
        logits = head.logits(head.states(torch.from_numpy(view.sightings[0].output)[None])[0]).detach()
        assert torch.allclose(outlook.log_prior(logits).exp().sum(1), torch.ones(12), atol=1e-4)
    assert trusted[0] > 0.6
    assert trusted[1] < 0.4


def test_with_the_language_model_noisy_answers_read_no_worse(unsafe, texts):
    where, tokens, public = texts
    view = lesson(where, tokens, unsafe, forward=0.7)
    known = known_of(where, view, public)
    alone, together = run(PLAIN, view, known), run(CONSISTENT, view, known)
    assert recovery(together, tokens) >= recovery(alone, tokens) - 0.08
    assert "no noise" in CONSISTENT.blocked(lesson(where, tokens, unsafe), known.threat)


def test_the_beam_finds_the_best_text_of_all(texts):
    """Against every text of three words out of a few, scored by hand."""
    where, _, _ = texts
    generator = torch.Generator().manual_seed(4)
    likelihood = torch.full((3, 96), -1e4)
    likelihood[:, 3:8] = torch.randn(3, 5, generator=generator)
    log_prior = torch.log_softmax(torch.randn(3, 96, generator=generator), 1)
    shares = Shares(0.4, 0.6)
    found = beam(where.whole, likelihood, log_prior, shares, sentinel=1, width=25)
    best, value = None, -float("inf")
    for a in range(3, 8):
        for b in range(3, 8):
            for c in range(3, 8):
                with torch.no_grad():
                    log_lm = torch.log_softmax(where.whole(torch.tensor([[1, a, b]])).logits[0], 1)
                total = 0.0
                for row, token in enumerate((a, b, c)):
                    mixed = 0.4 * log_prior[row, token].exp() + 0.6 * log_lm[row, token].exp()
                    total += float(likelihood[row, token] + mixed.log())
                if total > value:
                    best, value = (a, b, c), total
    assert found == best


def test_shares_go_to_the_prior_that_foretells():
    good, bad = torch.full((50,), -0.5), torch.full((50,), -5.0)
    assert shares_for(good, bad).own > 0.9
    assert shares_for(bad, good).written > 0.9
