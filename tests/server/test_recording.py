"""What a recording keeps of sums that the server opened."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open

from securesplit.aggregate.fixedpoint import Aggregate, quantise
from securesplit.aggregate.server import ServerResult
from securesplit.client.sharing import turn_of
from securesplit.model.lora import Layout, adapter_layout, add_adapters
from securesplit.model.sketch import sketch_size
from securesplit.model.store import load_back, load_front, load_middle
from securesplit.server.build import build_core
from securesplit.server.recording import SKETCH, UNNAMED, SumRecords, layouts_of, summed
from tests.e2e.house import CLIENTS, FROZEN, policy_of
from tests.e2e.test_rounds import train_all

MODES = ("alternating", "frozen-a", "share-a", "core", "naive")
SCALE, CLIP = 1 << 20, 0.5


@pytest.fixture
def job(house):
    return house.job(blind=False)


@pytest.fixture
def here(tmp_path):
    """The recording's directory."""
    (tmp_path / "recording").mkdir()
    return tmp_path / "recording"


def shared(job, sharing):
    changes = {"sharing": sharing, "inexact": sharing == "naive"}
    return job.model_copy(update={"adapters": job.adapters.model_copy(update=changes)})


def ended(vector, *, number=0, blind=False, weights=(3, 1)):
    """A round over two clients who sent ``vector`` and its opposite halved: steps in the ring are known exactly."""
    sent = [
        quantise(part, weight, scale=SCALE, clip=CLIP, w_max=255)[0]
        for part, weight in zip((vector, -vector / 2), weights, strict=True)
    ]
    ring = (sent[0].astype(np.uint64) + sent[1]).astype(np.uint32)
    opened = None if blind else Aggregate(ring, ("alice", "bob"), SCALE, CLIP)
    result = ServerResult(survivors=("alice", "bob"), ring_sum=ring, aggregate=opened)
    return SimpleNamespace(config=SimpleNamespace(round=number), result=result)


def read(path):
    with safe_open(path, framework="np") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items()}
        return {name: file.get_tensor(name) for name in about["names"]}, about


def vector_of_size(size, seed=0):
    return np.random.default_rng(seed).uniform(-CLIP, CLIP, size)


@pytest.mark.parametrize("sharing", MODES)
@pytest.mark.parametrize("number", [0, 1])
def test_what_a_sum_carries_is_what_clients_put_in(sharing, number):
    assert summed(sharing, number) == turn_of(sharing, number).summed


@pytest.mark.parametrize("sharing", MODES)
@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_names_and_shapes_are_those_of_the_clients(house, job, sharing, targets):
    job = shared(job, sharing)
    job = job.model_copy(update={"adapters": job.adapters.model_copy(update={"targets": targets})})
    parts = load_front(house.model), load_back(house.model)
    for part in parts:
        add_adapters(part, job.adapters.rank, job.adapters.alpha, targets, seed=1, core=sharing == "core")
    for number in (0, 1):
        factor = summed(sharing, number)
        front, back = (adapter_layout(part, factor) for part in parts)
        assert layouts_of(house.model, job, factor) == (Layout((*front.tensors, *back.tensors)), back)


@pytest.mark.parametrize("whole", [True, False])
def test_an_opened_sum_is_kept_to_the_last_bit(house, job, here, whole):
    layout = layouts_of(house.model, job, "B")[0 if whole else 1]
    vector = vector_of_size(layout.size)
    SumRecords(here, house.model, job)(ended(vector, number=4))
    tensors, about = read(here / "sum-0000.safetensors")
    assert list(tensors) == [tensor.name for tensor in layout.tensors]
    flat = np.concatenate([tensors[tensor.name].reshape(-1) for tensor in layout.tensors])
    assert np.array_equal(flat, 3 * np.rint(vector / CLIP * SCALE) + np.rint(-vector / 2 / CLIP * SCALE))
    assert (about["round"], about["peers"], about["weight"]) == (4, ["alice", "bob"], 4)
    mean = flat * about["clip"] / (about["scale"] * about["weight"])
    assert np.allclose(mean, 0.625 * vector, atol=CLIP / SCALE)


def test_sums_are_counted_as_they_are_opened_and_blind_ones_leave_nothing(house, job, here):
    records, size = SumRecords(here, house.model, job), layouts_of(house.model, job, "B")[0].size
    records(ended(vector_of_size(size), blind=True))
    records(SimpleNamespace(config=SimpleNamespace(round=0), result=None))
    assert list(here.iterdir()) == []
    for number in (0, 0):  # A client that was killed begins anew from round 0.
        records(ended(vector_of_size(size), number=number))
    assert sorted(path.name for path in here.iterdir()) == ["sum-0000.safetensors", "sum-0001.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in here.iterdir()} == {0o600}


def test_a_sketch_and_an_unknown_vector_are_kept_too(house, job, here):
    job = shared(job, "naive")
    layout = layouts_of(house.model, job, "both")[0]
    records = SumRecords(here, house.model, job)
    records(ended(vector_of_size(layout.size + sketch_size(layout))))
    records(ended(vector_of_size(layout.size + 1)))
    sketched, _ = read(here / "sum-0000.safetensors")
    assert sketched.pop(SKETCH).shape == (sketch_size(layout),)
    assert list(sketched) == [tensor.name for tensor in layout.tensors]
    unknown, _ = read(here / "sum-0001.safetensors")
    assert {name: tensor.shape for name, tensor in unknown.items()} == {UNNAMED: (layout.size + 1,)}


@pytest.mark.parametrize("fault", ["disk", "model"])
def test_a_recording_that_fails_costs_the_file_and_not_the_round(house, job, here, monkeypatch, caplog, fault):
    size = layouts_of(house.model, job, "B")[0].size
    if fault == "disk":

        def full(_handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    else:
        (house.model / "config.json").unlink()
    SumRecords(here, house.model, job)(ended(vector_of_size(size)))
    assert list(here.iterdir()) == [], "nothing half-written"
    assert "could not be recorded" in caplog.text


def test_a_recorded_run_holds_the_mean_that_every_client_opened(house, job, here):
    seen = SumRecords(here, house.model, job)
    core = build_core(job, policy_of(), load_middle(house.model), house.digest, seen=seen)
    outcome = train_all(house, core, policy_of())
    assert not outcome.errors
    for number in range(job.schedule.rounds):
        opened = np.load(house.root / "alice" / f"round-{number}.npz")["ring_sum"]
        tensors, about = read(here / f"sum-{number:04d}.safetensors")
        layout = layouts_of(house.model, job, summed("alternating", number))[0]
        flat = np.concatenate([tensors[tensor.name].reshape(-1) for tensor in layout.tensors])
        assert np.array_equal(flat, opened[:-1].view(np.int32))
        assert about["weight"] == opened[-1]
        assert tuple(about["peers"]) == CLIENTS


def test_a_blind_run_leaves_no_sum(house, here):
    job = house.job(blind=True, rounds=1)
    policy = policy_of(FROZEN)
    seen = SumRecords(here, house.model, job)
    outcome = train_all(house, build_core(job, policy, load_middle(house.model), house.digest, seen=seen), policy)
    assert not outcome.errors
    assert list(here.iterdir()) == []
