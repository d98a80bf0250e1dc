"""The job's ways of learning: what travels, what does not stand in old jobs, and what does not go together."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError
from securesplit.protocol.job import Job, load_job, parse_job
from securesplit.protocol.optimiser import Optimiser

EXAMPLE = (Path(__file__).parents[2] / "examples" / "job.toml").read_text(encoding="utf-8")
EVERYTHING = """
[adapters]
rank = 8
alpha = 16.0
targets = ["q_proj"]
seed = 7
dropout = 0.05
rslora = true
embedding = true
front = { rank = 4 }
middle = { dora = true, dropout = 0.0, rslora = false, targets = ["v_proj"] }
[optimiser]
client_lr = 2e-3
server_lr = 1e-3
weight_decay = 0.01
betas = [0.9, 0.95]
schedule = "cosine"
client_steps = 100
server_steps = 300
warmup = 0.1
accumulate = 4
max_grad_norm = 1.0
[precision]
front = "bf16"
middle = "nf4"
[memory]
checkpointing = ["middle", "back"]
[schedule]
rounds = 2
epochs = 3
batch = 4
evaluate_every = 10
patience = 2
keep_best = true
"""


def raw(text: str = EVERYTHING) -> dict:
    return {**tomllib.loads(EXAMPLE), **tomllib.loads(text)}


def test_every_key_travels_and_counts():
    job = Job.model_validate(raw())
    assert parse_job(job.canonical()) == job
    said = json.loads(job.canonical())
    assert said["precision"] == {"front": "bf16", "middle": "nf4"}
    assert said["memory"] == {"checkpointing": ["middle", "back"]}
    for table, key in (
        ("optimiser", "warmup"),
        ("schedule", "patience"),
        ("adapters", "dropout"),
        ("adapters", "front"),
    ):
        changed = raw()
        changed[table] = {k: v for k, v in changed[table].items() if k != key}
        assert Job.model_validate(changed).digest != job.digest


def test_a_job_without_the_keys_has_the_text_it_had():
    said = json.loads(parse_job(Job.model_validate(tomllib.loads(EXAMPLE)).canonical()).canonical())
    assert set(said["adapters"]) == {"rank", "alpha", "targets", "seed"}
    assert set(said["optimiser"]) == {"client_lr", "server_lr"}
    assert set(said["schedule"]) == {"rounds", "epochs", "batch"}
    assert not {"precision", "memory"} & set(said)


def test_the_example_with_its_commented_keys_is_a_job(tmp_path):
    """Every key of the example's comments is one that the schema knows."""
    keys = (
        "weight_decay",
        "betas",
        "schedule =",
        "client_steps",
        "server_steps",
        "warmup",
        "accumulate",
        "max_grad_norm",
    )
    keys += ("evaluate_every", "patience", "keep_best", "dropout", "rslora", "embedding")
    lines = [line[2:] if line.startswith(tuple(f"# {k}" for k in keys)) else line for line in EXAMPLE.splitlines()]
    assert sum(a != b for a, b in zip(lines, EXAMPLE.splitlines(), strict=True)) == len(keys)
    path = tmp_path / "job.toml"
    path.write_text("\n".join(lines))
    job = load_job(path)
    assert (job.optimiser.schedule, job.schedule.patience, job.adapters.dropout) == ("linear", 5, 0.05)


@pytest.mark.parametrize(
    ("table", "said", "fault"),
    [
        (
            "optimiser",
            {"schedule": "linear", "client_steps": None, "server_steps": None, "warmup": 0},
            "needs client_steps",
        ),
        ("optimiser", {"schedule": "constant", "client_steps": None, "server_steps": None}, "a share of warmup needs"),
        ("optimiser", {"warmup": 200}, "longer than the schedule"),
        ("optimiser", {"warmup": 2.5}, "whole number of steps"),
        ("optimiser", {"betas": [0.9]}, "betas"),
        ("optimiser", {"accumulate": 0}, "accumulate"),
        ("optimiser", {"max_grad_norm": 0.0}, "max_grad_norm"),
        ("precision", {"front": "f64"}, "precision.front"),
        ("memory", {"checkpointing": ["head"]}, "checkpointing"),
        ("adapters", {"back": {"dora": True}}, "not linear"),
    ],
)
def test_what_does_not_go_together_is_named(tmp_path, table, said, fault):
    changed = raw()
    changed[table] = {k: v for k, v in {**changed[table], **said}.items() if v is not None}
    with pytest.raises(ValueError, match=fault):
        Job.model_validate(changed)


def test_faults_of_a_file_are_told_at_once(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(EXAMPLE.replace("client_lr = 2e-3", 'client_lr = 2e-3\nschedule = "cosine"\nwarmup = 2.5'))
    with pytest.raises(InputError) as caught:
        load_job(path)
    (line,) = caught.value.details
    assert "needs client_steps" in line
    assert "whole number" in line


@settings(deadline=None, max_examples=60)
@given(span=st.integers(1, 10**6), share=st.floats(0.001, 0.999))
def test_a_share_of_warmup_is_at_least_that_share_and_no_longer_than_all(span, share):
    said = Optimiser(client_lr=0.1, server_lr=0.1, client_steps=span, server_steps=span, warmup=share)
    steps = said.warmup_of(span)
    assert 1 <= steps <= span
    assert steps == math.ceil(share * span)
    assert Optimiser(client_lr=0.1, server_lr=0.1, warmup=7).warmup_of(None) == 7
