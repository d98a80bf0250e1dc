"""Membership: found where a LoRA was overfitted, absent where the model never saw anybody, and never read off lengths."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from attacks.config import config
from attacks.knowledge import Knowledge, profile_named
from attacks.membership import ATTACKS, confidence, lira, lowest_mean, place_means
from attacks.perplexity import encoded, likelihoods
from attacks.prior import prior_from
from attacks.rates import auc, auc_interval, tpr_at
from attacks.shadows import Recipe, fine_tune, moved, recipe_of
from attacks.threat import Threat
from attacks.view import Key, Noise, Passage, PublicModel, ServerView
from securesplit.model.lora import add_adapters
from securesplit.model.store import load_tokenizer, load_whole

VOCABULARY = 120
LENGTH = 16
FAST = [a for a in ATTACKS if a.name != "membership-lira"]
TEXT = Threat()


def words(rows) -> list[str]:
    return [" ".join(f"w{i}" for i in row) for row in rows]


def random_texts(count, seed, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    return words(torch.randint(1, VOCABULARY, (count, length), generator=generator).tolist())


def overfit(whole, encode, texts, *, steps=30, rank=8, rate=1e-2):
    """An adapter by PEFT's own classes and a plain loop, merged; shares no code with the attacks."""
    torch.manual_seed(5)
    model = peft.get_peft_model(
        whole, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    ids = torch.tensor([encode(text) for text in texts])
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    return model.merge_and_unload().eval()


@pytest.fixture(scope="module")
def encode(model_dirs):
    tokenizer = load_tokenizer(model_dirs(2))
    return tokenizer.encode


@pytest.fixture(scope="module")
def members():
    return random_texts(50, seed=1)


@pytest.fixture(scope="module")
def trained(model_dirs, encode, members):
    return overfit(load_whole(model_dirs(2)), encode, members)


@pytest.fixture(scope="module")
def others_trained(model_dirs, encode):
    """A LoRA overfitted on other texts: it saw no candidate."""
    return overfit(load_whole(model_dirs(2)), encode, random_texts(50, seed=77))


def view_of(length=LENGTH, releases=1):
    rows = [np.full((length, 4), float(i), dtype=np.float32) for i in range(releases)]
    return ServerView(
        sightings=(), noise=Noise(0.0, None), trained=True,
        traffic=tuple(Passage(Key("a", i, 0), i, r, r.nbytes) for i, r in enumerate(rows)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def know(model_dirs, fronts, encode):
    whole = load_whole(model_dirs(2))

    def make(model, candidates, public=(), seed=0):
        front, embedding = fronts(2)
        public_model = PublicModel(front, embedding, whole=lambda: whole, trained=lambda: model, encode=encode)
        return Knowledge(
            model=public_model, prior=prior_from(public, encode, VOCABULARY), noise=Noise(0.0, None), length=LENGTH,
            profile=profile_named("smoke"), candidates=tuple(candidates), seed=seed,
        )  # fmt: skip

    return make


def rate(attack, known, view=None):
    answer = attack.run(view or view_of(), known, lambda done, total: None)
    assert answer.attack == attack.name
    return list(answer.scores)


def mixed(members, others, seed=3):
    """Members and others in a random order, and where each of them ended."""
    order = np.random.default_rng(seed).permutation(len(members) + len(others))
    texts = [*members, *others]
    return [texts[i] for i in order], [int(i) < len(members) for i in order]


def split(scores, inside):
    return [s for s, m in zip(scores, inside, strict=True) if m], [
        s for s, m in zip(scores, inside, strict=True) if not m
    ]


# --- the claim ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", FAST, ids=lambda a: a.name)
def test_an_overfitted_adapter_names_its_members_and_a_model_that_never_saw_them_does_not(
    attack, know, members, trained, others_trained
):
    texts, inside = mixed(members, random_texts(50, seed=2))
    public = random_texts(40, seed=9)
    found = split(rate(attack, know(trained, texts, public)), inside)
    least = 0.9 if attack.name != "membership-zlib" else 0.75
    assert auc(*found) > least
    if attack.name == "membership-reference":
        assert auc_interval(*found)[0] > 0.9
        assert tpr_at(*found, 0.01).recall > 0.5
    low, high = auc_interval(*split(rate(attack, know(others_trained, texts, public)), inside))
    assert low <= 0.5 <= high


def test_lira_names_members_and_nobody_where_none_was_seen(know, members, trained, others_trained):
    attack = next(a for a in ATTACKS if a.name == "membership-lira")
    texts, inside = mixed(members, random_texts(50, seed=2))
    public = random_texts(150, seed=9)
    view = view_of(releases=50)
    found = split(rate(attack, know(trained, texts, public), view), inside)
    assert auc_interval(*found)[0] > 0.9
    low, high = auc_interval(*split(rate(attack, know(others_trained, texts, public), view), inside))
    assert low <= 0.5 <= high


def test_lira_without_public_text_falls_back_on_the_public_model(know, members, trained):
    attack = next(a for a in ATTACKS if a.name == "membership-lira")
    texts, inside = mixed(members, random_texts(50, seed=2))
    assert auc(*split(rate(attack, know(trained, texts)), inside)) > 0.9


def test_what_was_trained_longer_is_found_better(model_dirs, know, encode, members):
    texts, inside = mixed(members, random_texts(50, seed=2))
    attack = next(a for a in ATTACKS if a.name == "membership-reference")
    found = []
    for steps in (0, 3, 30):
        model = overfit(load_whole(model_dirs(2)), encode, members, steps=steps)
        found.append(auc(*split(rate(attack, know(model, texts)), inside)))
    assert found == sorted(found)
    assert found[0] == 0.5  # An untouched model differs from the public one nowhere.


def test_lengths_do_not_decide(know, model_dirs):
    """Members are long and others short, and nobody was trained on: a sum of log-probabilities would tell them apart."""
    members, others = random_texts(40, seed=1, length=16), random_texts(40, seed=2, length=6)
    texts, inside = mixed(members, others)
    known = know(load_whole(model_dirs(2)), texts, random_texts(200, seed=9))
    sums = [float(s.log_probability.sum()) for s in likelihoods(load_whole(model_dirs(2)), encoded(known, texts, 99))]
    assert auc(*split(sums, inside)) < 0.05
    low, high = auc_interval(*split(rate(FAST[0], known), inside))
    assert low <= 0.5 <= high
    assert set(rate(FAST[1], known)) == {0.0}


def test_a_text_is_asked_about_as_far_as_it_was_trained_on(know, members, trained):
    """Clients cut texts at the longest bucket; what lies behind it was never seen and must not dilute the score."""
    tails = random_texts(50, seed=4)
    texts, inside = mixed(
        [f"{a} {b}" for a, b in zip(members, tails, strict=True)], random_texts(50, seed=2, length=32)
    )
    cut = auc(*split(rate(FAST[1], know(trained, texts), view_of(LENGTH)), inside))
    whole = auc(*split(rate(FAST[1], know(trained, texts), view_of(2 * LENGTH)), inside))
    assert cut > 0.9
    assert cut >= whole


@pytest.mark.parametrize("attack", FAST, ids=lambda a: a.name)
def test_texts_of_one_token_get_the_median_and_none_at_all_is_no_error(attack, know, trained, members):
    texts = ["w1", *members[:4], ""]
    scores = rate(attack, know(trained, texts))
    assert scores[0] == scores[-1] == pytest.approx(float(np.median(scores[1:5])))
    assert all(math.isfinite(s) for s in scores)
    assert rate(attack, know(trained, ())) == []
    assert rate(attack, know(trained, ("w1",))) == [0.0]


# --- the pieces -----------------------------------------------------------------------------------------------------


def test_likelihoods_are_the_models_own_losses_whatever_the_batch(model_dirs, encode):
    model = load_whole(model_dirs(2))
    texts = [encode(t) for t in (*random_texts(40, 1, 16), *random_texts(3, 2, 5), "w3", "w3 w4")]
    found = likelihoods(model, texts)
    for ids, seen in zip(texts, found, strict=True):
        assert len(seen.log_probability) == len(seen.mean) == len(seen.deviation) == len(ids) - 1
        if len(ids) > 1:
            with torch.inference_mode():
                out = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]))
            assert -seen.log_probability.mean() == pytest.approx(float(out.loss), abs=1e-4)
            logs = torch.log_softmax(out.logits[0, :-1].double(), -1)
            mean = (logs.exp() * logs).sum(-1)
            assert seen.mean == pytest.approx(mean.numpy(), abs=1e-4)
            deviation = (logs.exp() * (logs - mean[:, None]).square()).sum(-1).sqrt()
            assert seen.deviation == pytest.approx(deviation.numpy(), abs=1e-3)


def test_scores_by_hand():
    assert lowest_mean(np.array([-1.0, -9.0, -3.0, -2.0, -5.0]), 20) == -9.0
    assert lowest_mean(np.array([-1.0, -9.0, -3.0, -2.0, -5.0]), 40) == -7.0
    assert lowest_mean(np.array([-1.0]), 20) == -1.0
    # Two shadows with confidences 0 and 2 and a common variance of 2: one deviation is sqrt 2.
    assert lira(np.array([1.0, 3.0]), np.array([[0.0, 0.0], [2.0, 2.0]]), 8.0) == pytest.approx([0.0, math.sqrt(2)])
    # A candidate whose shadows agree is not certain because of that: its variance is mostly the common one.
    shrunk = lira(np.array([1.0, 1.0]), np.array([[0.0, 0.0], [0.0, 2.0]]), 8.0)
    assert shrunk[0] == pytest.approx(1 / math.sqrt(8 / 9))


def test_confidence_is_the_logit_of_the_mean_probability(model_dirs, encode):
    seen = likelihoods(load_whole(model_dirs(2)), [encode("w1 w2 w3")])[0]
    p = math.exp(float(seen.log_probability.mean()))
    assert confidence(seen) == pytest.approx(math.log(p / (1 - p)), abs=1e-9)


def test_places_are_averaged_in_bands_that_double(model_dirs, encode):
    seen = likelihoods(load_whole(model_dirs(2)), [encode(t) for t in random_texts(3, 1, 6)])
    stacked = np.stack([s.log_probability for s in seen])
    means = place_means(seen, 9)
    assert means[0] == pytest.approx(stacked[:, 0].mean())
    assert means[1] == means[2] == pytest.approx(stacked[:, 1:3].mean())
    assert means[3] == means[5] == means[8] == pytest.approx(stacked[:, 3:5].mean())  # Beyond the texts: the last band.
    assert place_means((), 5).tolist() == [0.0] * 5
    assert place_means(seen, 0).tolist() == []


def test_a_shadow_copies_what_the_trained_model_gives_away(model_dirs, trained):
    base = Recipe(rank=3, scale=2.0, targets=("up_proj",), samples=7, batch=4, steps=5, rate=1e-3, moved=None, limit=16)
    public = load_whole(model_dirs(2))
    recipe = recipe_of(trained, public, view_of(releases=12), base)
    assert (recipe.rank, recipe.targets, recipe.samples) == (8, ("k_proj", "o_proj", "q_proj", "v_proj"), 12)
    deltas = [a.detach() - b.detach() for a, b in zip(trained.parameters(), public.parameters(), strict=True)]
    assert recipe.moved == pytest.approx(math.sqrt(sum(float(d.square().sum()) for d in deltas)), rel=1e-5)
    # Equal models say nothing: the settings stand.
    assert recipe_of(public, public, dataclasses.replace(view_of(), traffic=()), base) == base


def test_training_stops_where_it_has_moved_far_enough(model_dirs, encode):
    model = load_whole(model_dirs(2))
    add_adapters(model, 4, 8.0, seed=1)
    texts = [encode(t) for t in random_texts(8, 1)]
    recipe = Recipe(rank=4, scale=2.0, targets=(), samples=8, batch=4, steps=50, rate=1e-2, moved=0.5, limit=16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    taken = fine_tune(model, texts, recipe, torch.Generator().manual_seed(1))
    assert 1 <= taken < 50
    assert moved(model, 2.0) >= 0.5
    merged, plain = 0.0, dict(model.named_parameters())
    for name, value in plain.items():
        if "lora_A" in name:
            b = plain[name.replace("lora_A", "lora_B")].detach().double()
            merged += float((2.0 * b @ value.detach().double()).square().sum())
        elif "lora" not in name:
            assert torch.equal(value, before[name])
    assert moved(model, 2.0) == pytest.approx(math.sqrt(merged), rel=1e-9)


def test_what_is_missing_is_said_beforehand():
    notes = config().attacks
    for attack in ATTACKS:
        assert notes[attack.name].channel == "O6"
        assert notes[attack.name].measure == "membership"
        assert attack.blocked(view_of(), TEXT) is None
        assert "no trained model" in (attack.blocked(dataclasses.replace(view_of(), trained=False), TEXT) or "")
        assert "classes" in (attack.blocked(dataclasses.replace(view_of(), classes=3), TEXT) or "")
    lira_attack = next(a for a in ATTACKS if a.name == "membership-lira")
    assert notes["membership-lira"].slow
    assert "public text" in (lira_attack.blocked(view_of(), Threat(text="none")) or "")


# --- the pre-trained model ------------------------------------------------------------------------------------------

MULTIRC = Path(__file__).parents[2].parent / "shared" / "data" / "multirc"


@pytest.mark.slow
@pytest.mark.skipif(not (MULTIRC / "train.jsonl").is_file(), reason="the MultiRC passages are not here")
def test_on_the_pretrained_model_and_real_text():
    from securesplit.cli.model import default_cache
    from securesplit.model.plan import CutPlan
    from securesplit.model.resolve import resolve_model
    from securesplit.model.store import load_front

    directory = resolve_model("smollm2-135m", default_cache(), CutPlan(2, 2))
    tokenizer = load_tokenizer(directory)
    lines = (MULTIRC / "train.jsonl").read_text(encoding="utf-8").splitlines()
    # Shuffled: the file is ordered by source, and an order would tell members from others without any membership.
    lines = [lines[i] for i in np.random.default_rng(4).permutation(len(lines))]
    cut = [tokenizer.encode(json.loads(line)["passage"]["text"])[:48] for line in lines[:200]]
    texts = [tokenizer.decode(ids) for ids in cut]
    encode = lambda text: tokenizer.encode(text)[:48]  # noqa: E731
    members, others, elsewhere, public = texts[:50], texts[50:100], texts[100:150], texts[150:]

    def trained_on(its_own):
        model = load_whole(directory)
        add_adapters(model, 8, 16.0, seed=1)
        recipe = Recipe(rank=8, scale=2.0, targets=(), samples=50, batch=10, steps=40, rate=2e-3, moved=None, limit=48)
        fine_tune(model, [encode(t) for t in its_own], recipe, torch.Generator().manual_seed(1))
        return model

    whole, front = load_whole(directory), load_front(directory)
    mixture, inside = mixed(members, others)
    for its_own, seen in ((members, True), (elsewhere, False)):
        trained_model = trained_on(its_own)
        loader = lambda m=trained_model: m  # noqa: E731
        public_model = PublicModel(
            front, front.base.get_input_embeddings().weight.detach(), whole=lambda: whole, trained=loader, encode=encode
        )
        known = Knowledge(
            model=public_model, prior=prior_from(public, encode, 49152), noise=Noise(0.0, None), length=48,
            profile=profile_named("smoke"), candidates=tuple(mixture),
        )  # fmt: skip
        for attack in FAST:
            found = split(rate(attack, known, view_of(48)), inside)
            area, (low, high) = auc(*found), auc_interval(*found)
            print(attack.name, seen, round(area, 3), (round(low, 3), round(high, 3)), tpr_at(*found, 0.01).recall)
            if seen and attack.name in {"membership-loss", "membership-reference"}:
                assert area > 0.9
            if not seen:
                assert low <= 0.5 <= high
