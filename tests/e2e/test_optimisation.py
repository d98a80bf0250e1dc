"""Whole runs with three clients over TLS, under jobs that ask for other adapters, optimisers and precisions.

The oracles: plain means of what each client held before its sum, and PEFT's own model with the exported adapter.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel

from securesplit.client.run import open_client
from securesplit.learning import table_of
from securesplit.model.export import export_adapter, read_part_adapters
from securesplit.model.lora import adapter_layout, read_adapters
from securesplit.model.saved import collect_adapters
from securesplit.protocol.job import Job
from tests.e2e.house import CLIENTS, FROZEN, LAB, ROUND, build_model, policy_of
from tests.e2e.test_modes import train_all

STEP = ROUND.replace('"round"', '"step"').replace("releases = 3", "releases = 9").replace("= 2\n", "= 8\n")
PREFIX = {"adapters": {"method": "prefix", "prefix_length": 3, "targets": []}}
MIXED = {
    "adapters": {
        "dropout": 0.1,
        "front": {"rank": 3},
        "middle": {"dora": True, "alpha": 2.0},
        "back": {"rslora": True},
    },
    "optimiser": {"schedule": "linear", "client_steps": 9, "server_steps": 30, "warmup": 1, "max_grad_norm": 1.0},
}
FREE = {
    **MIXED,
    "adapters": {**MIXED["adapters"], "embedding": True},
    "memory": {"checkpointing": ["front", "middle", "back"]},
}
FREE["optimiser"] = {**MIXED["optimiser"], "accumulate": 2, "weight_decay": 0.01}
HALF = {"precision": {"front": "f16", "middle": "bf16", "back": "f16"}}


def job_of(house, tables, **options) -> Job:
    raw = house.job(**options).model_dump(mode="json", exclude_none=True)
    for table, said in tables.items():
        raw[table] = {**raw.get(table, {}), **said}
    return Job.model_validate(raw)


def test_a_frozen_run_with_prefixes_sums_c_s_alone(house, monkeypatch):
    seen = train_all(house, job_of(house, PREFIX), FROZEN, monkeypatch)
    assert seen.errors == {}
    files = {c: read_part_adapters(house.root / c / "adapter-back.safetensors") for c in CLIENTS}
    fronts = {c: read_part_adapters(house.root / c / "adapter-front.safetensors") for c in CLIENTS}
    for held in (files, fronts):
        for one, two in zip(held["alice"].tensors, held["carol"].tensors, strict=True):
            assert torch.equal(one.value, two.value), "all hold the same afterwards"
    assert all(record.loss != record.initial_loss for record in seen.records.values())


@pytest.mark.parametrize(
    ("tables", "privacy"),
    [(MIXED, FROZEN), (MIXED, STEP), (FREE, LAB), (HALF, LAB), (PREFIX, LAB)],
    ids=["mixed frozen", "mixed step", "free open", "half open", "prefix open"],
)
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
def test_a_whole_run_exports_as_one_plain_adapter(house, monkeypatch, tmp_path, tables, privacy):
    job = job_of(house, tables, rounds=1)
    ids = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(0))
    found = {}

    def after(core, url):
        middle = core._engine.middle
        folder = house.root / "bob"
        with open_client(
            policy_of(privacy), house.keys / "bob", url, model=str(house.model), cache=house.root / "cache", adapters=folder
        ) as client, torch.no_grad():  # fmt: skip
            found["split"] = client.back(middle(client.front(ids))).float()
            if privacy == LAB:
                found["text"] = client.generate("w5 w6 w7 w8", max_new_tokens=5).tokens
            found["prompt"] = torch.tensor([client.tokenizer.encode("w5 w6 w7 w8")])
        server = collect_adapters(middle, model=house.digest, table=table_of(job))
        files = [read_part_adapters(folder / f"adapter-{part}.safetensors") for part in ("front", "back")]
        found["peft"] = PeftModel.from_pretrained(
            build_model(), export_adapter([files[0], server, files[1]], tmp_path / "peft", "tiny").directory
        )

    seen = train_all(house, job, privacy, monkeypatch, after)
    assert seen.errors == {}
    with torch.no_grad():
        theirs, base = found["peft"](ids).logits, build_model()(ids).logits
    assert (found["split"] - base).abs().max() > 1e-3
    near = 0.3 if tables is HALF else 2e-4
    torch.testing.assert_close(found["split"], theirs, rtol=near, atol=near)
    if "text" in found and tables is not HALF:
        prompt = found["prompt"]
        with torch.no_grad():
            for _ in range(5):
                prompt = torch.cat([prompt, found["peft"](prompt).logits[:, -1:].argmax(-1)], 1)
        wanted = tuple(prompt[0, 4:].tolist())
        assert found["text"] == wanted[: wanted.index(1) if 1 in wanted else 5]
    for number in range(len(seen.records["alice"].survivors)):
        held = [seen.after[c, number] for c in CLIENTS]
        for layer in held[0]:
            for one, two in zip(held[0][layer], held[2][layer], strict=True):
                assert one is None or np.array_equal(one, two)


def test_half_a_model_takes_half_the_room(house):
    plain, half = (house.joined(job_of(house, t), policy_of())[0] for t in ({}, {"precision": {"front": "bf16"}}))
    sizes = [
        sum(p.numel() * p.element_size() for n, p in c.front.named_parameters() if ".lora_" not in n)
        for c in (plain, half)
    ]
    assert sizes[1] * 2 == sizes[0]
    assert np.array_equal(*(read_adapters(c.front, adapter_layout(c.front)) for c in (plain, half)))
