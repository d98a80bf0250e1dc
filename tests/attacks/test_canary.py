"""Canaries stand out where they were trained on and nowhere else; a model that learnt notes by heart gives them away."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import time

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from attacks.canary import ATTACKS
from attacks.config import config
from attacks.exposure import exposure
from attacks.extraction import Sampling, ordinary_words, pieces_of, prompts_of, ranked, write
from attacks.knowledge import Knowledge, profile_named
from attacks.perplexity import likelihoods
from attacks.prior import prior_from
from attacks.rates import extraction
from attacks.threat import Threat
from attacks.view import Key, Noise, Passage, PublicModel, ServerView
from securesplit.data.notes import ward_notes

PUBLIC = [note.text for note in ward_notes(120, seed=99)]
PRIVATE = ward_notes(5, seed=7)
DIGITS = 4


def train(model, texts, encode, steps, rate):
    """A plain loop over one batch of padded texts."""
    ids = [encode(text) for text in texts]
    width = max(map(len, ids))
    rows = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
    labels = torch.tensor([[*row, *[-100] * (width - len(row))] for row in ids])
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        part = torch.randperm(len(rows), generator=generator)[:8]
        optimiser.zero_grad()
        model(input_ids=rows[part], labels=labels[part]).loss.backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        PUBLIC, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    return inner


@pytest.fixture(scope="module")
def encode(tokenizer):
    return lambda text: tokenizer.encode(text).ids


@pytest.fixture(scope="module")
def public_model(encode):
    """A tiny language model that has seen public notes."""
    torch.manual_seed(4)
    sizes = {
        "vocab_size": 600, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return train(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), PUBLIC, encode, 60, 5e-3)


def siblings(count, seed):
    """Different strings of one format, of which any may be planted."""
    numbers = np.random.default_rng(seed).permutation(10**DIGITS)[:count]
    return [f"The code of the ward is {number:0{DIGITS}d}." for number in numbers]


@pytest.fixture(scope="module")
def trained(public_model, encode):
    """The same model, which has learnt five notes and one canary by heart."""
    texts = [*(note.text for note in PRIVATE), *siblings(1, seed=5)]
    return train(copy.deepcopy(public_model), texts, encode, 120, 3e-3)


@pytest.fixture(scope="module")
def know(tokenizer, encode, public_model, fronts):
    front, embedding = fronts(2)

    def make(model, candidates=(), seed=0, profile="standard"):
        public = PublicModel(
            front, embedding, whole=lambda: public_model, trained=lambda: model, encode=encode,
            decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False),
        )  # fmt: skip
        return Knowledge(
            model=public, prior=prior_from(PUBLIC, encode, 600), noise=Noise(0.0, None), length=64,
            profile=profile_named(profile), candidates=tuple(candidates), seed=seed,
        )  # fmt: skip

    return make


VIEW = ServerView(
    sightings=(), noise=Noise(0.0, None), trained=True,
    traffic=(Passage(Key("a", 0, 0), 0, np.zeros((96, 4), dtype=np.float32), 1),),
)  # fmt: skip


def run(name, known, view=VIEW):
    attack = next(a for a in ATTACKS if a.name == name)
    return attack.run(view, known, lambda done, total: None)


@pytest.mark.parametrize("name", ["canary", "canary-reference"])
def test_a_canary_that_was_learnt_is_exposed_and_one_that_was_not_is_not(name, know, trained, public_model):
    strings = siblings(200, seed=5)
    space = 10**DIGITS
    scores = run(name, know(trained, strings)).scores
    assert exposure(scores[0], scores[1:], space) > math.log2(200)
    assert scores[0] == max(scores)
    scores = run(name, know(public_model, strings)).scores
    bits = [exposure(scores[i], [*scores[:i], *scores[i + 1 :]], space) for i in range(len(scores))]
    if name == "canary":
        assert np.mean(bits) == pytest.approx(1 / math.log(2), abs=0.25)  # A uniform rank has 1.44 bits.
        assert bits[0] < 6
    else:
        assert set(scores) == {0.0}


def test_scores_are_of_whole_strings(know, trained, encode):
    strings = siblings(3, seed=8)
    expected = [float(s.log_probability.sum()) for s in likelihoods(trained, [encode(t) for t in strings])]
    assert list(run("canary", know(trained, strings)).scores) == pytest.approx(expected, abs=1e-4)
    assert run("canary", know(trained, ())).scores == ()


# --- extraction -----------------------------------------------------------------------------------------------------


def test_what_was_learnt_by_heart_is_extracted_and_little_else_comes_first(know, trained, public_model):
    pieces = [piece for note in PRIVATE for piece in note.pii]
    answer = run("pii-extraction", know(trained))
    found = extraction(answer.spans, pieces)
    assert found.recall >= 0.7
    assert extraction(answer.spans[:5], pieces).precision >= 0.6
    before = extraction(run("pii-extraction", know(public_model, profile="smoke")).spans, pieces)
    assert before.hits == 0


def test_public_pieces_are_no_secrets(tokenizer, encode, public_model, trained):
    decode = lambda ids: tokenizer.decode(list(ids))  # noqa: E731
    text = PRIVATE[0].text
    words = ordinary_words(PUBLIC)
    assert PRIVATE[0].pii[0] in ranked(trained, public_model, [tuple(encode(text))], decode, PUBLIC, words)
    assert ranked(trained, public_model, [tuple(encode(text))], decode, [*PUBLIC, text], words) == ()
    assert ranked(trained, public_model, [], decode, PUBLIC, words) == ()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6))
def test_patterns_find_every_labelled_piece_of_the_notes(seed):
    words = ordinary_words(PUBLIC)
    for note in ward_notes(3, seed=seed):
        found = pieces_of(note.text, words)
        # Addresses may begin with "Flat 3" or hold a "St."; their pattern is the one that may miss.
        for piece in note.pii:
            assert piece in found or "," in piece or re.search(r"[^A-Za-z '-]", note.pii[0])


def test_patterns_by_hand():
    words = frozenset({"patient", "ward", "note", "the"})
    text = "Patient Ann Lee, mail a.b+c@x-y.org, +44 1632 960 111, born 03/04/1950, WN-123456. The Ward Note."
    assert set(pieces_of(text, words)) == {"Ann Lee", "a.b+c@x-y.org", "+44 1632 960 111", "03/04/1950", "WN-123456"}
    assert pieces_of("Jean-Luc O'Neil paid 123456 on 2024-01-31.", words) == ("Jean-Luc O'Neil", "123456", "2024-01-31")
    assert pieces_of("call 01632 9601", words) == ()  # Cut off, perhaps.
    assert "12 Smith ridges, North Ann" in pieces_of("living at 12 Smith ridges, North Ann, reported", words)
    assert pieces_of("the ward has 12 beds", words) == ()


@pytest.mark.parametrize(
    "text", ["A" + "a" * 4000 + "1", "Aa" * 2000, "Aa-" * 1500, "1 " * 2000, "a." * 2000, "12 " + "Aa " * 1500]
)
def test_no_text_that_a_model_may_write_makes_the_patterns_slow(text):
    start = time.process_time()
    pieces_of(text, frozenset())
    assert time.process_time() - start < 5.0


def test_prompts_are_the_commonest_openings_and_then_the_others():
    texts = [(1, 2, 3), (1, 2, 4), (5, 6, 7), (8,)]
    assert prompts_of(texts, 1, 2, [(9,), (1, 2), ()]) == ((1, 2), (9,))
    assert prompts_of((), 4, 2, [(9,)]) == ((9,),)


def test_writing_starts_with_the_models_favourite(trained, encode):
    prompt = encode("Ward note:")
    sampling = Sampling(count=3, tokens=6, top=5, temperature=1.0, seed=1)
    texts = write(trained, prompt, sampling, 0)
    assert len(texts) == 4
    ids = list(prompt)
    for _ in range(6):  # Without a cache, one token after the other.
        with torch.inference_mode():
            ids.append(int(trained(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert texts[0] == tuple(ids)
    assert texts == write(trained, prompt, sampling, 0)
    assert texts[1:] != write(trained, prompt, sampling, 1)[1:]
    assert len(write(trained, prompt, dataclasses.replace(sampling, count=0), 0)) == 1


def test_what_is_missing_is_said_beforehand():
    for attack in ATTACKS:
        assert config().attacks[attack.name].channel == "O6"
        assert attack.blocked(VIEW, Threat()) is None
        assert "no trained model" in (attack.blocked(dataclasses.replace(VIEW, trained=False), Threat()) or "")
        assert "classes" in (attack.blocked(dataclasses.replace(VIEW, classes=2), Threat()) or "")
