"""An embedding that drifts: against PEFT's own on the unsplit model, and never in a message or a sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from securesplit.errors import InputError
from securesplit.learning import tune
from securesplit.model.embedding import drift_parameters, read_drift, write_drift
from securesplit.model.export import collect_adapters, read_part_adapters, restore_adapters, save_part_adapters
from securesplit.model.lora import adapter_layout, set_trainable_factor
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model
from securesplit.protocol.adapters import Adapters
from tests.model.test_tuning import BASE, GPT, IDS, exported, parts_of, shake, split_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def drifted(split, seed=1):
    values = np.random.default_rng(seed).normal(scale=0.2, size=read_drift(split.front).size).astype(np.float32)
    write_drift(split.front, values)
    return values


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_export_holds_the_drift(tiny, tmp_path, family):
    table = GPT if family == "gpt2" else BASE
    split = split_of(tiny(family), {**table, "embedding": True})
    shake(split)
    assert read_drift(split.middle).size == read_drift(split.back).size == 0
    with torch.no_grad():
        before = split.front(IDS)
        drifted(split)
        assert not torch.equal(split.front(IDS), before)
        joined = PeftModel.from_pretrained(tiny(family), exported(split, tmp_path).directory)
        mine = split.back(split.middle(split.front(IDS)))
        torch.testing.assert_close(mine, joined(IDS).logits, rtol=1e-4, atol=1e-4)


def test_its_gradients_are_pefts(tiny):
    split = split_of(tiny("llama"), {**BASE, "embedding": True})
    drifted(split)
    set_trainable_factor(split.front, "both")
    whole = get_peft_model(
        tiny("llama"), LoraConfig(r=4, lora_alpha=8.0, target_modules=["q_proj", "v_proj", "embed_tokens"])
    ).eval()
    ours = dict(drift_parameters(split.front))
    theirs = {
        n.removeprefix("base_model.model.").replace(".default", ""): p
        for n, p in whole.named_parameters()
        if "lora_embedding" in n
    }
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if ".lora_A" in name or ".lora_B" in name:
                parameter.zero_()  # Ours start at zero too: B does.
        for name, parameter in ours.items():
            theirs[name].copy_(parameter)
    split.back(split.middle(split.front(IDS)), IDS).backward()
    whole(IDS, labels=IDS).loss.backward()
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-5, atol=1e-7)
        assert parameter.grad.norm() > 0
    set_trainable_factor(split.front, None)
    assert not any(p.requires_grad or p.grad is not None for p in ours.values())


def test_it_is_in_no_layout_and_comes_back_from_its_file(tiny, tmp_path):
    plain, split = split_of(tiny("llama"), BASE), split_of(tiny("llama"), {**BASE, "embedding": True})
    assert adapter_layout(split.front) == adapter_layout(plain.front)
    values = drifted(split)
    path = tmp_path / "a.safetensors"
    save_part_adapters(collect_adapters(split.front), path)
    other = split_of(tiny("llama"), {**BASE, "embedding": True}).front
    assert read_drift(other)[: 4 * 97].any() == np.False_, "it starts where the published table is"
    restore_adapters(other, read_part_adapters(path))
    assert np.array_equal(read_drift(other), values)
    for wrong in (plain.front, split.back):
        with pytest.raises(InputError, match="SS-1412"):
            restore_adapters(wrong, read_part_adapters(path))
    for bad in (values[1:], np.full_like(values, np.nan)):
        with pytest.raises(InputError, match="SS-1412"):
            write_drift(other, bad)
    assert np.array_equal(read_drift(other), values)


def test_a_front_without_layers_drifts_too(tiny, tmp_path):
    split = split_model(tiny("llama"), CutPlan(0, 1))
    adapters = Adapters.model_validate({**BASE, "embedding": True})
    for part in parts_of(split):
        tune(part, adapters, part.role)
    drifted(split)
    joined = PeftModel.from_pretrained(tiny("llama"), exported(split, tmp_path).directory)
    with torch.no_grad():
        mine = split.back(split.middle(split.front(IDS)))
        torch.testing.assert_close(mine, joined(IDS).logits, rtol=1e-4, atol=1e-4)
