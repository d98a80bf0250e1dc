"""What a server leaves of B: with a client's files one plain PEFT adapter, of the moment that the client's files are of."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from securesplit.client.checkpoints import save_adapters
from securesplit.client.train import Trainer
from securesplit.errors import InputError
from securesplit.model.export import export_adapter, read_part_adapters
from securesplit.protocol.job import Job
from securesplit.server.leaving import leave_middle
from tests.e2e.house import batches_of, build_model, policy_of, sentences

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def job_of(house, *, adapters=None, **schedule) -> Job:
    raw = house.job(rounds=2, epochs=2).model_dump(mode="json", exclude_none=True)
    raw |= {"training": {"mode": "splitfed-v3", "every": 3}, "sums": {"roster": ["alice"]}}
    raw["adapters"] |= adapters or {}
    raw["optimiser"] |= {"client_lr": 0.3, "server_lr": 0.3}  # So that it gets worse again.
    raw["schedule"] |= schedule
    return Job.model_validate(raw)


def trained(house, job):
    client, _, core = house.joined(job, policy_of())
    batches, held = batches_of(client, sentences(7, seed=5), size=2), batches_of(client, sentences(3, seed=6))
    return client, core, held, Trainer(client, batches, held, answers=None, progress=lambda *_: None).run()


def plain_loss(files, out, held):
    model = PeftModel.from_pretrained(build_model(), export_adapter(files, out, "tiny").directory)
    with torch.no_grad():
        counts = [batch.scored for batch in held]
        losses = [float(model(input_ids=b.tokens, labels=b.labels).loss) for b in held]
    return sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)


@pytest.mark.parametrize("checkpoints", [None, 2])
def test_the_best_is_exported_with_the_b_that_made_it_the_best(house, tmp_path, checkpoints):
    kept = {} if checkpoints is None else {"checkpoints": checkpoints}
    client, core, held, seen = trained(house, job_of(house, keep_best=True, evaluate_every=1, **kept))
    assert seen.best.loss < seen.curve[-1], "the last one is not the best here"
    assert len(seen.best.middle) == 64
    leave_middle(core, house.digest, tmp_path / "gpu")
    client.install(seen.best.values)
    (tmp_path / "best").mkdir()
    save_adapters(tmp_path / "best", client, seen.best.middle)
    ends = [read_part_adapters(tmp_path / "best" / f"adapter-{part}.safetensors") for part in ("front", "back")]
    last = read_part_adapters(tmp_path / "gpu" / "adapter-middle.safetensors")
    with pytest.raises(InputError) as caught:
        export_adapter([*ends, last], tmp_path / "mixed", "tiny")
    assert caught.value.code == "SS-1415"
    own = read_part_adapters(tmp_path / "gpu" / "former" / seen.best.middle / "adapter-middle.safetensors")
    assert plain_loss([*ends, own], tmp_path / "out", held) == pytest.approx(seen.best.loss, abs=2e-5)


@pytest.mark.parametrize("part", ["front", "back"])
def test_dora_beside_a_plain_b_is_exported_as_it_learnt(house, tmp_path, part):
    client, core, held, _ = trained(house, job_of(house, adapters={part: {"dora": True}}))
    core.engine.fleet.average(uniform=True)  # As when the last client says goodbye; with one the mean is its own copy.
    leave_middle(core, house.digest, tmp_path / "gpu")
    assert not (tmp_path / "gpu" / "former").exists()
    save_adapters(tmp_path, client)
    files = [read_part_adapters(tmp_path / f"adapter-{end}.safetensors") for end in ("front", "back")]
    middle = read_part_adapters(tmp_path / "gpu" / "adapter-middle.safetensors")
    assert plain_loss([*files, middle], tmp_path / "out", held) == pytest.approx(client.evaluate(held), abs=2e-5)
