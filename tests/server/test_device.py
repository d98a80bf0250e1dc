"""B on another device than the messages: all of its tensors are there, and nothing of a message is.

No GPU is needed to see a tensor in the wrong place: the meta device computes shapes alone, and torch refuses to mix it with
the processor. What a GPU computes is compared with the processor where there is one (`-m gpu`).
"""

from __future__ import annotations

import pytest
import torch
import transformers

from securesplit.errors import InputError
from securesplit.learning import prepare, recipe_of
from securesplit.model import device as device_module
from securesplit.model.device import device_named
from securesplit.model.plan import CutPlan
from securesplit.model.split import split_model
from securesplit.server.engine import Batch, Engine
from securesplit.server.learner import Rows
from tests.e2e.house import WIDTH, build_house, build_model

LENGTHS = (5, 3, 5)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("device") / "house")


def engine_on(house, device, copies=(), **job) -> Engine:
    fields = house.job().model_dump(mode="json", exclude_none=True)
    fields["adapters"] = job.pop("alone", fields["adapters"] | job.pop("adapters", {}))
    loaded = type(house.job()).model_validate(fields | job)
    middle = split_model(build_model(), CutPlan(front=1, back=1)).middle.to(device)
    prepare(middle, loaded)
    return Engine(middle, recipe=recipe_of(loaded, "server"), copies=copies)


def rows(count, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def learnt(engine, client="alice", step=0):
    (out,) = engine.forward([Batch(client, step, LENGTHS, rows(13, step))], learn=True)
    (back,) = engine.backward([Rows(client, step, rows(13, 50 + step))])
    return out, back


def work(engine):
    """All that an engine does: two steps, evaluation, decoding of sequences of two lengths, means."""
    made = [piece for step in range(2) for piece in learnt(engine, step=step)]
    made += engine.forward([Batch("alice", 7, LENGTHS, rows(13, 3), gain=0.5)], learn=False)
    made.append(engine.decode(1, 1, LENGTHS, rows(13, 4), "alice"))
    made.append(engine.decode(1, 1, (1, 1, 1), rows(3, 5), "alice"))
    engine.fleet.learnt("alice", 3)
    engine.fleet.average(uniform=False)
    return made


@pytest.fixture
def without_values(monkeypatch):
    """What has no values is neither finite nor not: every look says yes."""
    real = torch.isfinite

    def looks(tensor):
        return torch.ones(tensor.shape, dtype=torch.bool) if tensor.is_meta else real(tensor)

    monkeypatch.setattr(torch, "isfinite", looks)
    # The library looks at positions for texts that share a row; ours never do.
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda _positions: None)


CASES = {
    "lora": {},
    "copies": {"copies": (("alice",), ("bob", "carol"))},
    "dropout": {"adapters": {"dropout": 0.2}},
    "accumulated": {"optimiser": {"client_lr": 1e-3, "server_lr": 1e-3, "accumulate": 2, "max_grad_norm": 1.0}},
    "recomputed": {"memory": {"checkpointing": ["middle"]}},
    "bf16": {"precision": {"middle": "bf16"}},
    "prefix": {"alone": {"method": "prefix", "prefix_length": 3, "seed": 1, "rank": 2, "alpha": 4.0}},
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_stays_on_the_processor(house, without_values, case):
    engine = engine_on(house, "meta", **CASES[case])
    made = work(engine)
    assert {piece.device.type for piece in made} == {"meta"}
    assert {p.device.type for p in engine.middle.parameters()} == {"meta"}


def test_a_tensor_in_the_wrong_place_would_be_seen(house):
    engine = engine_on(house, "meta")
    with pytest.raises(RuntimeError, match=r"device|meta"):
        engine.middle(torch.zeros(1, 2, WIDTH))


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0001", "cpu:0", "CUDA", "cuda:²"])
def test_a_name_that_is_none(name):
    with pytest.raises(InputError, match="SS-1255"):
        device_named(name)


def test_a_gpu_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(device_module.torch, "use_deterministic_algorithms", lambda **_: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    assert device_named("cuda") == torch.device("cuda", 0)
    assert device_named("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match=r"cuda:2 is not there: torch .* sees 2 GPU"):
        device_named("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="sees 0 GPU"):
        device_named("cuda")
    assert device_named("cpu") == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_computes_what_the_processor_does_and_the_same_bits_each_time(house, case):
    device = device_named("cuda")
    first, second = (work(engine_on(house, device, **CASES[case])) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    tolerance = 3e-2 if case == "bf16" else 1e-4
    for there, here in zip(first, work(engine_on(house, "cpu", **CASES[case])), strict=True):
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), here, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_a_server_on_a_gpu_goes_on_from_its_state(house):
    device = device_named("cuda")
    never, before = engine_on(house, device), engine_on(house, device)
    learnt(never), learnt(before)
    after = engine_on(house, device)
    after.restore(before.state())
    for a, b in zip(learnt(never, step=1), learnt(after, step=1), strict=True):
        assert torch.equal(a, b)
