"""Bags from updates: far above the prior where AdamW left only signs, the prior's own where there is only noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from attacks.config import config, settings_of
from attacks.knowledge import learn
from attacks.lenses import Public, lenses
from attacks.prior import prior_from
from attacks.round_start import round_start
from attacks.sparse import Effort
from attacks.threat import Threat
from attacks.update_bag import ATTACKS, Settings, bag, distinct, log_odds, records_in
from attacks.view import Key, Noise, Passage, PublicModel, ServerView
from scripts.span.lab import Lab, Noised, job_of
from securesplit.cli.model import default_cache
from securesplit.data.notes import ward_notes
from securesplit.model.plan import CutPlan
from securesplit.model.resolve import resolve_model
from securesplit.model.store import load_back, load_front, load_middle, load_tokenizer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
LENGTH, REPEATS = 12, 3
NOTHING = Noise(0.0, None)


@pytest.fixture(scope="module")
def parts(model_dirs):
    directory = model_dirs(2)
    return lambda: (load_front(directory), load_middle(directory), load_back(directory))


@pytest.fixture(scope="module")
def public(draw):
    """(N, LENGTH) public ids, and what they say of tokens."""
    rows = draw(160, LENGTH, 7)
    texts = [" ".join(map(str, row)) for row in rows.tolist()]
    return rows, prior_from(texts, lambda text: [int(word) for word in text.split()], 120)


@pytest.fixture(scope="module")
def tuned():
    effort = Effort(candidates=120, iterations=(8, 8), floor=1e-3, lean=0.1)
    return settings_of("update_bag", Settings).model_copy(update={"rows": 1000, "effort": effort})


@pytest.fixture(scope="module")
def play(parts, public, tuned, draw):
    """``play(clients=, number=, ...)``: mean recall and prior over a few draws, as many tokens claimed as there are."""
    rows, prior = public
    front, middle, back = parts()  # Whoever attacks copies them.
    embedding = front.base.get_input_embeddings().weight.detach()

    def run(*, clients=1, number=0, how="steps", sigma=0.0, alter=None, noise=NOTHING, repeats=REPEATS, **options):
        options = {"rank": 16, "cut": (2, 1), "targets": TARGETS, "rate": 1e-2, **options}
        lab, earlier = Lab(*parts(), job_of(**options)), []
        if number:
            earlier = [lab.round([draw(1, LENGTH, 900 + i).tolist() for i in range(3)], 0, "steps")]
            lab.advance(earlier[0])
        recalls, guesses, through = [], [], None
        for repeat in range(repeats):
            records = [draw(1, LENGTH, 100 * repeat + i).tolist() for i in range(clients)]
            found = lab.round(records, number, how, Noised(1.0, sigma) if how == "clipped" else None)
            found = found if alter is None else alter(found, repeat)
            start = round_start(front, back, found, earlier)
            if through is None:
                made = Public(start.front, middle, start.back, rows[:70], noise, torch.Generator().manual_seed(0))
                through = lenses(found, start, made, prior, embedding, tuned.regression)
            truth = {token for record in records for row in record for token in row}
            odds = log_odds(prior, LENGTH * clients)
            recalls.append(len(truth & set(bag([(found, through)], odds, len(truth), tuned))) / len(truth))
            guesses.append(len(truth & set(odds.topk(len(truth)).indices.tolist())) / len(truth))
        return float(np.mean(recalls)), float(np.mean(guesses))

    return run


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("epochs", [1, 4])
def test_what_adamw_leaves_still_names_most_tokens(play, number, epochs):
    recall, prior = play(number=number, epochs=epochs)
    assert recall > 0.75
    assert recall > prior + 0.25


def test_several_records_and_clients_are_named_less_but_above_the_prior(play):
    found = [play(clients=clients, number=1, epochs=2) for clients in (1, 3, 8)]
    gains = [recall - prior for recall, prior in found]
    assert found[0][0] > 0.75
    assert gains[0] > gains[1] > gains[2] - 0.05
    assert gains[1] > 0.08


def test_the_textbook_gradient_shows_more_than_its_signs(play):
    plain, _ = play(number=1, how="gradient")
    signs, _ = play(number=1)
    assert plain >= signs - 0.05
    assert plain > 0.9


def noise_alone(found, repeat):
    generator = np.random.default_rng(repeat)
    return replace(found, tensors=tuple(generator.normal(size=t.shape).astype(np.float32) for t in found.tensors))


def zeros(found, _repeat):
    return replace(found, tensors=tuple(np.zeros_like(tensor) for tensor in found.tensors))


def test_rounds_over_the_same_records_are_explained_together(parts, public, tuned, draw):
    rows, prior = public
    hits = {"one": 0, "both": 0}
    for repeat in range(3):
        lab = Lab(*parts(), job_of(rank=4, cut=(2, 1), targets=TARGETS, rate=1e-2, epochs=2))
        records, sums, learnt = [draw(1, LENGTH, 40 * repeat + i).tolist() for i in range(3)], [], []
        for number in (0, 1):
            sums.append(lab.round(records, number, "steps"))
            lab.advance(sums[-1])
            front, middle, back = parts()
            start = round_start(front, back, sums[-1], sums)
            made = Public(start.front, middle, start.back, rows[:70], NOTHING, torch.Generator())
            embedding = front.base.get_input_embeddings().weight.detach()
            learnt.append((sums[-1], lenses(sums[-1], start, made, prior, embedding, tuned.regression)))
        truth = {token for record in records for row in record for token in row}
        odds = log_odds(prior, LENGTH * 3)
        hits["one"] += max(len(truth & set(bag([one], odds, len(truth), tuned))) for one in learnt)
        hits["both"] += len(truth & set(bag(learnt, odds, len(truth), tuned)))
    assert hits["both"] >= hits["one"] - 1


@pytest.mark.parametrize("alter", [noise_alone, zeros])
def test_without_a_signal_it_is_the_prior(play, alter):
    recall, prior = play(alter=alter, repeats=6)
    assert abs(recall - prior) <= 0.08


def test_the_update_of_other_text_says_nothing_of_this_one(play, parts, draw):
    job = job_of(rank=16, cut=(2, 1), targets=TARGETS, rate=1e-2)
    other = Lab(*parts(), job)

    def swapped(found, repeat):
        return replace(found, tensors=other.round([draw(1, LENGTH, 5000 + repeat).tolist()], 0, "steps").tensors)

    recall, prior = play(alter=swapped, repeats=6)
    assert recall <= prior + 0.1


def test_it_fades_with_the_noise(play):
    recalls = [play(how="clipped", sigma=sigma)[0] for sigma in (0.0, 0.05, 5.0)]
    priors = play(how="clipped", sigma=5.0)[1]
    assert recalls[0] > 0.75
    assert recalls[0] >= recalls[1] >= recalls[2] - 0.08
    assert abs(recalls[2] - priors) <= 0.12


def test_noise_at_the_cut_is_simulated_where_the_clients_had_it(play):
    recall, prior = play(noise=Noise(sigma=3.0, clip=10.0))
    assert recall > prior + 0.1, "lenses of noised rows still fit clients whose own were clean here"


def test_tensors_that_public_text_does_not_explain_are_left_out(parts, public, tuned):
    rows, prior = public
    lab = Lab(*parts(), job_of(rank=4, cut=(2, 1), targets=TARGETS))
    found = lab.round([[[1, 2, 3, 4]]], 0, "gradient")
    front, middle, back = parts()
    start = round_start(front, back, found, [])
    made = Public(start.front, middle, start.back, rows[:40], NOTHING, torch.Generator())
    embedding = front.base.get_input_embeddings().weight.detach()

    def names(**changes):
        return [
            lens.name for lens in lenses(found, start, made, prior, embedding, replace(tuned.regression, **changes))
        ]

    exact = [f"model.layers.0.self_attn.{name}_proj.lora_B.weight" for name in "kqv"]
    assert names(explained=0.999) == names(widest=8) == exact
    assert "model.layers.3.mlp.down_proj.lora_B.weight" in names()
    assert [lens.name for lens in lenses(found, start, None, prior, embedding, tuned.regression)] == exact


def test_the_odds_are_those_of_occurring_at_all(public):
    _, prior = public
    probability = prior.log_probability.double().exp()
    occurs = 1 - (1 - probability) ** 36
    assert torch.allclose(log_odds(prior, 36).double(), (occurs / (1 - occurs)).log(), atol=1e-4)


def test_how_many_tokens_are_claimed(public):
    rows, prior = public
    held = [set(row) for row in rows.tolist()]
    assert distinct(prior, 3, LENGTH) == len(held[0] | held[1] | held[2])
    assert distinct(prior_from([], lambda _: [], 120), 2, 5) == 10


def test_how_many_records_a_sum_is_over(parts):
    found = Lab(*parts(), job_of(rank=2, cut=(2, 1), targets=("q_proj",))).round([[[1, 2, 3]] * 5] * 2, 0, "steps")
    view = ServerView(sightings=(), noise=NOTHING, sums=(found,))
    assert records_in(found, view) == 10
    even = replace(found, job=job_of(rank=2, cut=(2, 1), targets=("q_proj",), weights="uniform", epochs=3))
    rows = np.zeros((3, 2), np.float32)
    traffic = tuple(Passage(Key(peer, step, 0), step, rows, 1) for peer in ("c0", "c1", "c9") for step in range(24))
    assert records_in(even, replace(view, traffic=traffic)) == 4, "2 peers x 24 messages over 4 rounds of 3 epochs"


class TestInTheSuite:
    def test_its_answer(self, parts, public, draw):
        _, prior = public
        records = [draw(1, LENGTH, 3).tolist()]
        found = Lab(*parts(), job_of(rank=8, cut=(2, 1), targets=TARGETS, rate=1e-2)).round(records, 0, "steps")
        front, middle, back = parts()
        embedding = front.base.get_input_embeddings().weight.detach()
        model = PublicModel(front, embedding, middle=lambda: middle, back=lambda: back)
        view = ServerView(sightings=(), noise=NOTHING, cut=(2, 1), sums=(found,))
        profile = config().profiles["smoke"].model_copy(update={"rows": 2000, "steps": 0.1})
        known = learn(model, prior, view, profile)
        (attack,) = ATTACKS
        assert attack.blocked(view, Threat()) is None
        answer = attack.run(view, known, lambda done, total: None)
        assert (answer.attack, answer.rounds, answer.sequences) == ("update-bag", (0,), ((),))
        assert len(set(answer.bags[0])) == len(answer.bags[0]) > 4
        again = attack.run(view, known, lambda done, total: None)
        assert again.bags == answer.bags

    def test_why_it_cannot_run(self):
        (attack,) = ATTACKS
        view = ServerView(sightings=(), noise=NOTHING)
        assert "no secure sum" in attack.blocked(view, Threat())

    def test_classes_are_no_tokens(self, parts):
        (attack,) = ATTACKS
        found = Lab(*parts(), job_of(rank=2, cut=(2, 1), targets=("q_proj",))).round([[[1, 2, 3]]], 0, "steps")
        view = ServerView(sightings=(), noise=NOTHING, sums=(found,), classes=2)
        assert "classes" in attack.blocked(view, Threat())


@pytest.mark.slow
def test_the_pretrained_model_gives_its_clients_words_away():
    """Notes made for the purpose, rank 8, one step of AdamW at four clients; public notes of another seed."""
    directory = resolve_model("smollm2-135m", default_cache(), CutPlan(2, 2))
    tokenizer, tuned = load_tokenizer(directory), settings_of("update_bag", Settings)

    def encoded(count, seed):
        texts = (tokenizer.encode(note.text, truncation=True, max_length=24) for note in ward_notes(count, seed=seed))
        return [ids for ids in texts if len(ids) == 24]

    known, records = encoded(120, 99), encoded(20, 7)[:4]
    prior = prior_from([" ".join(map(str, ids)) for ids in known], lambda t: [int(w) for w in t.split()], 49152)
    job = job_of(rank=8, cut=(2, 2), targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"))
    found = Lab(load_front(directory), load_middle(directory), load_back(directory), job).round(
        [[record] for record in records], 0, "steps"
    )
    front, middle, back = load_front(directory), load_middle(directory), load_back(directory)
    start = round_start(front, back, found, [])
    made = Public(start.front, middle, start.back, torch.tensor(known[:60]), NOTHING, torch.Generator())
    through = lenses(found, start, made, prior, front.base.get_input_embeddings().weight.detach(), tuned.regression)
    truth = {token for record in records for token in record}
    odds = log_odds(prior, 96)
    hits = len(truth & set(bag([(found, through)], odds, len(truth), tuned))) / len(truth)
    guess = len(truth & set(odds.topk(len(truth)).indices.tolist())) / len(truth)
    assert hits > guess + 0.15
