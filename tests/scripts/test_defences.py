"""The defences benchmark: what each defence shows, that a reader of its code breaks what has no noise, and matched quality."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from scripts.defences import curves, table
from scripts.defences import train as training
from scripts.defences.attacker import Beam, beam_search, fit_codebook, fit_ridge, ridge_guess, states_alone
from scripts.defences.cells import Cell
from scripts.defences.defence import Bottleneck, Linear, Permuted, Quantised, TopK, clip_rows
from scripts.defences.denoise import fit_denoiser, listen, losses, standard
from scripts.defences.matching import Search, match
from scripts.defences.moments import distance_correlation, principal, quantile_norm, standardised
from scripts.defences.utility import Public, fit_server, least_squares, opening, sequence_losses
from scripts.defences.world import Opened, World, read_texts, states, unigram
from securesplit.errors import InputError
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model
from securesplit.privacy.calibrate import epsilon_for

VOCABULARY, WIDTH, LENGTH = 90, 32, 7


def draw(count, seed, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, VOCABULARY).double()
    return 1 + torch.multinomial(weights, count * length, replacement=True, generator=generator).view(count, length)


@pytest.fixture(scope="module")
def world():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(
            vocab_size=VOCABULARY, num_hidden_layers=4, initializer_range=0.3, tie_word_embeddings=True, **sizes
        )
        whole = LlamaForCausalLM(config).eval().requires_grad_(requires_grad=False)
    parts = split_model(whole, CutPlan(front=2, back=1))
    embedding = whole.get_input_embeddings().weight.detach().clone()
    return World(parts.front, parts.middle, parts.back, whole, embedding, unigram(draw(200, 1), VOCABULARY))


@pytest.fixture(scope="module")
def public(world):
    tokens = draw(300, 1)
    hidden = states(world.front, tokens)
    tune = draw(8, 2)
    return Public(tokens, tune, hidden, hidden, states(world.front, tune))


def codebook_for(world, public, defence):
    seen = defence.canonical(defence.release(public.hidden, torch.Generator().manual_seed(5)))
    return fit_codebook(defence, world.table, states_alone(world.front, world.table), public.train, seen)


def exact_defences(hidden):
    mean, scale = standardised(hidden)
    return {
        "1 bit": Quantised(mean, scale, 1),
        "4 bits": Quantised(mean, scale, 4),
        "top 4": TopK(mean, scale, 4),
        "rows": Permuted(rows=True, columns=False),
        "columns": Permuted(rows=False, columns=True),
        "rows and columns": Permuted(rows=True, columns=True),
    }


@pytest.mark.parametrize("name", ["1 bit", "4 bits", "top 4", "rows", "columns", "rows and columns"])
def test_what_has_no_noise_is_broken_by_an_attacker_who_knows_it(world, public, name):
    defence = exact_defences(public.hidden)[name]
    tokens = draw(6, 9)
    observed = defence.release(states(world.front, tokens), torch.Generator().manual_seed(4))
    codebook, everywhere = codebook_for(world, public, defence), Search(ladder=(16,), deep=10**6)
    found = match(world, world.front, defence, defence.canonical(observed), codebook, everywhere, lambda _: None)
    assert (found.tokens == tokens).float().mean() >= 0.97


def test_an_attacker_who_does_not_know_the_permutation_gets_little(world, public):
    defence, tokens = Permuted(rows=False, columns=True), draw(20, 9)
    observed = defence.release(states(world.front, tokens), torch.Generator().manual_seed(4))
    naive = fit_ridge(world.front, lambda hidden: hidden, world.table, public.train)
    blind, plain = (
        float((ridge_guess(naive, rows) == tokens).float().mean()) for rows in (observed, states(world.front, tokens))
    )
    assert plain > 0.3
    assert blind < plain / 2


def test_a_permutation_keeps_the_values_and_costs_no_quality(world):
    hidden = states(world.front, draw(3, 9))
    for rows, columns in ((True, False), (False, True), (True, True)):
        defence = Permuted(rows, columns)
        seen = defence.release(hidden, torch.Generator().manual_seed(2))
        assert not torch.equal(seen, hidden)
        assert torch.equal(seen.flatten(1).sort(1).values, hidden.flatten(1).sort(1).values)
        assert torch.equal(defence.served(hidden, seen), hidden)
        assert defence.mu is None
    mixed = Permuted(rows=True, columns=False).release(hidden, torch.Generator().manual_seed(2))
    assert {tuple(row.tolist()) for row in mixed[0]} == {tuple(row.tolist()) for row in hidden[0]}


def test_quantised_rows_have_so_many_values_and_top_k_keeps_the_farthest(world, public):
    mean, scale = standardised(public.hidden)
    for bits in (1, 2, 4):
        values = Quantised(mean, scale, bits).expected(public.hidden).unique()
        assert len(values) <= 2**bits
        assert torch.allclose(values, -values.flip(0), atol=1e-6)
    fine = Quantised(mean, scale, 12).expected(public.hidden)
    inside = ((public.hidden - mean) / scale).abs() < 3
    assert ((fine - (public.hidden - mean) / scale).abs()[inside] <= 3 / 2**12 + 1e-6).all()
    kept = TopK(mean, scale, 4).expected(public.hidden)
    rows = (public.hidden - mean) / scale
    assert (kept != 0).sum(-1).eq(4).all()
    assert torch.equal(kept.abs().amax(-1), rows.abs().amax(-1))
    assert (kept.abs().masked_fill(kept == 0, math.inf).amin(-1) >= rows.masked_fill(kept != 0, 0).abs().amax(-1)).all()


@pytest.mark.parametrize("whiten", [False, True])
def test_a_shaped_code_costs_its_true_worst_case(public, whiten):
    mean, basis = principal(public.hidden, 8, whiten=whiten)
    clip = quantile_norm((public.hidden - mean) @ basis, 0.5)
    defence = Linear(mean, basis, clip, 2 * clip / 5.0)
    assert defence.mu == pytest.approx(5.0)
    # Any two states, however far apart, are no further apart than 2 C in the norm in which the noise is isotropic.
    wild = 1e4 * torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1))
    codes = defence.expected(wild).double()
    assert torch.cdist(codes, codes).max() / defence.sigma <= 5.0 + 1e-4
    noise = defence.release(public.hidden, torch.Generator().manual_seed(3)) - defence.expected(public.hidden)
    assert float(noise.std()) == pytest.approx(defence.sigma, rel=0.02)
    assert Linear(None, None, math.inf, 1.0).mu is None


def test_the_likelihoods_are_those_of_the_noise(public):
    generator = torch.Generator().manual_seed(6)
    hidden, rows = public.hidden[:4, :3], torch.randn(4, 1, 5, generator=generator)
    mean, matrix = public.hidden.mean((0, 1)), torch.randn(WIDTH, 5, generator=generator) / 8
    linear = Linear(mean, matrix, 2.0, 0.7)
    vib = Bottleneck(mean, matrix, torch.ones(5), matrix.flip(0) / 4, torch.zeros(5))
    for defence, deviation in ((linear, torch.tensor(0.7)), (vib, (vib.log_variance(hidden) / 2).exp())):
        oracle = torch.distributions.Normal(defence.expected(hidden), deviation).log_prob(rows).sum(-1)
        gap = defence.log_likelihood(rows, hidden) - oracle
        assert torch.allclose(gap, gap[:1, :1].expand_as(gap), atol=1e-3)
    assert vib.mu is None
    assert clip_rows(10 * rows, 2.0).norm(dim=-1).max() <= 2.0 + 1e-5


def test_noise_is_read_when_weak_and_leaves_the_prior_when_strong(world, public):
    tokens = draw(24, 9)
    hidden, clip = states(world.front, tokens), quantile_norm(public.hidden, 0.5)
    got = []
    for mu in (200.0, 14.0, 0.05):
        defence = Linear(None, None, clip, 2 * clip / mu)
        rows = defence.release(hidden, torch.Generator().manual_seed(8))
        codebook = codebook_for(world, public, defence)
        guess = beam_search(world, world.front, defence, rows, codebook, Beam(4, VOCABULARY, share=1.0), lambda _: None)
        got.append(float((guess == tokens).float().mean()))
    assert got[0] > 0.97
    assert got[0] >= got[1] > got[2]
    commonest = float((tokens == world.log_unigram.argmax()).float().mean())
    assert abs(got[2] - commonest) < 0.12


def test_a_learnt_variance_is_read_through(world, public):
    mean, basis = principal(public.hidden, 16, whiten=True)
    vib = Bottleneck(mean, basis, torch.zeros(16), 0.05 * basis, torch.full((16,), -7.0))
    tokens = draw(8, 9)
    rows = vib.release(states(world.front, tokens), torch.Generator().manual_seed(8))
    guess = beam_search(
        world, world.front, vib, rows, codebook_for(world, public, vib), Beam(4, VOCABULARY), lambda _: None
    )
    assert (guess == tokens).float().mean() > 0.95


def test_without_noise_the_served_loss_is_that_of_the_whole_model(world, public):
    first = opening(world.front)
    served = fit_server(world, first, Linear(None, None, math.inf, 0.0, exact=True), public, own=None, steps=0, seed=1)
    tokens = draw(5, 12)
    losses = sequence_losses(world, first, served(states(world.front, tokens)), tokens)
    ids = torch.cat([torch.zeros(5, 1, dtype=torch.long), tokens], dim=1)
    log_p = world.whole(ids).logits[:, 1:-1].log_softmax(-1).gather(-1, ids[:, 2:, None])[..., 0]
    assert torch.allclose(losses, -log_p.mean(1), atol=0.02)  # B and C are fed bfloat16.


def test_least_squares_finds_an_affine_map_and_training_the_server_helps_or_is_dropped(world, public):
    matrix = torch.randn(WIDTH, 20, generator=torch.Generator().manual_seed(1))
    rows = public.hidden @ matrix
    fitted = least_squares(rows, public.hidden @ torch.ones(WIDTH, 3) + 5)
    assert torch.allclose(fitted(rows).mean(), (public.hidden.sum(-1) + 5).mean(), rtol=1e-3)
    clip = quantile_norm(public.hidden, 0.5)
    served = fit_server(
        world, opening(world.front), Linear(None, None, clip, clip / 4), public, own=None, steps=12, seed=1
    )
    assert set(served.tuned) == {"least squares", "raw", "trained"}


def test_the_front_behind_a_sentinel_decodes_as_it_reads(world):
    tokens, front = draw(2, 4), Opened(world.front, 2)
    cache = front.new_cache()
    parts = [front(tokens[:, i : i + 1], cache=cache) for i in range(LENGTH)]
    assert torch.allclose(torch.cat(parts, 1), states(world.front, tokens), atol=1e-4)


@pytest.mark.parametrize("kind", ["nopeek", "vib", "shaped"])
def test_training_moves_only_its_own_weights_and_is_read_back(world, public, kind, tmp_path):
    before = {name: tensor.clone() for name, tensor in world.whole.state_dict().items()}
    model = training.fresh(world, public.hidden, kind, 8)
    weight = {"nopeek": 2.0, "vib": 0.01, "shaped": 20.0}[kind]
    facts = training.train(model, world, public.train, weight=weight, steps=4, seed=0, progress=lambda *_: None)
    assert math.isfinite(facts["loss"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in world.whole.state_dict().items())
    training.save(model, tmp_path / "a.safetensors")
    again = training.fresh(world, public.hidden, kind, 8)
    training.load(again, tmp_path / "a.safetensors")
    one, two = (m.finish(weight, {}) for m in (model, again))
    tokens = draw(2, 4)
    hidden = states(one.front, tokens)
    assert torch.equal(hidden, states(two.front, tokens))
    assert not torch.equal(hidden, states(world.front, tokens))
    assert torch.equal(one.defence.expected(hidden), two.defence.expected(hidden))
    if kind != "nopeek":
        assert torch.allclose(one.defence.expected(hidden), clipped(model, hidden, kind), atol=1e-3)
    assert (one.defence.mu is None) == (kind != "shaped")


def clipped(model, hidden, kind):
    with torch.no_grad():
        return model.code(hidden) if kind == "vib" else clip_rows(model.code(hidden), math.sqrt(8))


def test_distance_correlation_against_a_direct_sum():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 3, generator=generator)
    y = x.square() + 0.1 * torch.randn(40, 3, generator=generator)

    def plain(v):
        a = np.array([[float((p - q).norm()) for q in v] for p in v])
        return a - a.mean(0) - a.mean(1)[:, None] + a.mean()

    a, b = plain(x), plain(y)
    oracle = math.sqrt((a * b).mean() / math.sqrt((a * a).mean() * (b * b).mean()))
    assert float(distance_correlation(x, y)) == pytest.approx(oracle, abs=1e-3)
    assert float(distance_correlation(x, 3 * x + 1)) == pytest.approx(1.0, abs=1e-4)


def test_recovery_at_a_loss_by_hand():
    losses, recoveries = [5.0, 4.0, 4.5], [0.2, 1.0, 0.8]
    at = curves.recovery_at
    assert at(losses, recoveries, 4.0) == 1.0
    assert at(losses, recoveries, 4.25) == pytest.approx(0.9)
    assert at(losses, recoveries, 4.75) == pytest.approx(0.5)
    assert at(losses, recoveries, 9.0) == 0.2  # Nobody must waste quality.
    assert at(losses, recoveries, 3.99) is None  # It cannot be had at that quality.
    assert at([4.2], [1.0], 4.2) == 1.0


def point(kind, level, loss, share, *, mu=None, unresolved=None):
    jitter = np.linspace(-0.5, 0.5, 30)
    hits = {"ridge": np.full(30, 1.0), "codebook": np.full(30, 2.0), "ridge, unaware": np.full(30, 1.0)}
    hits["match" if unresolved is not None else "beam"] = np.full(30, 20 * share)
    return curves.Point(kind, level, loss + jitter, hits, 20, mu, unresolved, {}, 1.0)


def test_differences_are_paired_and_intervals_hold_the_value():
    plain = [point("gaussian", 24, 6.0, 0.8), point("gaussian", 96, 4.5, 1.0)]
    better = [point("shaped", 24, 6.0, 0.3), point("shaped", 96, 4.5, 1.0)]
    gap = curves.difference(better, plain, 5.25)
    assert gap.value == pytest.approx(-0.25)
    assert gap.low <= gap.value <= gap.high < 0
    assert table._verdict(gap) == "leaks less"
    assert gap.inside
    assert curves.difference(better, plain, 4.0) is None
    assert table._verdict(curves.Matched(-0.01, -0.02, -0.005, inside=True)) == "the same within 0.03"
    got = curves.matched(better, 7.0)
    assert got.value == pytest.approx(0.3)
    assert not got.inside


def test_the_page_states_what_was_counted(tmp_path):
    base = Cell(
        kind="none", level=0.0, path=(), k=8, steps=1, training=1, public=10, test=10, length=20, seeds=3, width=4,
        candidates=32,
    )  # fmt: skip
    cells = {}

    def add(kind, level, loss, hits, *, mu=None, exact=False, setting=base):
        cell = dataclasses.replace(setting, kind=kind, level=level)
        attacks = {
            "ridge, unaware": [1] * 30,
            "ridge": [2] * 30,
            "codebook": [5] * 30,
            "match" if exact else "beam": [hits] * 30,
        }
        cells[cell.digest] = {
            "parameters": dataclasses.asdict(cell), "losses": (loss + np.linspace(-0.5, 0.5, 30)).tolist(),
            "denoised": [loss - 0.3] * 30 if kind == "gaussian" else [], "hits": attacks, "of": 20, "mu": mu,
            "unresolved": 3 if exact else None, "facts": {"tuning loss, raw": 4.5}, "seconds": 60.0,
        }  # fmt: skip

    add("gaussian", 99.0, 4.0, 20, setting=dataclasses.replace(base, steps=2))  # Of another setting: left out.
    add("none", 0.0, 4.0, 20, exact=True)
    add("gaussian", 48.0, 4.6, 18, mu=48.0)
    add("gaussian", 24.0, 5.6, 10, mu=24.0)
    add("topk", 8.0, 4.9, 20, exact=True)
    add("permuted", 3.0, 4.0, 20, exact=True)
    references = {
        "noiseless": [4.0] * 30,
        "client": [6.0] * 30,
        "unigram": [1] * 30,
        "told": [6] * 30,
        "alone": [1] * 30,
    }
    file = tmp_path / "defences.json"
    file.write_text(json.dumps({"references": {"setting": [], "of": 20, **references}, "cells": cells}))
    text = table.page(file)
    assert "mu 99" not in text
    assert "permuted rows and columns (SD)" in text
    assert f"{24 * math.sqrt(20):.4g} | {epsilon_for(24 * math.sqrt(20), 1e-5):.3g}" in text
    assert "| top-k | k = 8 | none | none | none |" in text
    # At half of the server's value, loss 5: plain Gaussian by interpolation 0.9 - 0.4 * 0.4 = 0.74, top-k all of it.
    assert "0.74 [" in text
    assert "50% kept: 0.26 [" in text
    assert "recovery at least 1.000 at every level" in text
    assert "at least 1.000 at every level measured (an attacker who has not read the code: down to 0.05)" in text
    assert "mu 48: 0.30 [" in text
    assert "Not measured, so that nothing is said of it here: Gaussian on centred states" in text
    assert "5 of 5 can be had; the least recovery is 0.62 [" in text
    assert "No cell in which the attack that knows most got less" in text


def test_no_private_passage_shares_eight_words_with_public_text(tmp_path):
    class Words:
        def encode(self, text, *, add_special_tokens):
            assert not add_special_tokens
            return [int(word[1:]) for word in text.split()]

    def write(name, passages):
        lines = (json.dumps({"passage": {"text": " ".join(f"w{n}" for n in words)}}) for words in passages)
        (tmp_path / name).write_text("\n".join(lines))

    write("train.jsonl", [range(100 * i, 100 * i + 30) for i in range(30)])
    write("val.jsonl", [*(range(100 * i, 100 * i + 30) for i in range(30, 36)), [*range(9000, 9010), *range(305, 325)]])
    texts = read_texts(tmp_path, Words(), seeds=2, sizes=(4, 3), length=8)
    parts = {name: set((getattr(texts, name) // 100).flatten().tolist()) for name in ("train", "tune", "test")}
    assert parts["test"] == set(range(30, 36))
    assert not parts["train"] & parts["tune"]
    assert texts.test.shape == (2, 3, 8)
    with pytest.raises(InputError, match="12 private and 4 public passages"):
        read_texts(tmp_path, Words(), seeds=3, sizes=(4, 4), length=8)


def test_the_clients_denoiser_helps_public_text_or_is_dropped_and_changes_no_released_byte(world, public):
    clip, first = quantile_norm(public.hidden, 0.5), opening(world.front)
    defence = Linear(None, None, clip, clip / 8)
    served = fit_server(world, first, defence, public, own=None, steps=0, seed=1)
    kept = public.hidden.clone()
    denoiser = fit_denoiser(world, first, defence, served, public, rows=64, steps=40, seed=1)
    assert torch.equal(kept, public.hidden)
    tokens = draw(6, 9)
    hidden = states(world.front, tokens)
    observed = defence.release(hidden, torch.Generator().manual_seed(1))
    heard = standard(listen(world, first, defence, served, (observed, hidden), tokens), denoiser.mean, denoiser.size)
    without = dataclasses.replace(denoiser, matrix=torch.zeros_like(denoiser.matrix))
    plain = sequence_losses(world, first, served(observed), tokens)
    assert torch.allclose(losses(world, without, heard), plain, atol=0.02)
    assert heard.sides.shape == (6, LENGTH, 3 * WIDTH)
    assert torch.allclose(denoiser.corrected(heard)[:, :1], heard.mixed[:, :1])
