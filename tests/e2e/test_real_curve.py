"""Real text, the pretrained model, no noise: split training and unsplit training are one and the same.

The oracle is the library's whole model with PEFT's own LoRA layers, started from the values that the parts start from, and
torch's AdamW. It meets the batches that the client made. After training both answer the same questions, and are judged by the
same official measures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from securesplit.aggregate.answered import AnswerLog
from securesplit.client.client import Client
from securesplit.client.generate import Sampling
from securesplit.client.tasked import tasked_batches
from securesplit.client.train import Trainer
from securesplit.data.answers import prompt_tokens
from securesplit.data.tasks.chosen import Chosen, read_tasked
from securesplit.data.tasks.fit import fitted
from securesplit.data.tasks.registry import task_named
from securesplit.data.tasks.score import Prediction, score
from securesplit.data.tasks.templates import template_named
from securesplit.model.export import collect_adapters, export_adapter
from securesplit.model.manifest import read_manifest
from securesplit.model.store import load_back, load_front, load_middle, load_tokenizer, load_whole
from securesplit.protocol.job import Job
from securesplit.server.build import build_core
from securesplit.transport.memory import MemoryServer
from tests.e2e.house import policy_of

MODEL = Path.home() / ".cache" / "securesplit" / "models" / "smollm2-135m"
DATA = next(
    (p / "shared" / "data" / "multirc" for p in Path(__file__).resolve().parents if (p / "shared" / "data").is_dir()),
    None,
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_dir(), reason="SmolLM2-135M is not in the model cache"),
    pytest.mark.skipif(DATA is None, reason="MultiRC is not beside the project"),
]
STEPS, QUESTIONS = 8, 12


def job_of(model: Path) -> Job:
    return Job.model_validate({
        "name": "curve", "model": str(model), "cut": {"front": 2, "back": 2},
        "adapters": {"rank": 8, "alpha": 16.0, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "seed": 7},
        "optimiser": {"client_lr": 1e-3, "server_lr": 1e-3}, "schedule": {"rounds": 1, "epochs": 1, "batch": 2},
        "sums": {"roster": ["alice"]}, "training": {"mode": "splitfed-v3", "every": 1},
    })  # fmt: skip


def directory() -> Path:
    from securesplit.model.plan import CutPlan
    from securesplit.model.resolve import resolve_model

    return resolve_model("smollm2-135m", MODEL.parent, CutPlan(2, 2))


def whole_like(folder: Path, parts) -> torch.nn.Module:
    """The library's model with PEFT's adapters, which get the parts' values through the exported file."""
    return peft.PeftModel.from_pretrained(load_whole(folder), parts, is_trainable=True).eval()


def test_one_client_and_the_unsplit_model_learn_alike_and_answer_alike(house, tmp_path):
    folder = directory()
    digest = read_manifest(folder).digest
    job, policy = job_of(folder), policy_of(buckets=[512], max_message_bytes=1 << 23, max_sequences=4)
    core = build_core(job, policy, load_middle(folder), digest)
    link, _ = house.link(MemoryServer(core), policy)
    client = Client(
        load_front(folder),
        load_back(folder),
        load_tokenizer(folder),
        model=digest,
        policy=policy,
        link=link,
        ledger=None,
    )
    tasked = read_tasked(Chosen(task="multirc"), DATA / "train.jsonl", 2 * STEPS + 2)
    batches, held = tasked_batches(
        tasked, policy, job, client.tokenizer, lambda content: content.hex(), model=digest, held_out=2, max_tokens=None
    )
    assert len(batches) == STEPS
    parts = (client.front, core._engine.middle, client.back)

    def exported(name: str) -> Path:
        out = tmp_path / name
        export_adapter([collect_adapters(part, model=digest) for part in parts], out, str(folder))
        return out

    start = exported("start")
    whole = whole_like(folder, start)
    losses: list[float] = []
    log = AnswerLog(tmp_path / "log")
    Trainer(client, batches, held, answers=log, progress=lambda _w, _d, _t, loss: losses.append(loss)).run()
    log.close()

    grouped: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in whole.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            layer = int(name.split(".layers.")[1].split(".")[0])
            grouped[2 <= layer < whole.config.num_hidden_layers - 2].append(parameter)
    optimisers = [torch.optim.AdamW(group, lr=1e-3, weight_decay=0.0) for group in grouped.values()]
    wanted = []
    for batch in batches:
        loss = whole(input_ids=batch.tokens, labels=batch.labels).loss
        loss.backward()
        wanted.append(float(loss.detach()))
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    print(
        f"largest difference of {STEPS} losses: {np.abs(np.array(losses) - wanted).max():.2e}; from {wanted[0]:.4f} to {wanted[-1]:.4f}"
    )
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-5)
    assert abs(wanted[0] - wanted[-1]) > 0.05, "it learns"

    # The export, by plain PEFT on the whole model, is the split model; and it is not the base.
    again = whole_like(folder, exported("after"))
    ids = batches[0].tokens[:1, :64]
    with torch.no_grad():
        ours = client.back(core._engine.middle(client.front(ids)))
        torch.testing.assert_close(again(input_ids=ids).logits, ours, rtol=1e-4, atol=2e-4)
        with again.disable_adapter():
            assert (again(input_ids=ids).logits - ours).abs().max() > 0.1

    task, template = task_named("multirc"), template_named("plain", task_named("multirc"))
    items = read_tasked(Chosen(task="multirc"), DATA / "val.jsonl", QUESTIONS).items
    asked = fitted(
        task, template, items, most=500, prompt_length=lambda text: len(prompt_tokens(text, client.tokenizer))
    )
    ours, theirs = [], []
    for example in asked:
        made = client.generate(example.prompt, max_new_tokens=3, sampling=Sampling())
        ours.append(Prediction(id=example.id, prediction=made.text.strip()))
        ids = torch.tensor([prompt_tokens(example.prompt, client.tokenizer)])
        out = whole.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        said = client.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        theirs.append(Prediction(id=example.id, prediction=said.strip()))
    assert [p.prediction for p in ours] == [p.prediction for p in theirs]
    scores = [score(task, items, said) for said in (ours, theirs)]
    assert scores[0] == scores[1]
    print({m.name: round(m.estimate.value, 4) for m in scores[0].measures})
