"""A core between constant factors: against dense weights in float64, autograd record by record, and PEFT itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from securesplit.errors import InputError
from securesplit.model.core import orthonormal
from securesplit.model.export import (
    collect_adapters,
    export_adapter,
    read_part_adapters,
    restore_adapters,
    save_part_adapters,
)
from securesplit.model.lora import (
    Layout,
    adapter_layout,
    adapter_parameters,
    add_adapters,
    read_adapters,
    set_trainable_factor,
    write_adapters,
)
from securesplit.model.persample import per_sample, record_losses
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model

IDS = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(2))
RANK, ALPHA = 4, 8.0


def parts_of(split):
    return split.front, split.middle, split.back


def moved(model, plan, *, core=True):
    """A split whose cores are far from zero."""
    split = split_model(model, plan)
    for number, part in enumerate(parts_of(split)):
        add_adapters(part, RANK, ALPHA, seed=5, core=core)
        layout = adapter_layout(part, "core" if core else None)
        values = np.random.default_rng(number).normal(scale=0.3, size=layout.size).astype(np.float32)
        write_adapters(part, layout, values)
    return split


def named(part):
    """Each factor by its global name, float64."""
    layout, start, found = adapter_layout(part), 0, {}
    flat = read_adapters(part, layout).astype(np.float64)
    for tensor in layout.tensors:
        size = tensor.shape[0] * tensor.shape[1]
        found[tensor.name] = flat[start : start + size].reshape(tensor.shape)
        start += size
    return found


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_the_outer_factor_is_orthonormal_on_its_shorter_side(rows, columns, seed):
    draw = np.random.default_rng(seed).uniform(-1, 1, size=(rows, columns)).astype(np.float32)
    found = orthonormal(draw).astype(np.float64)
    assert found.shape == (rows, columns)
    gram = found.T @ found if rows >= columns else found @ found.T
    assert np.abs(gram - np.eye(min(rows, columns))).max() < 1e-3
    assert np.array_equal(found * 65536, np.rint(found * 65536)), "on a coarse grid, the same for every library"
    if rows >= columns:  # The draw's own columns, one after the other: the first keeps its direction.
        direction = draw[:, 0].astype(np.float64) / np.linalg.norm(draw[:, 0].astype(np.float64))
        assert np.abs(found[:, 0] - direction).max() < 1e-4


def test_fresh_cores_change_nothing_and_any_cut_starts_alike(tiny):
    whole = tiny("llama")
    layout = add_adapters(whole, RANK, ALPHA, seed=5, core=True)
    values = read_adapters(whole, layout)
    shapes = {tensor.name.rsplit(".", 2)[1]: tensor.shape for tensor in layout.tensors}
    assert shapes == {"lora_A": (RANK, 32), "lora_B": (16, RANK), "lora_core": (RANK, RANK)}, "of the last, v_proj"
    for plan in (CutPlan(2, 2), CutPlan(0, 0), CutPlan(1, 4)):
        split = split_model(tiny("llama"), plan)
        layouts = [add_adapters(part, RANK, ALPHA, seed=5, core=True) for part in parts_of(split)]
        assert Layout(tuple(t for lay in layouts for t in lay.tensors)) == layout
        flats = [read_adapters(p, lay) for p, lay in zip(parts_of(split), layouts, strict=True)]
        assert np.array_equal(np.concatenate(flats), values)
        trained = [n for part in parts_of(split) for n, p in part.named_parameters() if p.requires_grad]
        assert len(trained) == len(layout.tensors) // 3
        assert all("lora_B.default.core" in name for name in trained)
        with torch.no_grad():
            assert torch.equal(split.back(split.middle(split.front(IDS))), tiny("llama")(IDS).logits)
    other = split_model(tiny("llama"), CutPlan(2, 2)).front
    add_adapters(other, RANK, ALPHA, seed=6, core=True)
    assert not np.array_equal(
        read_adapters(other, adapter_layout(other, "B")), values[: adapter_layout(other, "B").size]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_an_adapter_adds_b0_r_a0_to_the_weight(tiny, family):
    """The oracle is the unsplit model with dense weights that were changed in float64."""
    split, dense = moved(tiny(family), CutPlan(2, 1)), tiny(family)
    weights = dict(dense.named_parameters())
    for part in parts_of(split):
        held = named(part)
        for name, core in held.items():
            if name.endswith(".lora_core.weight"):
                stem = name.removesuffix(".lora_core.weight")
                delta = ALPHA / RANK * held[f"{stem}.lora_B.weight"] @ core @ held[f"{stem}.lora_A.weight"]
                weight = weights[f"{stem}.weight"]
                change = delta.T if family == "gpt2" else delta
                weight.data = (weight.data.double() + torch.from_numpy(np.ascontiguousarray(change))).float()
    with torch.no_grad():
        mine, theirs = split.back(split.middle(split.front(IDS))), dense(IDS).logits
    assert (theirs - tiny(family)(IDS).logits).abs().max() > 1e-2, "the cores do something"
    torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)


def test_only_the_core_ever_learns(tiny):
    part = moved(tiny("qwen2"), CutPlan(2, 2)).front
    for factor in ("core", "both"):
        set_trainable_factor(part, factor)
        assert {tuple(p.shape) for p in adapter_parameters(part)} == {(RANK, RANK)}
    set_trainable_factor(part, None)
    assert not list(adapter_parameters(part))
    sizes = [adapter_layout(part, factor).size for factor in ("A", "B", "core")]
    assert sum(sizes) == adapter_layout(part).size
    assert adapter_layout(part, "both").size == sizes[0] + sizes[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_records_gradient_of_the_cores_is_its_own(tiny, family):
    split = moved(tiny(family), CutPlan(2, 2))
    set_trainable_factor(split.middle, None)
    parts = (split.front, split.back)

    def nats(ids):
        return record_losses(split.back(split.middle(split.front(ids))), ids)

    with per_sample(parts) as kept:
        nats(IDS).sum().backward()
        got = kept.gradients()
    parameters = [p for part in parts for p in adapter_parameters(part)]
    for row, ids in zip(got, IDS.split(1), strict=True):
        nats(ids).sum().backward()
        want = torch.cat([p.grad.flatten() for p in parameters])
        for parameter in parameters:
            parameter.grad = None
        assert want.norm() > 0
        assert (row - want).norm() <= 1e-5 * want.norm()


def test_the_mean_of_cores_is_the_core_of_the_mean_model(tiny):
    """In float64 from the factors alone: exactness needs no model."""
    held = named(moved(tiny("llama"), CutPlan(2, 2)).front)
    stem = next(n for n in held if n.endswith(".lora_core.weight")).removesuffix(".lora_core.weight")
    a, b = held[f"{stem}.lora_A.weight"], held[f"{stem}.lora_B.weight"]
    cores = [np.random.default_rng(i).normal(size=(RANK, RANK)) for i in range(5)]
    weights = np.array([1, 255, 3, 40, 7])
    mean = sum(w * (b @ core @ a) for w, core in zip(weights, cores, strict=True)) / weights.sum()
    core = sum(w * core for w, core in zip(weights, cores, strict=True)) / weights.sum()
    assert np.abs(b @ core @ a - mean).max() < 1e-14


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
def test_the_export_is_one_ordinary_peft_adapter(tiny, tmp_path, family):
    """Also where B, the server's part, has ordinary factors, as in every job."""
    split = moved(tiny(family), CutPlan(2, 1))
    plain = moved(tiny(family), CutPlan(2, 1), core=False).middle
    for middle, label in ((split.middle, "cores"), (plain, "mixed")):
        parts = []
        for part in (split.front, middle, split.back):
            path = tmp_path / f"{label}-{part.role}.safetensors"
            save_part_adapters(collect_adapters(part, model="ab" * 32), path)
            parts.append(read_part_adapters(path))
        done = export_adapter(parts, tmp_path / label, "org/base")
        names = load_file(done.directory / "adapter_model.safetensors")
        assert {name.rsplit(".", 2)[1] for name in names} == {"lora_A", "lora_B"}
        joined = PeftModel.from_pretrained(tiny(family), done.directory)
        with torch.no_grad():
            mine, theirs = split.back(middle(split.front(IDS))), joined(IDS).logits
            assert (mine - tiny(family)(IDS).logits).abs().max() > 1e-2
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_saved_cores_come_back_and_fit_no_other_kind(tiny, tmp_path):
    part = moved(tiny("llama"), CutPlan(2, 1)).front
    save_part_adapters(collect_adapters(part), tmp_path / "a.safetensors")
    saved = read_part_adapters(tmp_path / "a.safetensors")
    fresh = split_model(tiny("llama"), CutPlan(2, 1)).front
    add_adapters(fresh, RANK, ALPHA, seed=9, core=True)
    restore_adapters(fresh, saved)
    assert np.array_equal(read_adapters(fresh, adapter_layout(fresh)), read_adapters(part, adapter_layout(part)))
    ordinary = split_model(tiny("llama"), CutPlan(2, 1)).front
    add_adapters(ordinary, RANK, ALPHA, seed=5)
    with pytest.raises(InputError, match="SS-1412"):
        restore_adapters(ordinary, saved)
