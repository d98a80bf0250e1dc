"""One PEFT adapter for the whole model, whose logits are the split's."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from securesplit.errors import InputError
from securesplit.model.architectures import ARCHITECTURES
from securesplit.model.export import (
    collect_adapters,
    export_adapter,
    read_part_adapters,
    restore_adapters,
    save_part_adapters,
)
from securesplit.model.lora import adapter_layout, add_adapters, read_adapters, write_adapters
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model

TITLES = {a.model_type: a.title for a in ARCHITECTURES}
IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(2))


def trained(model, plan, *, rank=4):
    """A split whose adapters are far from their start."""
    split = split_model(model, plan)
    for number, part in enumerate((split.front, split.middle, split.back)):
        layout = add_adapters(part, rank, 8.0, seed=5)
        write_adapters(
            part, layout, np.random.default_rng(number).normal(scale=0.2, size=layout.size).astype(np.float32)
        )
    return split


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("family", list(TITLES))
def test_the_exported_adapter_gives_the_splits_logits(tiny, equality, tmp_path, family):
    plan = CutPlan(2, 1)
    split = trained(tiny(family), plan)
    paths = []
    for part in (split.front, split.middle, split.back):
        paths.append(tmp_path / f"adapter-{part.role}.safetensors")
        save_part_adapters(collect_adapters(part, model="ab" * 32), paths[-1])
    done = export_adapter([read_part_adapters(path) for path in paths], tmp_path / "out", "org/base")
    assert (done.adapted, done.untouched) == (tuple(range(6)), ())
    assert {p.name for p in done.directory.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    joined = PeftModel.from_pretrained(tiny(family), done.directory)
    with torch.no_grad():
        mine, theirs = split.back(split.middle(split.front(IDS))), joined(IDS).logits
        assert (mine - tiny(family)(IDS).logits).abs().max() > 1e-3, "the adapters do something"
    equality(TITLES[family], "export", (mine - theirs).abs().max().item())
    assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_absent_parts_stay_as_in_the_base(tiny, tmp_path, family):
    """A client holds A and C only, or C only; the middle is then the plain one."""
    split = trained(tiny(family), CutPlan(2, 1))
    plain = split_model(tiny(family), CutPlan(2, 1))
    done = export_adapter([collect_adapters(split.back), collect_adapters(split.front)], tmp_path / "out", "b")
    assert (done.adapted, done.untouched) == ((0, 1, 5), (2, 3, 4))
    joined = PeftModel.from_pretrained(tiny(family), done.directory)
    with torch.no_grad():
        assert torch.equal(split.back(plain.middle(split.front(IDS))), joined(IDS).logits)
    assert not [n for n, _ in joined.named_parameters() if ".lora_" in n and any(f".{i}." in n for i in (2, 3, 4))]


def test_the_same_adapters_give_the_same_bytes(tiny, tmp_path):
    split = trained(tiny("llama"), CutPlan(2, 1))
    for name in ("one", "two"):
        export_adapter(
            [collect_adapters(part) for part in (split.front, split.middle, split.back)], tmp_path / name, "b"
        )
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["base_model_name_or_path"] == "b"


def test_saved_adapters_come_back(tiny, tmp_path):
    split = trained(tiny("qwen2"), CutPlan(2, 1))
    save_part_adapters(collect_adapters(split.front), tmp_path / "a.safetensors")
    fresh = split_model(tiny("qwen2"), CutPlan(2, 1)).front
    layout = add_adapters(fresh, 4, 8.0, seed=9)
    restore_adapters(fresh, read_part_adapters(tmp_path / "a.safetensors"))
    assert np.array_equal(read_adapters(fresh, layout), read_adapters(split.front, adapter_layout(split.front)))
    with pytest.raises(InputError, match="SS-1412"):
        restore_adapters(split.back, read_part_adapters(tmp_path / "a.safetensors"))


def test_what_does_not_belong_together_is_refused(tiny, tmp_path):
    split = trained(tiny("llama"), CutPlan(2, 1))
    front = collect_adapters(split.front)
    for others in (
        [collect_adapters(trained(tiny("llama"), CutPlan(2, 1), rank=2).back)],
        [collect_adapters(trained(tiny("qwen2"), CutPlan(2, 1)).back)],
        [collect_adapters(split.back, model="cd" * 32)],
        [front],
        [collect_adapters(trained(tiny("llama"), CutPlan(1, 1)).middle)],
    ):
        with pytest.raises(InputError, match="SS-1415"):
            export_adapter([front, *others], tmp_path / "out", "b")
    with pytest.raises(InputError, match="SS-1413"):
        export_adapter([], tmp_path / "out", "b")
    with pytest.raises(InputError, match="SS-1413"):
        collect_adapters(split_model(tiny("llama"), CutPlan(2, 1)).front)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_adapters_are_refused(tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    save_part_adapters(collect_adapters(trained(tiny("llama"), CutPlan(2, 1)).front), path)
    good, facts = load_file(path), collect_adapters(trained(tiny("llama"), CutPlan(2, 1)).front).facts
    name = next(iter(good))
    header = {"securesplit": facts.model_dump_json()}
    bad = tmp_path / "bad.safetensors"
    for tensors, metadata in (
        (good, None),
        (good, {"securesplit": "{}"}),
        (good, {"securesplit": facts.model_dump_json().replace('"rank":4', '"rank":5')}),
        (good, {"securesplit": facts.model_dump_json().replace('"rank":4', '"rank":4,"extra":1')}),
        ({**good, name: good[name].double()}, header),
        ({**good, "lm_head.weight": good[name].clone()}, header),
    ):
        save_file(tensors, bad, metadata=metadata)
        with pytest.raises(InputError, match="SS-1414"):
            read_part_adapters(bad)
    bad.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="SS-1414"):
        read_part_adapters(bad)
    with pytest.raises(InputError, match="SS-1414"):
        read_part_adapters(tmp_path / "absent.safetensors")


def adapted(tiny):
    part = split_model(tiny("llama"), CutPlan(2, 1)).back
    add_adapters(part, 2, 4.0, seed=5)
    return collect_adapters(part, model="ab" * 32)


def test_a_file_is_on_the_disk_when_it_is_said_to_be_saved(tiny, tmp_path, monkeypatch):
    """A finished run's state is thrown away, so its adapters must survive a loss of power by then."""
    path, events = tmp_path / "adapter-back.safetensors", []
    sync, replace = os.fsync, os.replace

    def synced(handle):
        events.append(Path(f"/proc/self/fd/{handle}").readlink())
        sync(handle)

    def replaced(source, target, **options):
        events.append(Path(target))
        replace(source, target, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    save_part_adapters(adapted(tiny), path)
    assert events[1:] == [path, tmp_path]
    assert events[0].parent == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_old_file(tiny, tmp_path):
    path = tmp_path / "adapter-back.safetensors"
    adapters = adapted(tiny)
    save_part_adapters(adapters, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            save_part_adapters(adapters, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
