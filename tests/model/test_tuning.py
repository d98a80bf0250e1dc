"""Adapters that differ from part to part, against one plain PEFT adapter on the unsplit model.

The oracle is PEFT's own configuration, gradient by gradient, and torch's own optimiser; initial values are copied over.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from securesplit.learning import tune
from securesplit.model.dropout import KeyedDropout, dropping, step_key
from securesplit.model.export import collect_adapters, export_adapter, read_part_adapters, save_part_adapters
from securesplit.model.lora import adapter_layout, adapter_parameters, read_adapters, write_adapters
from securesplit.model.persample import per_sample, record_losses
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model
from securesplit.protocol.adapters import Adapters

IDS = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(2))
BASE = {"rank": 4, "alpha": 8.0, "seed": 5, "targets": ["q_proj", "v_proj"]}
GPT = {**BASE, "targets": ["attn.c_attn"]}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def split_of(model, table):
    adapters = Adapters.model_validate(table)
    split = split_model(model, CutPlan(2, 1))
    for part in (split.front, split.middle, split.back):
        tune(part, adapters, part.role)
    return split


def parts_of(split):
    return (split.front, split.middle, split.back)


def shake(split, seed=0):
    """Adapters far from their start."""
    for number, part in enumerate(parts_of(split)):
        layout = adapter_layout(part)
        values = np.random.default_rng(seed + number).normal(scale=0.2, size=layout.size)
        write_adapters(part, layout, (read_adapters(part, layout) + values).astype(np.float32))


def exported(split, tmp_path, *, dora=False):
    paths = []
    for part in parts_of(split):
        paths.append(tmp_path / f"adapter-{part.role}.safetensors")
        save_part_adapters(collect_adapters(part, model="ab" * 32, table="cd" * 32, lengths=dora), paths[-1])
    return export_adapter([read_part_adapters(path) for path in paths], tmp_path / "out", "org/base")


CASES = {
    "rslora": {**BASE, "rslora": True},
    "ranks": {**BASE, "front": {"rank": 2, "alpha": 3.0}, "middle": {"rank": 6}},
    "one is rslora": {**BASE, "middle": {"rslora": True, "rank": 3}},
    "targets": {**BASE, "back": {"targets": ["gate_proj"]}, "middle": {"alpha": 5.0}},
    "dora": {**BASE, "middle": {"dora": True, "rank": 3}},
    "dora everywhere": {**BASE, "dora": True, "back": {"rank": 3}},
}


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_exported_is_one_plain_adapter(tiny, tmp_path, case):
    split = split_of(tiny("llama"), CASES[case])
    shake(split)
    done = exported(split, tmp_path, dora=case.startswith("dora"))
    joined = PeftModel.from_pretrained(tiny("llama"), done.directory)
    with torch.no_grad():
        mine, theirs = split.back(split.middle(split.front(IDS))), joined(IDS).logits
        before = {n: p.clone() for n, p in tiny("llama").named_parameters()}
        moved = (mine - tiny("llama")(IDS).logits).abs().max()
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        merged = joined.merge_and_unload()
        changed = {n for n, p in merged.named_parameters() if not torch.equal(p, before[n])}
        torch.testing.assert_close(merged(IDS).logits, mine, rtol=1e-4, atol=1e-4)
    assert moved > 1e-2, "the adapters do something"
    wanted = {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in range(6) for x in "qv"}
    if case == "targets":
        wanted = {n for n in wanted if ".5." not in n} | {"model.layers.5.mlp.gate_proj.weight"}
    assert changed == wanted, "the weights that were adapted changed, and no others"


def test_dora_of_a_transposed_family(tiny, tmp_path):
    split = split_of(tiny("gpt2"), {**GPT, "middle": {"dora": True}})
    shake(split)
    joined = PeftModel.from_pretrained(tiny("gpt2"), exported(split, tmp_path, dora=True).directory)
    with torch.no_grad():
        torch.testing.assert_close(split.back(split.middle(split.front(IDS))), joined(IDS).logits, rtol=1e-4, atol=1e-4)


PLAIN = {
    "rslora": {"use_rslora": True},
    "dora everywhere": {"use_dora": True},
    "ranks": {"rank_pattern": {r"model\.layers\.(0|1)\..*": 2}, "alpha_pattern": {r"model\.layers\.(0|1)\..*": 3.0}},
}


@pytest.mark.parametrize("case", list(PLAIN))
def test_training_is_that_of_the_unsplit_model(tiny, case):
    """Loss and gradients of three steps of AdamW equal PEFT's on the whole model, from the same initial values."""
    table = {"rslora": {"rslora": True}, "ranks": {"front": {"rank": 2, "alpha": 3.0}}}.get(case, {})
    adapters = Adapters.model_validate({**BASE, **table})
    split = split_model(tiny("llama"), CutPlan(2, 1))
    for part in parts_of(split):
        own = adapters.model_copy(update={"dora": True}) if case == "dora everywhere" else adapters
        tune(part, own, part.role)
    whole = get_peft_model(
        tiny("llama"), LoraConfig(r=4, lora_alpha=8.0, target_modules=["q_proj", "v_proj"], **PLAIN[case])
    ).eval()
    ours = {
        tensor.name: parameter
        for part in parts_of(split)
        for tensor, parameter in zip(adapter_layout(part).tensors, adapter_parameters(part), strict=True)
    }
    theirs = {
        n.removeprefix("base_model.model.").replace(".default", "").replace("vector.weight", "vector"): p
        for n, p in whole.named_parameters()
        if p.requires_grad
    }
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            theirs[name].copy_(parameter)
    one = torch.optim.AdamW(ours.values(), lr=1e-2, weight_decay=0.0)
    two = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        loss = split.back(split.middle(split.front(IDS)), IDS)
        oracle = whole(IDS, labels=IDS).loss
        assert abs((loss - oracle).item()) <= 1e-6
        loss.backward()
        oracle.backward()
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-5, atol=1e-7, msg=name)
        for optimiser in (one, two):
            optimiser.step()
            optimiser.zero_grad()


def test_dropout_is_a_function_of_the_step(tiny):
    split = split_of(tiny("llama"), {**BASE, "dropout": 0.5, "front": {"dropout": 0.0}, "middle": {"dora": True}})
    shake(split)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))

    def out(key):
        state = torch.random.get_rng_state()
        with dropping([split.middle], key):
            found = split.middle(hidden).detach()
        assert torch.equal(state, torch.random.get_rng_state()), "the process's generator is left alone"
        return found

    plain = split.middle(hidden).detach()
    one, two = out(step_key(7, "alice", 1)), out(step_key(7, "alice", 2))
    torch.rand(5)
    assert torch.equal(one, out(step_key(7, "alice", 1)))
    assert torch.equal(plain, split.middle(hidden)), "outside of a step nothing is dropped"
    keys = [step_key(*a) for a in ((7, "alice", 1), (7, "alice", 2), (7, "bob", 1), (8, "alice", 1))]
    assert len({out(key).numpy().tobytes() for key in keys}) == 4
    assert not torch.equal(one, two)
    assert not torch.equal(one, plain)
    assert not [m for m in split.front.modules() if isinstance(m, KeyedDropout)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_before_its_first_step_a_part_measures_as_after_it(tiny, dtype):
    """A process that was started again measures before it has learnt; it must get the same bits."""
    from securesplit.model.precision import cast_base

    split = split_model(tiny("llama"), CutPlan(2, 1))
    cast_base(split.middle.module, dtype)
    tune(split.middle, Adapters.model_validate({**BASE, "dropout": 0.5, "dora": True}), "middle")
    layout = adapter_layout(split.middle)
    values = np.random.default_rng(0).normal(scale=0.2, size=layout.size)
    write_adapters(split.middle, layout, (read_adapters(split.middle, layout) + values).astype(np.float32))
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fresh = split.middle(hidden)
        with dropping([split.middle], step_key(7, "alice", 1)):
            split.middle(hidden)
        assert torch.equal(split.middle(hidden), fresh)


def test_as_many_numbers_are_dropped_as_said():
    dropout = KeyedDropout(0.3, "a")
    x = torch.ones(200, 500)
    assert dropout(x) is x
    dropout.key = step_key(1, "a", 1)
    found = dropout(x)
    assert set(found.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.7)}
    assert abs(float((found == 0).float().mean()) - 0.3) < 4 * (0.21 / x.numel()) ** 0.5
    other = KeyedDropout(0.3, "b")
    other.key = dropout.key
    assert not torch.equal(other(x), found), "layers drop apart"


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ({"method": "prefix"}, "needs prefix_length"),
        ({"prefix_length": 4}, "belongs to method"),
        ({"method": "prefix", "prefix_length": 4, "sharing": "core", "targets": []}, "prefixes are summed whole"),
        ({"method": "prefix", "prefix_length": 4, "dropout": 0.1, "targets": []}, "dropout belong"),
        ({"dropout": 0.95}, "less than or equal to 0.9"),
        ({"front": {"seed": 3}}, "Extra inputs"),
    ],
)
def test_what_does_not_go_together_is_refused(said, fault):
    with pytest.raises(ValueError, match=fault):
        Adapters.model_validate({**BASE, **said})


def test_a_parts_own_values_stand_in_for_the_others():
    table = Adapters.model_validate({**BASE, "dropout": 0.1, "middle": {"rank": 9, "dropout": 0.0}})
    assert (table.of("middle").rank, table.of("middle").dropout, table.of("middle").alpha) == (9, 0.0, 8.0)
    assert table.of("front") == table.model_copy(update={"middle": None})


def test_each_records_gradient_is_its_own_under_dropout(tiny):
    """What regimes `round` and `step` clip: rows add up to the batch's gradient and do not know the other rows' text."""
    split = split_of(tiny("llama"), {**BASE, "dropout": 0.3, "rslora": True, "front": {"rank": 2}})
    shake(split)
    parts = (split.front, split.back)
    split.middle.requires_grad_(requires_grad=False)
    other = IDS.clone()
    other[1] = other[1].flip(0)

    def rows(ids):
        with dropping(parts, step_key(7, "alice", 3)), per_sample(parts) as kept:
            losses = record_losses(split.back(split.middle(split.front(ids))), ids)
            losses.sum().backward()
            return kept.gradients()

    with dropping(parts, step_key(7, "alice", 3)):
        record_losses(split.back(split.middle(split.front(IDS))), IDS).sum().backward()
    whole = torch.cat([p.grad.reshape(-1) for part in parts for p in adapter_parameters(part)])
    one, two = rows(IDS), rows(other)
    torch.testing.assert_close(one.sum(0), whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(one[[0, 2]], two[[0, 2]])
    assert not torch.equal(one[1], two[1])
