"""The frontier benchmark: who reads what, that its release costs what it says, and that figures and verdicts add up."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from scripts.frontier.cells import Cell, World, channel_for, hear, judge, know, unigram
from scripts.frontier.client import pruned, train_client
from scripts.frontier.table import interval, read, section
from scripts.frontier.text import read_texts
from securesplit.errors import InputError

CELL = Cell(
    epsilon=64.0, code="plain", k=32, width=3, recombine=2, share=0.5, tune=8, test=4, length=6, client="", seeds=1
)


class Words:
    """A tokenizer: the word's number."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [int(word[1:]) for word in text.split()]


def write(path, passages):
    lines = (json.dumps({"passage": {"text": " ".join(f"w{n}" for n in words)}}) for words in passages)
    path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def world():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(
            vocab_size=23, num_hidden_layers=5, max_position_embeddings=64, tie_word_embeddings=True, **sizes
        )
        model = LlamaForCausalLM(config).eval()
    chunks = torch.randint(1, 23, (30, 6), generator=torch.Generator().manual_seed(1))
    return World(model, model.get_input_embeddings().weight.detach().clone(), unigram(chunks, 23), 0)


def test_no_passage_is_in_two_roles_and_siblings_are_dropped(tmp_path):
    # Passage i holds the words 100 i .. 100 i + 29; the private passage 40 quotes ten words of the public passage 3.
    public = [list(range(100 * i, 100 * i + 30)) for i in range(30)]
    private = [list(range(100 * i, 100 * i + 30)) for i in range(30, 39)]
    private.append([*range(4000, 4015), *range(305, 315), *range(4015, 4030)])
    write(tmp_path / "train.jsonl", public)
    write(tmp_path / "test.jsonl", private)
    one, two = (read_texts(tmp_path, Words(), seed=seed, sizes=(5, 4), length=8) for seed in (0, 1))
    sources = {name: set((getattr(one, name) // 100).flatten().tolist()) for name in ("train", "tune", "test")}
    assert not sources["train"] & sources["tune"]
    assert not (sources["train"] | sources["tune"]) & sources["test"]
    assert len(sources["tune"]) == 5
    assert not sources["test"] & set((two.test // 100).flatten().tolist())
    assert torch.equal(one.tune, two.tune)
    assert 40 not in sources["test"] | set((two.test // 100).flatten().tolist())
    with pytest.raises(InputError, match="needs 12 passages"):
        read_texts(tmp_path, Words(), seed=2, sizes=(5, 4), length=8)


@pytest.mark.parametrize("code", ["plain", "unit"])
@pytest.mark.parametrize("k", [32, 8])
def test_no_two_tokens_are_further_apart_than_the_noise_was_made_for(world, code, k):
    channel = channel_for(world, dataclasses.replace(CELL, code=code, k=k))
    apart = torch.cdist(channel.codes.double(), channel.codes.double()).max()
    # The known answer at epsilon 64 and delta 1e-5 is mu = 7.892 (privacy.md 2.1).
    assert apart / channel.sigma <= 7.893
    norms = channel.codes.norm(dim=1)
    assert 2 * norms.max() / channel.sigma == pytest.approx(7.892, abs=2e-3)
    assert channel.codes.shape == (23, k if code == "unit" else 32)


def test_a_cell_is_known_by_its_content():
    same = dataclasses.replace(CELL)
    assert same.digest == CELL.digest
    for field in dataclasses.fields(Cell):
        value = getattr(CELL, field.name)
        other = dataclasses.replace(CELL, **{field.name: value + 1 if not isinstance(value, str) else value + "x"})
        assert other.digest != CELL.digest


def test_pruning_keeps_the_named_layers_and_all_layers_are_the_model(world):
    ids = torch.randint(23, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(pruned(world.model, range(5))(ids).logits, world.model(ids).logits)
    small = pruned(world.model, (0, 4))
    assert torch.equal(small.model.layers[1].mlp.up_proj.weight, world.model.model.layers[4].mlp.up_proj.weight)


def test_training_leaves_the_model_and_the_embedding_alone_and_lowers_the_loss(world):
    before = {name: tensor.clone() for name, tensor in world.model.state_dict().items()}
    chunks = torch.arange(1, 7).repeat(16, 1)
    losses: list[float] = []
    small = train_client(
        world.model, chunks, seed=0, sentinel=0, layers=(0, 4), steps=60, batch=8, rate=3e-3,
        progress=lambda _, loss: losses.append(loss),
    )  # fmt: skip
    assert all(torch.equal(tensor, before[name]) for name, tensor in world.model.state_dict().items())
    assert torch.equal(small.get_input_embeddings().weight, world.table)
    assert losses[-1] < losses[0] - 0.4
    # The sampled normaliser stands for the vocabulary: 23 tokens are fewer than the sample, so that it is exact here.
    assert losses[0] == pytest.approx(math.log(23), abs=0.3)


def test_a_cell_without_noise_reaches_the_noiseless_loss_and_tells_all(world):
    tokens = torch.randint(1, 23, (8, 6), generator=torch.Generator().manual_seed(4))
    clear = dataclasses.replace(CELL, epsilon=1e6)
    heard = hear(world, clear, tokens, noise_seed=1, progress=lambda _: None)
    known = know(world, pruned(world.model, (0, 4)), tokens)
    assert all(share.mean() == 1 for share in heard.recovery.values())
    for name in ("linear", "unigram", "filter"):
        assert torch.allclose(heard.simple[name], known.noiseless, atol=2e-3)
    best = torch.logsumexp(heard.listed + heard.weight, -1)
    assert torch.allclose(best, known.noiseless, atol=2e-3)
    assert heard.list_evidence[..., 0, :7].abs().max() == 0  # The first hypothesis is the truth: no mismatch.


def test_judging_uses_the_tuning_text_alone_to_fit(world):
    tokens = torch.randint(1, 23, (12, 6), generator=torch.Generator().manual_seed(4))
    client = pruned(world.model, (0, 4))
    parts = [
        (know(world, client, part), hear(world, CELL, part, noise_seed=1, progress=lambda _: None))
        for part in (tokens[:8], tokens[8:])
    ]
    first = judge(parts[0], parts[1])
    other_text = know(world, client, tokens[8:].flip(1))
    second = judge(parts[0], (other_text, parts[1][1]))
    assert first.fits == second.fits
    assert set(first.losses) >= {"noiseless", "client", "linear+skip", "filter+gate", "list+gate"}
    assert len(first.losses["client"]) == 4


def fake_cell(file, *, epsilon, gate, recovery):
    generator = np.random.default_rng(int(epsilon))
    base = generator.normal(5.5, 0.3, (3, 20))
    offsets = {"noiseless": -1.5, "client": 0.0, "linear": 2.0, "linear+skip": 0.0, "unigram": 1.0, "filter": 0.5}
    offsets |= {"filter+skip": -0.2, "filter+gate": -0.2, "list": 0.3, "list+skip": -0.2, "list+gate": gate}
    seeds = [
        {
            "losses": {name: (base[s] + offset).tolist() for name, offset in offsets.items()},
            "recovery": {name: [recovery] * 20 for name in ("filter", "path", "vote", "oracle")},
            "fits": {"list+gate": [1.0, 0.1, 0.05]},
        }
        for s in range(3)
    ]
    parameters = dataclasses.asdict(dataclasses.replace(CELL, epsilon=epsilon, seeds=3))
    with file.open("a") as out:
        out.write(json.dumps({"cell": f"{epsilon}", "parameters": parameters, "seeds": seeds}) + "\n")


def test_the_section_states_what_was_reached_and_what_was_missed(tmp_path):
    file = tmp_path / "cells.jsonl"
    fake_cell(file, epsilon=64.0, gate=-0.45, recovery=0.55)
    fake_cell(file, epsilon=128.0, gate=-1.2, recovery=0.95)
    text = section(file)
    assert "0.02 nat: reached" in text
    assert "with skip: reached" in text
    assert "at most 0.60: reached" in text
    assert "30% [30%, 30%]" in text
    fake_cell(file, epsilon=8.0, gate=0.05, recovery=0.05)
    fake_cell(file, epsilon=64.0, gate=-0.15, recovery=0.55)
    fake_cell(file, epsilon=128.0, gate=-0.6, recovery=0.95)
    assert len(read(file)) == 3  # A repeated cell counts once, its last line.
    text = section(file)
    assert text.count(": missed") == 3
    assert "+0.050 nat" in text


def test_an_interval_covers_the_mean_of_a_known_law():
    values = np.random.default_rng(5).normal(2.0, 1.0, (3, 400))
    mean, low, high = interval(values)
    assert low < 2.0 < high
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(1200), rel=0.1)
    assert mean == pytest.approx(values.mean())
