"""A base in 8 or 4 bits: refused where bitsandbytes is absent, near the unquantised one where it is there."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path

import pytest
import torch

from securesplit.errors import InputError
from securesplit.learning import prepare
from securesplit.model.export import collect_adapters, export_adapter
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model
from securesplit.protocol.job import Job, Precision
from tests.e2e.house import build_model, job_text

IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(2))
present = importlib.util.find_spec("bitsandbytes") is not None


def job_of(**kinds):
    job = Job.model_validate(tomllib.loads(job_text(Path("no-model"))))
    return job.model_copy(update={"precision": Precision(**kinds)})


def split_of(**kinds):
    split = split_model(build_model(), CutPlan(1, 1))
    for part in (split.front, split.middle, split.back):
        prepare(part, job_of(**kinds))
    return split


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_without_the_extra_the_job_is_refused(monkeypatch, kind):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="needs bitsandbytes") as caught:
        split_of(middle=kind)
    assert caught.value.code == "SS-1251"
    assert "securesplit[quant]" in caught.value.hint


@pytest.mark.skipif(not present, reason="needs the extra quant")
@pytest.mark.parametrize(("kind", "bits", "near"), [("int8", 8, 0.01), ("nf4", 4, 0.1)])
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_is_small_and_near(tmp_path, kind, bits, near):
    plain, small = split_of(), split_of(front=kind, middle=kind, back=kind)
    found = []
    for split in (plain, small):
        loss = split.back(split.middle(split.front(IDS)), IDS)
        loss.backward()
        found.append(loss.item())
    assert found[1] == pytest.approx(found[0], rel=near)
    learnt = [p for p in small.middle.parameters() if p.requires_grad]
    assert learnt
    assert all(p.dtype == torch.float32 for p in learnt)
    assert any(p.grad.norm() > 0 for p in learnt)
    weight = small.middle.module.layers[0].self_attn.q_proj.base_layer.weight
    assert weight.element_size() * weight.numel() * 8 == bits * 32 * 32
    assert small.middle.dtype == torch.float32, "norms and rows keep their type"
    done = export_adapter([collect_adapters(p) for p in (small.front, small.middle, small.back)], tmp_path, "b")
    assert done.adapted == (0, 1, 2, 3)


@pytest.mark.skipif(not present, reason="needs the extra quant")
def test_a_family_without_plain_linear_layers_is_refused(tiny):
    with pytest.raises(InputError, match="GPT-2"):
        prepare(split_model(tiny("gpt2"), CutPlan(2, 1)).middle, job_of(middle="int8"))
