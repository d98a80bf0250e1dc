"""Labels from gradients: all of them where nothing is noised, the prior where the gradient is noise, and in between."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from attacks.head import Around, Head, Here
from attacks.labels import ATTACKS as CLOSED
from attacks.leftward import ATTACKS as LEFTWARD
from attacks.view import Noise
from attacks.written import ATTACKS as WRITTEN
from tests.attacks.lesson import WIDTH, draw, known_of, lesson, recovery, run, shuffled, site

KINDS = ("llama", "gpt2", "gemma2")


def attack_for(back):
    return LEFTWARD[0] if back else CLOSED[0]


def own_guess(where, view, tokens):
    """What C's likeliest token on B's output gets, which needs no gradient."""
    with torch.no_grad():
        logits = [where.back(torch.from_numpy(seen.output)[None])[0, :-1] for seen in view.sightings]
    return float((torch.stack(logits).argmax(-1) == tokens[:, 1:]).float().mean())


@pytest.mark.parametrize("forward", [0.0, 8.0, 1000.0])
@pytest.mark.parametrize("back", [0, 1, 2])
def test_bare_gradients_give_every_token_whatever_the_forward_noise(unsafe, back, forward):
    where, tokens = site(back), draw(3, 10, seed=1)
    view = lesson(where, tokens, unsafe, forward=forward)
    answer = run(attack_for(back), view, known_of(where, view))
    assert answer.first == 1
    assert all(row[0] == -1 for row in answer.tokens)
    assert recovery(answer, tokens) == 1.0
    assert answer.unresolved == 0


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("back", [0, 1])
def test_every_family_of_models_is_attacked_alike(unsafe, back, kind):
    where, tokens = site(back, kind), draw(2, 8, seed=2)
    view = lesson(where, tokens, unsafe, forward=2.0)
    assert recovery(run(attack_for(back), view, known_of(where, view)), tokens) == 1.0


@pytest.mark.parametrize("back", [0, 1])
def test_rows_without_a_label_are_told_apart_and_change_nothing(unsafe, back):
    where, tokens, lengths = site(back), draw(3, 12, seed=3), (12, 7, 2)
    view = lesson(where, tokens, unsafe, lengths=lengths)
    answer = run(attack_for(back), view, known_of(where, view))
    assert recovery(answer, tokens, lengths) == 1.0
    assert answer.unresolved == 0


@pytest.mark.parametrize("back", [0, 1])
def test_noise_takes_the_labels_back_to_the_prior_step_by_step(unsafe, back):
    where, tokens = site(back), draw(6, 12, seed=4)
    got = []
    for backward in (0.0, 1.0, 3.0, 50.0):
        view = lesson(where, tokens, unsafe, backward=backward)
        got.append(recovery(run(attack_for(back), view, known_of(where, view)), tokens))
    # 66 labels: a standard error is at most 0.062.
    assert got[0] == 1.0
    assert all(later <= sooner + 0.08 for sooner, later in pairwise(got))
    assert got[1] > got[3] + 0.2
    prior = max(own_guess(where, view, tokens), float((tokens[:, 1:] == 1).float().mean()))
    assert got[3] <= prior + 0.16


def test_under_noise_it_beats_the_nearest_label(unsafe):
    """The prior and the scale must be worth something: the naive attack takes the smallest residual at the true scale."""
    where, tokens = site(0), draw(8, 12, seed=5)
    view = lesson(where, tokens, unsafe, backward=2.0)
    answer = recovery(run(CLOSED[0], view, known_of(where, view)), tokens)
    head, hits = Head(where.back), 0
    for seen, text in zip(view.sightings, tokens, strict=True):
        hidden = torch.from_numpy(seen.output)
        around = Around(head, hidden)
        chance = head.logits(around.states).detach().softmax(1)
        for t in range(11):
            here = Here(head, hidden, None, t)
            all_labels = here.pull((chance[t][None] - torch.eye(96)) @ head.weight) / 88
            hits += int((torch.from_numpy(seen.gradient[t]) - all_labels).square().sum(1).argmin() == text[t + 1])
    assert answer >= hits / 88


@pytest.mark.parametrize("back", [0, 1])
def test_a_shuffled_recording_tells_of_other_texts_alone(unsafe, back):
    where, tokens = site(back), draw(4, 10, seed=6)
    view = lesson(where, tokens, unsafe)
    whole = shuffled(view)
    answer = run(attack_for(back), whole, known_of(where, whole))
    agreement = float((tokens[:, 1:] == tokens.roll(-1, 0)[:, 1:]).float().mean())
    assert recovery(answer, tokens) == pytest.approx(agreement, abs=1e-6)
    # Another text's gradient beside the right output fits no label at all.
    pairs = zip(view.sightings, whole.sightings, strict=True)
    crossed = replace(view, sightings=tuple(replace(seen, gradient=other.gradient) for seen, other in pairs))
    answer = run(attack_for(back), crossed, known_of(where, crossed))
    assert recovery(answer, tokens) <= own_guess(where, view, tokens) + 0.15
    assert answer.unresolved > 0


def test_a_gradient_of_an_adapted_c_is_still_read(unsafe):
    """C has drifted from its public weights by a per cent."""
    where, tokens = site(1), draw(3, 10, seed=7)
    public = site(1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in where.back.base.layers.parameters():
            parameter.add_(0.01 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    view = lesson(where, tokens, unsafe)
    assert recovery(run(LEFTWARD[0], view, known_of(public, view)), tokens) >= 0.95


def test_what_b_answered_is_computed_again_where_it_was_not_recorded(unsafe):
    where, tokens = site(0), draw(2, 8, seed=8)
    view = lesson(where, tokens, unsafe, forward=1.0)
    bare = replace(view, sightings=tuple(replace(seen, output=None) for seen in view.sightings))
    assert recovery(run(CLOSED[0], bare, known_of(where, bare)), tokens) == 1.0


@pytest.mark.parametrize("back", [0, 1])
def test_a_gradient_of_zeros_leaves_the_prior(unsafe, back):
    where, tokens = site(back), draw(2, 8, seed=11)
    view = lesson(where, tokens, unsafe)
    zeros = replace(view, sightings=tuple(replace(seen, gradient=0 * seen.gradient) for seen in view.sightings))
    answer = run(attack_for(back), zeros, known_of(where, zeros))
    assert recovery(answer, tokens) == pytest.approx(own_guess(where, view, tokens), abs=0.15)


def test_a_single_row_or_none_breaks_nothing(unsafe):
    where, tokens = site(1), draw(2, 2, seed=12)
    view = lesson(where, tokens, unsafe)
    short = replace(
        view,
        sightings=tuple(
            replace(seen, rows=seen.rows[:1], output=seen.output[:1], gradient=seen.gradient[:1])
            for seen in view.sightings
        ),
    )
    assert run(LEFTWARD[0], short, known_of(where, short)).tokens == ((-1,), (-1,))
    assert recovery(run(LEFTWARD[0], view, known_of(where, view)), tokens) == 1.0


def test_derivatives_agree_with_finite_differences(unsafe):
    del unsafe
    where = site(2)
    head = Head(where.back)
    generator = torch.Generator().manual_seed(1)
    hidden, tangent, cotangent = (torch.randn(6, WIDTH, generator=generator) for _ in range(3))
    around = Around(head, hidden)
    with torch.no_grad():
        apart = (head.states((hidden + 1e-3 * tangent)[None]) - head.states((hidden - 1e-3 * tangent)[None]))[0] / 2e-3
    assert torch.allclose(around.push(tangent), apart, atol=2e-3)
    assert torch.isclose((around.pull(cotangent) * tangent).sum(), (around.push(tangent) * cotangent).sum(), rtol=1e-3)
    past = head.cache(hidden)
    for position in (0, 3, 5):
        here = Here(head, hidden, past, position)
        alone = torch.zeros_like(hidden)
        alone[position] = cotangent[position]
        row = slice(position, position + 1)
        assert torch.allclose(here.pull(cotangent[row]), around.pull(alone)[row], atol=1e-4)
        alone[position] = tangent[position]
        assert torch.allclose(here.push(tangent[row]), around.push(alone)[row], atol=1e-4)


def test_an_attack_says_what_keeps_it_from_running(unsafe):
    where, tokens = site(1), draw(1, 8, seed=9)
    view = lesson(where, tokens, unsafe)
    closed, leftward = CLOSED[0], LEFTWARD[0]
    threat = known_of(where, view).threat
    assert "layers" in closed.blocked(view, threat)
    assert "closed form" in leftward.blocked(replace(view, cut=(1, 0)), threat)
    without = replace(view, sightings=tuple(replace(seen, gradient=None) for seen in view.sightings))
    assert leftward.blocked(without, threat) == "no gradient crossed"
    assert "classes" in leftward.blocked(replace(view, classes=2), threat)
    assert leftward.blocked(replace(view, sightings=()), threat) is not None
    assert leftward.blocked(replace(view, cut=None), threat) is None


def test_a_language_model_helps_where_noise_hides_some_labels(unsafe):
    """Text that the public model wrote itself: its prior is as good as a prior can be."""
    where = site(0)
    tokens = torch.full((6, 1), 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(11):
            chance = torch.softmax(where.whole(tokens).logits[:, -1], 1)
            tokens = torch.cat([tokens, torch.multinomial(chance, 1, generator=generator)], 1)
    view = lesson(where, tokens, unsafe, forward=30.0, backward=1.5)
    known = known_of(where, view)
    alone, together = run(CLOSED[0], view, known), run(WRITTEN[0], view, known)
    assert recovery(together, tokens) >= recovery(alone, tokens) - 0.03
    assert "noise" in WRITTEN[0].blocked(replace(view, gradient_noise=Noise(0.0, None)), known.threat)


def test_a_known_clip_tells_the_scale(unsafe):
    """A record's gradient divided by a public length and clipped: s = min(1, C / norm) / T."""
    where, tokens = site(0), draw(4, 10, seed=10)
    view = lesson(where, tokens, unsafe)
    generator = torch.Generator().manual_seed(3)
    found = []
    for clip in (1e-3, 1e3):
        sightings = []
        for seen in view.sightings:
            gradient = torch.from_numpy(seen.gradient) * 4 * 9 / 10  # A mean over 36 labels, as a sum over 10.
            gradient = gradient * min(1.0, clip / float(gradient.norm()))
            sigma = 0.02 * clip / 10 if clip < 1 else 1e-3
            noisy = gradient + sigma * torch.randn(gradient.shape, generator=generator)
            sightings.append(replace(seen, gradient=noisy.numpy()))
        noised = replace(view, sightings=tuple(sightings), gradient_noise=Noise(sigma, clip))
        found.append(recovery(run(CLOSED[0], noised, known_of(where, noised)), tokens))
    assert min(found) >= 0.97
