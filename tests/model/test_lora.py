"""Adapters: the same whatever the cut, the same gradients as on the whole, and a vector that fits or is refused."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError
from securesplit.model.architectures import ARCHITECTURES
from securesplit.model.lora import (
    Layout,
    adapter_layout,
    adapter_parameters,
    add_adapters,
    read_adapters,
    set_trainable_factor,
    write_adapters,
)
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model

FAMILIES = [a.model_type for a in ARCHITECTURES]
TITLES = {a.model_type: a.title for a in ARCHITECTURES}
IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(2))


def parts_of(split):
    return split.front, split.middle, split.back


def adapted(model, plan, **options):
    """A split with adapters, and the joined layout and values of its parts."""
    split = split_model(model, plan)
    layouts = [add_adapters(part, 4, 8.0, seed=5, **options) for part in parts_of(split)]
    joined = Layout(tuple(tensor for layout in layouts for tensor in layout.tensors))
    return (
        split,
        joined,
        np.concatenate([read_adapters(p, lay) for p, lay in zip(parts_of(split), layouts, strict=True)]),
    )


def scatter(split, flat):
    start = 0
    for part in parts_of(split):
        layout = adapter_layout(part)
        write_adapters(part, layout, flat[start : start + layout.size])
        start += layout.size


@pytest.mark.parametrize("family", FAMILIES)
def test_any_cut_starts_from_the_unsplit_models_adapters(tiny, family):
    whole = tiny(family)
    expected = add_adapters(whole, 4, 8.0, seed=5)
    values = read_adapters(whole, expected)
    assert np.count_nonzero(values), "factor A is not zero"
    for plan in (CutPlan(2, 2), CutPlan(0, 0), CutPlan(1, 4)):
        _, layout, flat = adapted(tiny(family), plan)
        assert layout == expected
        assert layout.digest == expected.digest
        assert np.array_equal(flat, values)
    other = tiny(family)
    add_adapters(other, 4, 8.0, seed=6)
    assert not np.array_equal(read_adapters(other, expected), values)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_lora_gradients_equal_the_whole(tiny, equality, family):
    whole = tiny(family)
    layout = add_adapters(whole, 4, 8.0, seed=5)
    flat = np.random.default_rng(0).normal(scale=0.1, size=layout.size).astype(np.float32)
    write_adapters(whole, layout, flat)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    for plan in (CutPlan(2, 2), CutPlan(0, 3), CutPlan(3, 0)):
        split, joined, _ = adapted(tiny(family), plan)
        scatter(split, flat)
        for padding in (None, mask):
            whole.zero_grad()
            expected = whole(IDS, attention_mask=padding, labels=IDS).loss
            expected.backward()
            for part in parts_of(split):
                part.zero_grad()
            loss = split.back(split.middle(split.front(IDS, padding), padding), IDS, padding)
            loss.backward()
            mine = [p.grad for part in parts_of(split) for p in adapter_parameters(part)]
            theirs = [p.grad for p in adapter_parameters(whole)]
            worst = max((a - b).abs().nan_to_num(nan=torch.inf).max().item() for a, b in zip(mine, theirs, strict=True))
            equality(TITLES[family], "LoRA gradients", worst)
            assert len(mine) == len(joined.tensors)
            assert worst == 0.0
            assert (loss - expected).item() == 0.0
            assert all(bool(g.abs().sum() > 0) for g in theirs)


def test_only_adapters_are_trained_and_fresh_ones_change_nothing(tiny):
    model = tiny("llama")
    plain = copy.deepcopy(model)
    split, joined, _ = adapted(model, CutPlan(2, 2))
    trained = [n for part in parts_of(split) for n, p in part.named_parameters() if p.requires_grad]
    assert len(trained) == len(joined.tensors)
    assert all(".lora_" in name for name in trained)
    with torch.no_grad():
        assert torch.equal(split.back(split.middle(split.front(IDS))), plain(IDS).logits)


def test_adapters_stay_float32_on_a_half_precision_part(tiny):
    split, _, _ = adapted(tiny("llama").to(torch.bfloat16), CutPlan(2, 2))
    for part in parts_of(split):
        assert {p.dtype for p in adapter_parameters(part)} == {torch.float32}
        assert part.dtype == torch.bfloat16
    split.back(split.middle(split.front(IDS)), IDS).backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter_parameters(split.front))


def test_factor_a_follows_pefts_own_distribution(tiny):
    """The oracle is PEFT's initialisation: uniform, with the same bound."""
    model = tiny("llama")
    layout = add_adapters(model, 64, 8.0, seed=1)
    reference = peft.inject_adapter_in_model(peft.LoraConfig(r=64, target_modules=["q_proj"]), tiny("llama"))
    theirs = torch.cat([p.flatten() for n, p in reference.named_parameters() if ".lora_A." in n])
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    mine = dict(zip([t.name for t in layout.tensors], [p.detach() for p in adapter_parameters(model)], strict=True))[
        name
    ]
    assert theirs.abs().max() <= 1 / 32**0.5
    assert mine.abs().max() <= 1 / 32**0.5
    assert abs(mine.std() - theirs.std()) < 0.01
    assert abs(mine.mean()) < 0.02


def test_one_factor_at_a_time(tiny):
    split, _, _ = adapted(tiny("qwen3"), CutPlan(2, 2))
    part = split.front
    both, a, b = (adapter_layout(part, factor) for factor in (None, "A", "B"))
    assert a.size + b.size == both.size
    assert {t.name for t in a.tensors} | {t.name for t in b.tensors} == {t.name for t in both.tensors}
    set_trainable_factor(part, "B")
    frozen = read_adapters(part, a)
    optimiser = torch.optim.AdamW(adapter_parameters(part), lr=0.1)
    split.back(split.middle(split.front(IDS)), IDS).backward()
    optimiser.step()
    assert np.array_equal(read_adapters(part, a), frozen)
    assert np.count_nonzero(read_adapters(part, b))
    set_trainable_factor(part, None)
    assert not list(adapter_parameters(part))
    set_trainable_factor(part, "both")
    assert len(list(adapter_parameters(part))) == len(both.tensors)


def test_the_mean_of_one_factors_updates_is_the_mean_models_update(tiny):
    """Why only one factor is trained per round: with A fixed, B's mean gives the mean of the products."""
    split, _, _ = adapted(tiny("llama"), CutPlan(2, 2))
    layout = adapter_layout(split.front, "B")
    draws = [np.random.default_rng(i).normal(size=layout.size).astype(np.float32) for i in range(3)]
    linear = split.front.module.layers[0].self_attn.q_proj

    def product(flat):
        write_adapters(split.front, layout, flat)
        return linear.get_delta_weight("default").detach().clone()

    mean_of_products = sum(product(d) for d in draws) / 3
    torch.testing.assert_close(product(np.mean(draws, axis=0, dtype=np.float32)), mean_of_products)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), factor=st.sampled_from(["A", "B", None]))
def test_what_is_written_is_read(tiny, seed, factor):
    part = split_model(tiny("gpt2"), CutPlan(1, 1)).middle
    add_adapters(part, 2, 4.0, seed=0)
    layout = adapter_layout(part, factor)
    flat = np.random.default_rng(seed).normal(size=layout.size).astype(np.float32)
    write_adapters(part, layout, flat)
    assert np.array_equal(read_adapters(part, layout), flat)


def test_a_vector_that_does_not_fit_changes_nothing(tiny):
    split, _, _ = adapted(tiny("llama"), CutPlan(2, 2))
    layout = adapter_layout(split.front)
    before = read_adapters(split.front, layout)
    poisoned, endless = before.copy(), before.copy()
    poisoned[-1], endless[0] = np.nan, np.inf
    for bad in (before[:-1], before.astype(np.float64), before.reshape(1, -1), poisoned, endless):
        with pytest.raises(InputError, match="SS-1412"):
            write_adapters(split.front, layout, bad)
    for other in (split.middle, split.back):
        with pytest.raises(InputError, match="SS-1412"):
            write_adapters(other, layout, before)
        with pytest.raises(InputError, match="SS-1412"):
            read_adapters(other, layout)
    assert np.array_equal(read_adapters(split.front, layout), before)


def test_targets(tiny):
    _, layout, _ = adapted(tiny("llama"), CutPlan(1, 1), targets=("q_proj", "down_proj"))
    assert {t.name.split(".")[-3] for t in layout.tensors} == {"q_proj", "down_proj"}
    for wrong in ("embed_tokens", "lm_head", "nothing", "proj"):
        with pytest.raises(InputError, match="SS-1410") as caught:
            adapted(tiny("llama"), CutPlan(1, 1), targets=("q_proj", wrong))
        assert "self_attn.q_proj" in caught.value.hint
    split, _, _ = adapted(tiny("llama"), CutPlan(0, 1))
    assert adapter_layout(split.front) == Layout(())
    assert read_adapters(split.front, Layout(())).shape == (0,)
    assert not any(p.requires_grad for p in split.front.parameters())
    with pytest.raises(InputError, match="SS-1411"):
        add_adapters(split.back, 4, 8.0, seed=5)


def test_layout_digest_depends_on_names_and_shapes(tiny):
    digests = {
        adapted(tiny("llama"), CutPlan(1, 1), **options)[1].digest
        for options in ({}, {"targets": ("q_proj",)}, {"targets": ("v_proj",)})
    }
    assert len(digests) == 3
