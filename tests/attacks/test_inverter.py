"""The learned inverter reads what is there, falls to the prior where nothing is, and is at least the published one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from attacks.config import config, settings_of
from attacks.inverter import ATTACKS, Inverted, better, fitted, study_of
from attacks.knowledge import Knowledge, learn
from attacks.prior import Prior
from attacks.sip import Settings as SipSettings
from attacks.sip import train_sip
from attacks.threat import Threat
from attacks.view import Key, Noise, PublicModel, ServerView, Sighting
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model
from securesplit.privacy.clip import clip_sequence

LENGTH = 12
(INVERTER,) = ATTACKS


def quiet(done: int, total: int) -> None:
    assert 0 <= done <= total


def prior_of(texts: torch.Tensor, vocabulary: int) -> Prior:
    counts = torch.bincount(texts.flatten(), minlength=vocabulary).double() + 0.1
    log_probability = (counts / counts.sum()).log().float()
    favourites = torch.argsort(log_probability, descending=True, stable=True)
    return Prior(log_probability, favourites, (), tuple(map(tuple, texts.tolist())))


def release(hidden: torch.Tensor, noise: Noise, seed: int) -> torch.Tensor:
    clipped = hidden if noise.clip is None else clip_sequence(hidden, noise.clip)
    return clipped + noise.sigma * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed))


def view_of(rows: torch.Tensor, noise: Noise) -> ServerView:
    table = [row.detach().numpy().astype(np.float32) for row in rows]
    return ServerView(
        tuple(Sighting(Key("spiffe://t/a", step, 0), row, row, 1) for step, row in enumerate(table)), noise
    )


@pytest.fixture(scope="module")
def gentle():
    """``gentle(layers)``: A of a random model whose rows, as a trained model's, mostly say their own token."""
    sizes = {
        "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.1, "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(10)

    def cut(layers: int):
        front = split_model(model, CutPlan(front=layers, back=1)).front
        return front, front.base.get_input_embeddings().weight.detach()

    return {layers: cut(layers) for layers in (0, 1, 2)}


@pytest.fixture(scope="module")
def scene(gentle, draw):
    """``scene(layers, noise, seed)``: a view, what is known, and the true tokens."""

    def make(layers: int, noise: Noise, *, count=24, seed=1, whole=None, rows=1500, parts=None, slow=False):
        front, embedding = parts or gentle[layers]
        truth = draw(count, LENGTH, 900 + seed)
        with torch.inference_mode():
            view = view_of(release(front(truth).float(), noise, seed), noise)
        prior = prior_of(draw(500, LENGTH, 5), len(embedding))
        model = PublicModel(front, embedding, whole=whole, sentinel=None if whole is None else 0)
        profile = config().profiles["smoke"].model_copy(update={"rows": rows, "slow": slow})
        return view, learn(model, prior, view, profile, Threat(), seed=seed), truth

    return make


def hits(answer, truth: torch.Tensor) -> float:
    return float((torch.tensor(answer.tokens) == truth).double().mean())


def mode_share(known: Knowledge, truth: torch.Tensor) -> float:
    return float((truth == known.prior.favourites[0]).double().mean())


def half_width(truth: torch.Tensor, share: float) -> float:
    return 1.96 * (share * (1 - share) / truth.numel()) ** 0.5


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_without_noise_it_reads_nearly_everything(scene, layers):
    view, known, truth = scene(layers, Noise(0.0, None))
    answer = INVERTER.run(view, known, quiet)
    assert answer.keys == tuple(seen.key for seen in view.sightings)
    assert hits(answer, truth) > (0.999 if layers == 0 else 0.93)


def test_a_clip_alone_hides_nothing(scene, gentle, draw):
    front, _ = gentle[1]
    with torch.inference_mode():
        norm = float(front(draw(20, LENGTH, 5)).flatten(1).norm(dim=1).median())
    view, known, truth = scene(1, Noise(0.0, 0.3 * norm))
    assert hits(INVERTER.run(view, known, quiet), truth) > 0.93


@pytest.mark.parametrize("slow", [False, True])
def test_at_infinite_noise_it_falls_to_the_prior_and_not_below(scene, slow):
    view, known, truth = scene(2, Noise(1e6, None), count=80, slow=slow)
    share = mode_share(known, truth)
    assert abs(hits(INVERTER.run(view, known, quiet), truth) - share) <= half_width(truth, share) + 0.02


def test_shuffled_observations_are_read_as_what_they_are_and_not_as_the_truth(scene, draw):
    view, known, truth = scene(1, Noise(0.0, None), count=80)
    answer = INVERTER.run(view, known, quiet)
    others = truth.flatten()[torch.randperm(truth.numel(), generator=torch.Generator().manual_seed(3))].view_as(truth)
    # Tokens are drawn independently: a wrong sequence agrees as often as two draws do.
    frequency = torch.bincount(truth.flatten()).double() / truth.numel()
    assert hits(answer, others) == pytest.approx(float(frequency.square().sum()), abs=0.05)


def test_recovery_falls_with_the_noise(scene):
    figures = []
    for sigma in (0.0, 1.0, 3.0, 9.0, 1e4):
        view, known, truth = scene(1, Noise(sigma, None), count=48)
        figures.append(hits(INVERTER.run(view, known, quiet), truth))
    assert figures[0] > 0.93
    assert figures[0] - figures[-1] > 0.6
    assert all(low <= high + 0.03 for high, low in itertools.pairwise(figures))


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_it_is_at_least_bisr_sip_on_the_same_public_rows(scene, fronts, sigma):
    # On rows that mostly say their context, where a recurrence is what counts.
    view, known, truth = scene(1, Noise(sigma, None), rows=1500, parts=fronts(1), count=60, slow=True)
    study = study_of(known)
    settings = SipSettings(hidden=256, dropout=0.1, rate=1e-3, decay=1e-5, batch=6, epochs=3)
    sip = train_sip(study.train, study.test, sigma, settings, epochs=3, seed=1)
    rows = torch.stack([torch.from_numpy(seen.rows) for seen in view.sightings])
    theirs = float((sip.tokens(rows) == truth).double().mean())
    assert hits(INVERTER.run(view, known, quiet), truth) >= theirs - 0.03


def test_tokens_that_no_public_text_holds_are_read_as_well(gentle, draw):
    front, embedding = gentle[1]
    truth = torch.randint(100, len(embedding), (24, LENGTH), generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        view = view_of(front(truth).float(), Noise(0.0, None))
    texts = draw(600, LENGTH, 5)
    texts = texts[(texts < 100).all(1)]
    profile = config().profiles["smoke"].model_copy(update={"rows": 3000})
    known = learn(PublicModel(front, embedding), prior_of(texts, len(embedding)), view, profile)
    assert hits(INVERTER.run(view, known, quiet), truth) > 0.85


def test_the_form_that_ignores_the_noise_competes_and_the_best_is_kept(scene):
    from attacks.discriminant import calibrated, scorer_of
    from attacks.rehearsal import released

    view, known, _ = scene(1, Noise(2.0, None))
    study, reader = study_of(known), fitted(known, 2.0).reader
    generator = torch.Generator().manual_seed(9)
    tested = released(study.test.rows, 2.0, generator)[:, 1:].flatten(0, 1)
    truth = study.test.tokens[:, 1:].flatten()
    rows, tokens = study.train.rows[:, 1:].flatten(0, 1), study.train.tokens[:, 1:].flatten()
    means = study.codebook.linear + study.codebook.offset
    naive = calibrated(scorer_of(means, tokens, rows, 0.0), tested, truth, known.prior.log_probability)
    assert reader.hits >= naive[2] - 0.05
    assert len(view.sightings) == 24


def test_a_seed_repeats_and_the_study_is_shared(scene):
    view, known, _ = scene(1, Noise(3.0, None), slow=True)
    assert study_of(known) is study_of(known.reseeded(5))
    first, second = (INVERTER.run(view, known, quiet) for _ in range(2))
    assert first.tokens == second.tokens


def test_without_public_text_it_still_runs(scene, gentle):
    front, embedding = gentle[1]
    view, known, truth = scene(1, Noise(0.0, None))
    rank = 1 / (torch.arange(len(embedding)).double() + 2.7)
    log_probability = (rank / rank.sum()).log().float()
    bare = Prior(log_probability, torch.arange(len(embedding)), (), ())
    known = learn(PublicModel(front, embedding), bare, view, known.profile)
    assert hits(INVERTER.run(view, known, quiet), truth) > 0.9


class Successor(torch.nn.Module):
    """A language model that expects token t + 1 behind token t, as a stand-in for the public one."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(torch.eye(vocabulary))
        self.config = transformers.LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)

    def get_input_embeddings(self):
        return self.table

    def forward(self, inputs_embeds, **_):
        rolled = torch.roll(inputs_embeds, 1, dims=-1)
        return SimpleNamespace(logits=(rolled * 0.98 + 0.02 / rolled.shape[-1]).log())


def test_a_language_model_is_heard_where_it_helps_and_only_there(scene, gentle):
    noise = Noise(3.0, None)
    front, embedding = gentle[0]
    _, known, _ = scene(0, noise)
    plain = Inverted(fitted(known, noise.sigma).reader)
    asked = replace(plain, model=Successor(len(embedding)), share=0.1)
    start = torch.randint(1, 60, (20, 1), generator=torch.Generator().manual_seed(4))
    ordered = start + torch.arange(LENGTH)
    with torch.inference_mode():
        rows, reverse = (release(front(t).float(), noise, 3) for t in (ordered, ordered.flip(1)))
    chosen = better([plain, asked], rows, ordered)
    assert chosen.form == "language model"
    gain = (chosen.tokens(rows) == ordered).double().mean() - (plain.tokens(rows) == ordered).double().mean()
    assert gain > 0.1
    # Text in the opposite order: the model is wrong every time, and is not asked.
    assert better([plain, asked], reverse, ordered.flip(1)) is plain


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 4])
def test_on_the_pretrained_model_it_is_at_least_bisr_sip(layers):
    """Public ward notes against other ward notes; a third of the original's epochs, which gives the GRU most of its figure."""
    from securesplit.cli.model import default_cache
    from securesplit.data.notes import ward_notes
    from securesplit.errors import InputError
    from securesplit.model.resolve import cached_model
    from securesplit.model.store import load_tokenizer, load_whole

    try:
        directory = cached_model("smollm2-135m", default_cache())
    except InputError:
        pytest.skip("the model was not pulled")
    tokenizer, whole = load_tokenizer(directory), load_whole(directory)
    front = split_model(whole, CutPlan(front=layers, back=2)).front
    encoded = [tokenizer.encode(note.text) for note in ward_notes(300, seed=99)]
    truth = torch.tensor(
        [t for t in (tokenizer.encode(n.text)[:48] for n in ward_notes(40, seed=7)) if len(t) == 48][:12]
    )
    with torch.inference_mode():
        hidden = front(truth).float()
    sigma = 2 * float(hidden[:, 1:].norm(dim=-1).median()) / hidden.shape[-1] ** 0.5
    embedding = whole.get_input_embeddings().weight.detach()
    counts = (
        torch.bincount(torch.tensor([t for text in encoded for t in text]), minlength=len(embedding)).double() + 0.1
    )
    log_probability = (counts / counts.sum()).log().float()
    favourites = torch.argsort(log_probability, descending=True, stable=True)
    prior = Prior(log_probability, favourites, (), tuple(map(tuple, encoded)))
    for noise, floor in ((Noise(0.0, None), 0.95), (Noise(sigma, None), 0.6)):
        view = view_of(release(hidden, noise, 3), noise)
        model = PublicModel(front, embedding, whole=lambda: whole, sentinel=tokenizer.bos_token_id)
        known = learn(model, prior, view, config().profiles["smoke"].model_copy(update={"slow": True}))
        study = study_of(known)
        sip = train_sip(study.train, study.test, noise.sigma, settings_of("bisr_sip", SipSettings), epochs=7, seed=1)
        rows = torch.stack([torch.from_numpy(seen.rows) for seen in view.sightings])
        theirs = float((sip.tokens(rows) == truth).double().mean())
        ours = hits(INVERTER.run(view, known, quiet), truth)
        assert ours >= max(theirs, floor)
