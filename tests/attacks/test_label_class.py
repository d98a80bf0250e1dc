"""Classes from gradients: exact where nothing is noised, the answers where clients answer, the prior at large noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from attacks.label_class import ATTACKS
from attacks.view import Key, Noise, ServerView, Sighting
from securesplit.client.step import step
from securesplit.data.batches import IGNORED, Batch
from securesplit.privacy.gate import Gate
from tests.attacks.lesson import draw, known_of, run, site

NORM, COSINE, EXACT = ATTACKS
CHOICES = (60, 61, 70)


@dataclass(frozen=True)
class Named(ServerView):
    """A view that knows which tokens stand for the classes."""

    choices: tuple[int, ...] = ()


def view_of(where, unsafe, classes, *, kinds=2, forward=0.0, backward=0.0, size=4, seed=0):
    """Steps of ``size`` records as a server sees them; the step is the product's own, the noise is torch's."""
    generator, choices = torch.Generator().manual_seed(seed), CHOICES[:kinds]
    sightings, sigma = [], 0.0
    for start in range(0, len(classes), size):
        mine = torch.tensor(classes[start : start + size])
        tokens = draw(len(mine), 8, seed=seed + start)
        batch = Batch(
            tokens=tokens, labels=torch.full_like(tokens, IGNORED), lengths=(8,) * len(mine), bucket=8,
            records=tuple(map(str, mine)), sources=tuple(range(len(mine))), choices=choices,
        ).with_classes(mine)  # fmt: skip
        seen = {}

        def middle(private, seen=seen):
            rows = private.graph.detach()
            rows = rows + forward * rows.square().mean().sqrt() * torch.randn(rows.shape, generator=generator)
            with torch.no_grad():
                seen["rows"], seen["output"] = rows, where.middle(rows)
            return seen["output"].requires_grad_()

        step(batch, where.front, Gate(unsafe, None), middle, where.back)
        gradient = seen["output"].grad * (len(mine) if backward else 1)  # Noised ones are of a sum over records.
        sigma = max(sigma, backward * float(gradient.flatten(1).norm(dim=1).mean()))
        output = seen["output"].detach()
        for i in range(len(mine)):
            noisy = gradient[i] + sigma * torch.randn(gradient[i].shape, generator=generator)
            row = seen["rows"][i].numpy()
            sightings.append(Sighting(Key("a", start, i), row, row, 1, output[i].numpy(), noisy.numpy()))
    return Named(
        tuple(sightings), Noise(0.0, None), Noise(sigma, None), cut=(1, where.layers), classes=kinds, choices=choices
    )  # fmt: skip


def accuracy(answer, classes):
    return sum(a == b for a, b in zip(answer.labels, classes, strict=True)) / len(classes)


def drawn(count, kinds, seed):
    return torch.randint(0, kinds, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("forward", [0.0, 100.0])
@pytest.mark.parametrize(("back", "kinds"), [(0, 2), (1, 2), (2, 3)])
def test_bare_gradients_give_every_class_whatever_the_forward_noise(unsafe, back, kinds, forward):
    where, classes = site(back), drawn(12, kinds, seed=1)
    view = view_of(where, unsafe, classes, kinds=kinds, forward=forward)
    answer = run(EXACT, view, known_of(where, view))
    assert accuracy(answer, classes) == 1.0
    assert answer.keys == tuple(seen.key for seen in view.sightings)


def test_of_many_classes_the_asked_row_alone_is_enough(unsafe, monkeypatch):
    monkeypatch.setattr("attacks.label_class._WHOLE", 2)
    where, classes = site(2), drawn(8, 3, seed=8)
    view = view_of(where, unsafe, classes, kinds=3)
    assert accuracy(run(EXACT, view, known_of(where, view)), classes) == 1.0


def test_noise_takes_it_back_to_chance_step_by_step(unsafe):
    where, classes = site(1), drawn(60, 2, seed=2)
    got = []
    for backward in (0.0, 0.3, 50.0):
        view = view_of(where, unsafe, classes, backward=backward)
        got.append(accuracy(run(EXACT, view, known_of(where, view)), classes))
    assert got[0] == 1.0
    assert got[0] >= got[1] >= got[2] - 0.1
    assert got[1] > 0.75
    assert abs(got[2] - 0.5) <= 0.2  # Three standard errors of 60 coins.


def test_answers_at_random_are_read_and_bound_what_is_known_of_labels(unsafe):
    where, labels = site(0), drawn(60, 2, seed=3)
    coins = torch.rand(60, generator=torch.Generator().manual_seed(4)) < 0.3
    answers = [label ^ int(coin) for label, coin in zip(labels, coins, strict=True)]
    view = replace(view_of(where, unsafe, answers), responded=True)
    answer = run(EXACT, view, known_of(where, view))
    assert accuracy(answer, answers) == 1.0
    assert accuracy(answer, labels) == pytest.approx(1 - float(coins.float().mean()))


def test_a_shuffled_recording_tells_of_other_records(unsafe):
    where, classes = site(0), drawn(12, 2, seed=5)
    view = view_of(where, unsafe, classes)
    moved = (*view.sightings[1:], view.sightings[0])
    view = replace(
        view, sightings=tuple(replace(new, key=old.key) for old, new in zip(view.sightings, moved, strict=True))
    )
    assert accuracy(run(EXACT, view, known_of(where, view)), [*classes[1:], classes[0]]) == 1.0


@pytest.mark.parametrize("attack", [NORM, COSINE], ids=lambda attack: attack.name)
def test_the_published_attacks_split_the_records_and_never_beat_the_exact_one(unsafe, attack):
    where, classes = site(0), drawn(40, 2, seed=6)
    view = view_of(where, unsafe, classes)
    known = known_of(where, view)
    answer = run(attack, view, known)
    assert set(answer.labels) <= {0, 1}
    assert accuracy(answer, classes) <= accuracy(run(EXACT, view, known), classes) == 1.0


def test_gradients_of_two_classes_point_apart(unsafe):
    """The one property that the cosine attack needs, seen from both sides."""
    where, classes = site(0), drawn(40, 2, seed=7)
    view = view_of(where, unsafe, classes)
    found = accuracy(run(COSINE, view, known_of(where, view)), classes)
    assert max(found, 1 - found) > 0.8


def test_an_attack_says_what_keeps_it_from_running(unsafe):
    where = site(0)
    view = view_of(where, unsafe, [0, 1])
    threat = known_of(where, view).threat
    assert "not classes" in EXACT.blocked(replace(view, classes=0), threat)
    assert "tokens" in EXACT.blocked(replace(view, choices=()), threat)
    assert "two classes" in NORM.blocked(replace(view, classes=3, choices=CHOICES), threat)
    bare = replace(view, sightings=tuple(replace(seen, gradient=None) for seen in view.sightings))
    assert EXACT.blocked(bare, threat) == "no gradient crossed"
    assert EXACT.blocked(replace(view, sightings=()), threat) is not None
