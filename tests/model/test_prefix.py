"""Prefixes per layer, each with its party: against PEFT's prefix tuning of the unsplit model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model

from securesplit.errors import InputError
from securesplit.learning import tune
from securesplit.model.descent import Recipe
from securesplit.model.export import collect_adapters, export_adapter, restore_adapters
from securesplit.model.lora import adapter_layout, adapter_parameters, read_adapters, set_trainable_factor
from securesplit.model.plan import CutPlan
from securesplit.model.recompute import recompute_layers
from securesplit.model.split import split_model
from securesplit.protocol.adapters import Adapters
from securesplit.server.learner import Learner, Rows
from tests.model.test_tuning import IDS, exported, parts_of, shake

TABLE = Adapters.model_validate({"rank": 1, "alpha": 1.0, "seed": 5, "method": "prefix", "prefix_length": 3})
FAMILIES = ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "glm4"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
]


def split_of(model, plan=None):
    split = split_model(model, plan or CutPlan(2, 1))
    for part in parts_of(split):
        tune(part, TABLE, part.role)
    return split


def model_of(tiny, family):
    return tiny(family, sliding_window=None) if family == "phi3" else tiny(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_pefts_prefix_tuning(tiny, tmp_path, family):
    split = split_of(model_of(tiny, family))
    shake(split)
    done = exported(split, tmp_path)
    assert done.adapted == tuple(range(6))
    joined = PeftModel.from_pretrained(model_of(tiny, family), done.directory)
    with torch.no_grad():
        mine, theirs = split.back(split.middle(split.front(IDS))), joined(IDS).logits
        plain = model_of(tiny, family)(IDS).logits
    assert (mine - plain).abs().max() > 1e-3, "the prefixes do something"
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("twice", [False, True])
def test_loss_and_gradients_are_pefts(tiny, tmp_path, twice):
    split = split_of(tiny("llama"))
    shake(split)
    whole = get_peft_model(
        tiny("llama"), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", token_dim=16)
    ).eval()
    table = whole.prompt_encoder["default"].embedding.weight
    held = {t.name: p for part in parts_of(split) for t, p in zip(
        adapter_layout(part).tensors, adapter_parameters(part), strict=True)}  # fmt: skip
    names = [f"model.layers.{n}.prefix_{kind}" for n in range(6) for kind in ("key", "value")]
    assert sorted(held) == sorted(names)
    with torch.no_grad():
        table.copy_(torch.cat([held[name].reshape(3, -1) for name in names], 1))
    if twice:
        for part in parts_of(split):
            recompute_layers(part)
    loss = split.back(split.middle(split.front(IDS)), IDS)
    oracle = whole(IDS, labels=IDS).loss
    assert abs((loss - oracle).item()) <= 1e-5
    loss.backward()
    oracle.backward()
    found = torch.cat([held[name].grad.reshape(3, -1) for name in names], 1)
    torch.testing.assert_close(found, table.grad, rtol=1e-4, atol=1e-6)
    assert (found.abs().sum(0) > 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoding_sees_the_prefix_too(tiny, family):
    split = split_of(tiny(family))
    shake(split)
    with torch.no_grad():
        whole = split.back(split.middle(split.front(IDS)))
        caches = [part.new_cache() for part in parts_of(split)]
        pieces = []
        for piece in (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:]):
            hidden = split.front(piece, cache=caches[0])
            pieces.append(split.back(split.middle(hidden, cache=caches[1]), cache=caches[2]))
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
        mask = torch.ones_like(IDS)
        masked = split.back(split.middle(split.front(IDS, mask), mask), attention_mask=mask)
        torch.testing.assert_close(masked, whole, rtol=1e-4, atol=1e-5)


def test_any_cut_starts_alike_and_a_front_without_layers_counts_positions(tiny):
    outs = []
    for plan in (CutPlan(2, 1), CutPlan(0, 0), CutPlan(1, 3)):
        split = split_of(tiny("gpt2"), plan)
        with torch.no_grad():
            outs.append(split.back(split.middle(split.front(IDS))))
    assert all(torch.allclose(out, outs[0], atol=1e-5) for out in outs)


def test_a_learner_moves_its_own_prefixes(tiny):
    middle = split_of(tiny("llama")).middle
    one, two = Learner(middle, Recipe(1e-2), own=True), Learner(middle, Recipe(1e-2), own=True)
    assert len(one.parameters) == 6
    rows = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    one.forward([Rows("a", 0, rows.clone())], lambda leaves: tuple(middle(leaf) for leaf in leaves))
    one.backward([Rows("a", 0, rows)])
    moved = [not torch.equal(a, b) for a, b in zip(one.parameters, two.parameters, strict=True)]
    assert all(moved)


def test_files_come_back_and_half_a_table_is_refused(tiny, tmp_path):
    split, other = split_of(tiny("llama")), split_of(tiny("llama"))
    shake(split)
    for mine, theirs in zip(parts_of(split), parts_of(other), strict=True):
        restore_adapters(theirs, collect_adapters(mine))
        layout = adapter_layout(mine)
        assert np.array_equal(read_adapters(mine, layout), read_adapters(theirs, layout))
    with pytest.raises(InputError, match="for every layer or for none") as caught:
        export_adapter([collect_adapters(split.front), collect_adapters(split.back)], tmp_path, "b")
    assert caught.value.code == "SS-1415"


def test_factors_of_lora_leave_prefixes_alone(tiny):
    part = split_of(tiny("llama")).front
    for factor, learns in (("prefix", True), ("both", True), ("A", False), ("B", False), (None, False)):
        set_trainable_factor(part, factor)
        assert bool(list(adapter_parameters(part))) == learns
    assert adapter_layout(part, "prefix") == adapter_layout(part)
    assert adapter_layout(part, "B").size == 0


@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3"])
def test_layers_with_a_window_are_refused(tiny, family):
    with pytest.raises(InputError, match="lose sight") as caught:
        split_of(tiny(family))
    assert caught.value.code == "SS-1253"
