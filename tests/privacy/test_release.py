"""What is sent: the same bytes again or fresh noise, of the stated law, in the stated type."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from securesplit.privacy.gate import Gate
from securesplit.privacy.plan import plan_for
from tests.privacy.released import ROUND, silence, values

# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_second_release_resends_the_same_bytes_without_a_charge(policy_of, ledger):
    gate = Gate(policy_of(), ledger, version="v")
    first = gate.release(torch.ones(2, 2, 3), at="cut", records=["a", "b"])
    spent = ledger.head()
    second = gate.release(torch.ones(2, 2, 3), at="cut", records=["b", "a"])
    assert ledger.head() == spent
    assert np.array_equal(values(first), values(second)[::-1])


def test_a_record_that_stands_twice_in_a_batch_is_released_once(policy_of, ledger):
    released = values(Gate(policy_of(), ledger).release(torch.ones(3, 2, 3), at="cut", records=["a", "b", "a"]))
    assert np.array_equal(released[0], released[2])
    assert not (released[0] == released[1]).any()
    assert ledger.summary()[0].releases == 2


@pytest.mark.parametrize("changed", ["version", "policy", "shape", "codec", "record", "channel"])
def test_whatever_else_changes_is_drawn_and_paid_anew(policy_of, ledger, changed):
    wide = {"activations": (1.0, 0.4, 2), "generation": (1.0, 0.4, 2)}
    first = values(Gate(policy_of(**wide), ledger, version="v").release(torch.ones(1, 2, 3), at="cut", records=["a"]))
    policy = policy_of(**(wide | {"activations": (1.0, 0.3, 2)} if changed == "policy" else wide))
    gate = Gate(
        policy, ledger, version="w" if changed == "version" else "v", codec="bf16" if changed == "codec" else "f32"
    )
    second = values(
        gate.release(
            torch.ones(1, 3 if changed == "shape" else 2, 3),
            at="decode" if changed == "channel" else "cut",
            records=["b" if changed == "record" else "a"],
        )
    )
    assert sum(s.releases for s in ledger.summary()) == 2
    assert not (first == second[:, :2]).any()


def test_equal_records_in_one_batch_are_one_release_and_different_contents_are_not(policy_of, ledger):
    gate = Gate(policy_of(activations=(1.0, 0.4, 2)), ledger)
    released = gate.release(torch.ones(3, 2, 3), at="cut", records=["a"] * 3, contents=["x", "y", "x"])
    sent = values(released)
    assert np.array_equal(sent[0], sent[2])
    assert not (sent[0] == sent[1]).any()
    assert ledger.summary()[0].releases == 2
    again = gate.release(torch.zeros(1, 2, 3), at="cut", records=["a"], contents=["y"])
    assert np.array_equal(values(again)[0], sent[1])


def test_without_memory_equal_records_in_one_batch_are_paid_and_drawn_apart(policy_of, ledger):
    gate = Gate(policy_of(activations=(1.0, 0.4, 2)), ledger)
    sent = values(gate.release(torch.ones(2, 2, 3), at="cut", records=["a", "a"], memoise=False))
    assert not (sent[0] == sent[1]).any()
    assert ledger.summary()[0].releases == 2


def test_two_gates_on_one_ledger_send_the_same_bytes_for_the_same_record(policy_of, open_ledger, monkeypatch):
    """Both look into the memory before either has paid: the one that comes second sends what the first one did."""
    one, two = open_ledger(), open_ledger()
    first, found = Gate(policy_of(), one, version="v"), []

    def in_between(*_):
        if not found:
            found.append(None)
            found.append(Gate(policy_of(), two, version="v").release(torch.ones(1, 2, 3), at="cut", records=["a"]))

    monkeypatch.setattr(one, "recall", in_between)
    late = first.release(torch.ones(1, 2, 3), at="cut", records=["a"])
    assert late.payload == found[1].payload
    assert one.summary()[0].releases == 1


def test_the_same_bytes_in_other_processes(policy_of, open_ledger, tmp_path):
    code = """
import sys, torch
from pathlib import Path
from securesplit.policy.schema import Policy
from securesplit.privacy.gate import Gate
from securesplit.privacy.ledger import Ledger
root = Path(sys.argv[1])
gate = Gate(Policy.model_validate_json(sys.argv[2]), Ledger(root / "ledger", anchors=root / "anchors"), version="v")
print(gate.release(torch.zeros(1, 2, 3), at="cut", records=["a"]).payload.hex())
"""
    policy = policy_of()
    command = [sys.executable, "-c", code, str(tmp_path), policy.model_dump_json()]
    racing = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in "12"]
    said = [process.communicate(timeout=60)[0].strip() for process in racing]
    ledger = open_ledger()  # A restart, after both.
    again = Gate(policy, ledger, version="v").release(torch.ones(1, 2, 3), at="cut", records=["a"])
    assert said == [again.payload.hex()] * 2
    assert ledger.summary()[0].releases == 1


def test_releases_without_memory_differ_everywhere(policy_of, ledger):
    gate = Gate(policy_of(activations=(1.0, 0.4, 2)), ledger)
    one, two = (gate.release(torch.ones(2, 8, 16), at="cut", records=["a", "b"], memoise=False) for _ in "12")
    assert not (values(one) == values(two)).any()
    assert not (values(one)[0] == values(one)[1]).any()


def test_releases_paid_by_all_are_never_remembered(policy_of, ledger):
    gate = Gate(policy_of(activations=(1.0, 0.4, 2)), ledger)
    one, two = (gate.release(torch.ones(1, 8, 16), at="cut") for _ in "12")
    assert not (values(one) == values(two)).any()


# ---- the noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["f32", "bf16", "int8"])
def test_residuals_have_the_stated_law_in_every_row(policy_of, ledger, fixed_noise, codec):
    policy = policy_of(epsilon=2.0, **ROUND)
    sigma = plan_for(policy.privacy).cut.sigma
    hidden = torch.randn(500, 6, 24)
    hidden[:, 4:] = 0.0  # padding rows: nothing is there, and nothing shows it
    released = Gate(policy, ledger, codec=codec).release(
        hidden, at="cut", records=[str(i) for i in range(500)], memoise=False
    )
    residual = (values(released) - released.graph.detach().numpy()) / sigma
    if codec == "f32":
        assert stats.kstest(residual.ravel(), "norm").pvalue > 1e-4
    count = 500 * 24
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], count)
    for row in range(6):
        assert low < np.square(residual[:, row]).sum() < high, row
    assert abs(residual.mean()) < 4.5 / np.sqrt(6 * count)
    assert abs((residual[:, :3] * residual[:, 3:]).mean()) < 4.5 / np.sqrt(3 * count)
    assert abs((residual[::2] * residual[1::2]).mean()) < 4.5 / np.sqrt(3 * count)


def test_every_channel_has_its_own_clip_and_sigma(policy_of, ledger, monkeypatch):
    policy = policy_of(**ROUND)
    plan = plan_for(policy.privacy)
    gate = Gate(policy, ledger)
    with monkeypatch.context() as patch:
        silence(patch)
        for at in ("cut", "gradient", "decode"):
            released = values(gate.release(torch.full((1, 2, 3), 1e4), at=at, records=[at], memoise=False))
            norm, clip = np.linalg.norm(released.astype(np.float64)), plan.channel(at).clip
            assert clip * (1 - 1e-5) < norm <= clip * (1 + 1e-7)
    for at in ("cut", "gradient", "decode"):
        released = gate.release(torch.zeros(1, 100, 100), at=at, records=[f"more {at}"])
        assert values(released).std() == pytest.approx(plan.channel(at).sigma, rel=0.05)


def test_what_is_sent_lies_on_the_lattice(policy_of, ledger):
    """Every number is a whole number of steps, to the last bit of float32: the low bits tell nothing of a record."""
    gate, hidden = Gate(policy_of(), ledger), torch.randn(1, 20, 30)
    sent = values(gate.release(hidden, at="cut", records=["a"])).ravel()
    step = next(iter(ledger.entries())).step
    whole = np.rint(sent.astype(np.float64) / step)
    assert np.array_equal((whole * step).astype(np.float32), sent)


def test_bf16_is_torchs_cast_of_the_noised_values(policy_of, ledger, monkeypatch):
    monkeypatch.setattr("securesplit.privacy.lattice.fresh_key", lambda: b"\5" * 32)
    policy, hidden = policy_of(), torch.randn(1, 4, 64)
    wide = values(Gate(policy, ledger).release(hidden, at="cut", records=["a"]))
    narrow = Gate(policy, ledger, codec="bf16").release(hidden, at="cut", records=["b"])
    expected = torch.from_numpy(wide.copy()).to(torch.bfloat16)
    assert len(narrow.payload) == 2 * 256
    assert np.array_equal(values(narrow), expected.float().numpy())


def test_int8_is_the_rounding_of_the_noised_values_and_of_nothing_else(policy_of, ledger, monkeypatch):
    monkeypatch.setattr("securesplit.privacy.lattice.fresh_key", lambda: b"\5" * 32)
    policy, hidden = policy_of(), torch.randn(2, 4, 64)
    wide = values(Gate(policy, ledger).release(hidden, at="cut", records=["a", "b"]))
    narrow = Gate(policy, ledger, codec="int8").release(hidden, at="cut", records=["c", "d"])
    assert narrow.codec == "int8"
    assert len(narrow.payload) == 2 * 4 * (4 + 64)
    scales = np.abs(wide).max(axis=2, keepdims=True) / np.float32(127)
    assert np.array_equal(values(narrow), np.rint(wide.astype(np.float64) / scales).astype(np.float32) * scales)
    assert (
        np.linalg.norm(narrow.graph[0].numpy()) <= plan_for(policy.privacy).cut.clip
    )  # Clipped and clean, and stays here.


def test_int8_is_remembered_by_its_bytes_and_resent_after_a_restart(policy_of, open_ledger):
    policy, hidden = policy_of(), torch.randn(1, 3, 8)
    first = Gate(policy, open_ledger(), codec="int8").release(hidden, at="cut", records=["a"], contents=["x"])
    ledger = open_ledger()
    again = Gate(policy, ledger, codec="int8").release(hidden, at="cut", records=["a"], contents=["x"])
    assert again.payload == first.payload
    assert ledger.knows(hashlib.sha256(first.payload).hexdigest()) is not None
    assert ledger.summary()[0].releases == 1


def test_the_gain_is_public_and_brings_a_release_back_to_the_clip(policy_of, ledger, fixed_noise):
    policy = policy_of(epsilon=1.0, **ROUND)
    sigma = plan_for(policy.privacy).cut.sigma
    gate = Gate(policy, ledger)
    loud, silent = (
        gate.release(t, at="cut", records=[r])
        for t, r in ((torch.randn(1, 60, 50), "a"), (torch.zeros(1, 60, 50), "b"))
    )
    assert loud.gain == silent.gain == pytest.approx(1 / (1 + 3000 * sigma**2) ** 0.5)
    for released in (loud, silent):
        assert np.linalg.norm(values(released) * released.gain) == pytest.approx(1.0, rel=0.06)
    assert gate.release(torch.zeros(0, 3, 4), at="cut", records=[]).gain == 1.0
    assert Gate(policy_of(epsilon=None), None).release(torch.randn(1, 2, 3), at="cut").gain == 1.0


def test_half_precision_models_are_noised_in_full_precision(policy_of, ledger):
    released = Gate(policy_of(), ledger).release(torch.ones(1, 4, 4, dtype=torch.bfloat16), at="cut", records=["a"])
    assert len({v & 0xFFFF for v in np.frombuffer(released.payload, "<u4")}) > 1  # bits that bf16 does not have


def test_the_gradient_passes_to_the_clipped_tensor_and_the_noise_is_not_in_the_graph(policy_of, ledger):
    hidden = torch.randn(1, 2, 3, requires_grad=True)
    released = Gate(policy_of(activations=(1e3, 0.4, 1)), ledger).release(hidden, at="cut", records=["a"])
    released.graph.backward(torch.full((1, 2, 3), 5.0))
    assert torch.equal(hidden.grad, torch.full((1, 2, 3), 5.0))
    assert torch.equal(released.graph, hidden)
