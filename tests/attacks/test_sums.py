"""Sums of a recording are read as they were written, or not at all."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from attacks.sums import BEHIND, FORMAT, RecordedSum, read_sums, sigma_of
from attacks.view import PublicFacts
from securesplit.errors import InputError
from securesplit.policy.schema import Policy
from securesplit.privacy.plan import plan_for
from securesplit.protocol.job import Job
from securesplit.server import recording
from tests.attacks.conftest import policy

ROSTER = ("a", "b", "c")
JOB = Job.model_validate(
    {
        "name": "tiny", "model": "tiny", "cut": {"front": 2, "back": 1},
        "adapters": {"rank": 2, "alpha": 4.0, "targets": ["q_proj"], "seed": 7},
        "optimiser": {"client_lr": 1e-2, "server_lr": 5e-3}, "schedule": {"rounds": 2, "epochs": 2, "batch": 4},
        "sums": {"roster": ROSTER, "threshold": 2, "clip": 1.0, "blind": False},
    }
)  # fmt: skip
NAMES = ["model.layers.0.self_attn.q_proj.lora_B.weight", "model.layers.10.self_attn.q_proj.lora_B.weight"]
ABOUT = {
    "format": FORMAT, "round": 3, "peers": list(ROSTER), "weight": 6, "scale": 1000, "clip": 0.5, "names": NAMES,
}  # fmt: skip


def facts(rules: Policy, job: Job | None = JOB) -> PublicFacts:
    return PublicFacts(policy=rules, model="0" * 64, passes=1, job=job)


def tensors() -> dict[str, np.ndarray]:
    return {name: np.arange(6, dtype=np.int32).reshape(3, 2) - i for i, name in enumerate(NAMES)}


def write(directory, number=0, *, about=None, held=None, **changes):
    said = {key: json.dumps(value) for key, value in {**(about or ABOUT), **changes}.items()}
    path = directory / f"sum-{number:04d}.safetensors"
    path.write_bytes(save(tensors() if held is None else held, said))
    return path


def refused(directory, rules, job: Job | None = JOB):
    with pytest.raises(InputError, match="SS-1720") as found:
        read_sums(directory, facts(rules, job))
    return str(found.value)


def test_the_formats_are_the_recorders():
    assert (recording.FORMAT, {recording.SKETCH, recording.UNNAMED}) == (FORMAT, BEHIND)


def test_a_mean_is_steps_times_clip_over_scale_and_weight(tmp_path, unsafe):
    write(tmp_path)
    (found,) = read_sums(tmp_path, facts(unsafe))
    assert isinstance(found, RecordedSum)
    assert (found.round, found.peers, found.weight, found.names) == (3, ROSTER, 6, tuple(NAMES))
    for steps, mean in zip(tensors().values(), found.tensors, strict=True):
        assert mean.dtype == np.float32
        assert np.allclose(mean, steps * 0.5 / (1000 * 6), rtol=1e-7)
    assert (found.sigma, found.sent, found.job) == (0.0, "steps", JOB)
    assert found.grid == pytest.approx(0.5 / 6000)


def test_the_order_is_that_of_opening_and_a_blind_recording_has_none(tmp_path, unsafe):
    assert read_sums(tmp_path, facts(unsafe)) == ()
    for number, opened in ((12345, 3), (9999, 2), (2, 0), (10, 1)):
        write(tmp_path, number, round=opened)
    assert [found.round for found in read_sums(tmp_path, facts(unsafe))] == [0, 1, 2, 3]


def test_a_sketch_and_wide_words_are_read(tmp_path, unsafe):
    held = {**{name: tensor.astype(np.int64) for name, tensor in tensors().items()}, "sketch": np.ones(5, np.int64)}
    write(tmp_path, held=held, names=[*NAMES, "sketch"])
    (found,) = read_sums(tmp_path, facts(unsafe))
    assert [tensor.shape for tensor in found.tensors] == [(3, 2), (3, 2), (5,)]


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"}, {"round": -1}, {"peers": []}, {"peers": ["stranger"]}, {"weight": 0}, {"scale": 0},
        {"clip": 0.0}, {"clip": -1.0}, {"names": NAMES[:1]}, {"names": [*NAMES, NAMES[0]]}, {"names": [*NAMES, "more"]},
        {"weight": "6"}, {"extra": 1},
    ],
)  # fmt: skip
def test_foreign_metadata_is_refused(tmp_path, unsafe, changes):
    write(tmp_path, **changes)
    refused(tmp_path, unsafe)


@pytest.mark.parametrize(
    "held",
    [
        {name: tensor.astype(np.float32) for name, tensor in tensors().items()},
        {name: tensor.reshape(-1) for name, tensor in tensors().items()},
        {name: tensor[:0] for name, tensor in tensors().items()},
    ],
)
def test_foreign_tensors_are_refused(tmp_path, unsafe, held):
    write(tmp_path, held=held)
    refused(tmp_path, unsafe)


def test_a_sum_without_a_job_is_refused_and_nothing_is_half_read(tmp_path, unsafe):
    write(tmp_path)
    refused(tmp_path, unsafe, None)
    whole = write(tmp_path, 1).read_bytes()
    (tmp_path / "sum-0001.safetensors").write_bytes(whole[:-1])
    assert "sum-0001" in refused(tmp_path, unsafe)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_no_damage_escapes(tmp_path_factory, data):
    """Whatever bytes stand there: a sum, or the one error."""
    directory = tmp_path_factory.mktemp("torn")
    path = write(directory)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    rules = policy({"mechanism": "UnsafeNoPrivacy"})
    try:
        (found,) = read_sums(directory, facts(rules))
    except InputError as error:
        assert error.code == "SS-1720"  # noqa: PT017 - either outcome is right
    else:
        assert all(np.isfinite(tensor).all() for tensor in found.tensors)


def gaussian(regime: str, **updates: object) -> Policy:
    private = {
        "mechanism": "gaussian", "unit": "sequence", "relation": "replace-one", "epsilon": 8.0, "delta": 1e-5,
        "regime": regime, "activations": {"clip": 4.0, "share": 0.5, "releases": 1},
        "updates": {"clip": 1.0, "share": 0.25, "releases": 2, **updates},
    }  # fmt: skip
    if regime != "frozen":
        private["gradients"] = {"clip": 1.0, "share": 0.25, "releases": 2}
    return policy(private)


def test_sigma_is_what_the_clients_add(tmp_path):
    rules = gaussian("round")
    plan = plan_for(rules.privacy).update
    noise = np.random.default_rng(1).normal(0, plan.sigma, (3, 200_000)).mean(0)
    assert sigma_of(rules, JOB, 3) == pytest.approx(noise.std(), rel=0.01)
    write(tmp_path)
    (found,) = read_sums(tmp_path, facts(rules))
    assert (found.sent, found.sigma) == ("gradients", sigma_of(rules, JOB, 3))


def test_shared_noise_is_a_part_from_each():
    rules = gaussian("round", honest=2)
    whole = plan_for(rules.privacy).update.sigma
    assert sigma_of(rules, JOB, 4) == pytest.approx(whole / np.sqrt(2) / 2)
    assert sigma_of(gaussian("frozen"), JOB, 4) == pytest.approx(plan_for(gaussian("frozen").privacy).update.sigma / 2)


def test_noise_that_passed_the_optimiser_is_of_the_order_of_its_step():
    assert sigma_of(gaussian("step"), JOB, 4) == pytest.approx(JOB.optimiser.client_lr / 2)
    bare = gaussian("frozen")
    bare = bare.model_copy(update={"privacy": replace_updates(bare)})
    assert sigma_of(bare, JOB, 4) == 0.0


def replace_updates(rules: Policy):
    return rules.privacy.model_copy(update={"updates": None})


def test_a_recorded_sum_is_an_opened_one(tmp_path, unsafe):
    write(tmp_path)
    (found,) = read_sums(tmp_path, facts(unsafe))
    assert replace(found, sigma=1.0).sigma == 1.0
