"""The order refuse, clip, charge, noise, release; and nothing around it."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from securesplit.errors import BudgetExhausted, CheckFailed, InputError, PolicyDenied
from securesplit.privacy import gate as gates
from securesplit.privacy.gate import ClippedSum, Gate, Released, ReleasedUpdate
from securesplit.privacy.ledger import ALL, Ledger
from securesplit.privacy.plan import plan_for

ROUND = {"regime": "round", "gradients": (2.0, 0.2, 2), "updates": (3.0, 0.2, 2), "generation": (0.5, 0.2, 4)}


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path / "ledger")
    yield opened
    opened.close()


def values(released: Released) -> np.ndarray:
    """What the other side reads, float32 (B,T,D)."""
    if released.codec == "f32":
        return np.frombuffer(released.payload, dtype="<f4").reshape(released.shape)
    words = np.frombuffer(released.payload, dtype="<u2").astype("<u4") << 16
    return words.view("<f4").reshape(released.shape)


# ---- the order -------------------------------------------------------------------------------------------------------


def test_the_charge_is_on_disk_before_the_noise_is_drawn(policy_of, ledger, tmp_path, monkeypatch):
    seen = []

    def failing(shape, sigma):
        other = Ledger(tmp_path / "ledger")  # a second connection sees committed entries only
        seen.append(other.spent_units())
        other.close()
        raise RuntimeError("here the process would die")

    monkeypatch.setattr(gates, "gaussian", failing)
    policy = policy_of(**ROUND)
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    with pytest.raises(RuntimeError):
        gate.release(torch.ones(1, 2, 3), at="cut", records=["a"])
    total = ClippedSum(3, 3.0)
    total.add(torch.ones(3), "b")
    with pytest.raises(RuntimeError):
        gate.release_update(total)
    assert seen == [plan.cut.units, max(plan.cut.units, plan.update.units)]
    assert ledger.recall("a", "cut", "") is None


def test_nothing_is_drawn_when_the_budget_refuses(policy_of, ledger, monkeypatch):
    gate = Gate(policy_of(), ledger)
    gate.release(torch.ones(1, 2, 3), at="cut", records=["a"], memoise=False)
    monkeypatch.setattr(gates, "gaussian", lambda *_: pytest.fail("noise was drawn for a release that was not paid"))
    with pytest.raises(BudgetExhausted) as caught:
        gate.release(torch.ones(2, 2, 3), at="cut", records=["b", "a"], memoise=False)
    assert caught.value.code == "SS-5002"
    assert ledger.mu("b") == 0.0


def test_nothing_is_charged_for_what_is_refused_before(policy_of, ledger):
    gate = Gate(policy_of(), ledger)
    with pytest.raises(CheckFailed) as caught:
        gate.release(torch.tensor([[[1.0, float("nan")]]]), at="cut", records=["a"])
    assert caught.value.code == "SS-1510"
    for tensor, records in ((torch.ones(2, 3), ["a"]), (torch.ones(2, 2, 3), ["a"])):
        with pytest.raises(ValueError, match=r"\(B, T, D\)|one record"):
            gate.release(tensor, at="cut", records=records)
    assert ledger.summary() == ()


def test_a_disk_that_refuses_the_charge_or_the_memory_releases_nothing(policy_of, ledger, monkeypatch):
    gate = Gate(policy_of(), ledger)
    ledger._db.execute("PRAGMA query_only = ON")
    with pytest.raises(CheckFailed) as caught:
        gate.release(torch.ones(1, 2, 3), at="cut", records=["a"])
    assert caught.value.code == "SS-1522"
    ledger._db.execute("PRAGMA query_only = OFF")

    real = ledger.remember

    def full(*arguments):
        ledger._db.execute("PRAGMA query_only = ON")
        real(*arguments)

    monkeypatch.setattr(ledger, "remember", full)
    with pytest.raises(CheckFailed) as caught:
        gate.release(torch.ones(1, 2, 3), at="cut", records=["a"])
    assert caught.value.code == "SS-1522"


def test_a_private_policy_needs_a_ledger(policy_of):
    with pytest.raises(InputError) as caught:
        Gate(policy_of(), None)
    assert caught.value.code == "SS-1530"


@pytest.mark.parametrize("at", ["gradient", "decode", "update"])
def test_a_closed_channel_releases_nothing(policy_of, ledger, at):
    gate = Gate(policy_of(), ledger)
    with pytest.raises(PolicyDenied) as caught:
        gate.release(torch.ones(1, 1, 3), at=at)
    assert caught.value.code == "SS-2010"
    with pytest.raises(PolicyDenied) as caught:
        gate.require(1, at=at)
    assert caught.value.code == "SS-2010"
    assert ledger.summary() == ()


# ---- who pays --------------------------------------------------------------------------------------------------------


def test_each_record_pays_for_itself(policy_of, ledger):
    policy = policy_of(**ROUND)
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    gate.release(torch.ones(2, 2, 3), at="cut", records=["a", "b"])
    gate.release(torch.ones(1, 2, 3), at="gradient", records=["a"], memoise=False)
    assert ledger.mu("a") == pytest.approx((plan.cut.mu**2 + plan.gradient.mu**2) ** 0.5)
    assert ledger.mu("b") == pytest.approx(plan.cut.mu)
    rows = ledger._db.execute("SELECT record, channel, units, clip, sigma, policy FROM entries ORDER BY seq").fetchall()
    assert rows == [
        ("a", "cut", plan.cut.units, 1.0, plan.cut.sigma, policy.digest),
        ("b", "cut", plan.cut.units, 1.0, plan.cut.sigma, policy.digest),
        ("a", "gradient", plan.gradient.units, 2.0, plan.gradient.sigma, policy.digest),
    ]


def test_a_release_without_records_is_paid_by_all(policy_of, ledger):
    policy = policy_of(**ROUND)
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    gate.release(torch.ones(1, 1, 3), at="decode")
    assert [r[0] for r in ledger._db.execute("SELECT record FROM entries")] == [ALL]
    assert ledger.mu("whoever") == pytest.approx(plan.decode.mu)
    gate.require(3, at="decode")
    with pytest.raises(BudgetExhausted):
        gate.require(4, at="decode")
    for _ in range(3):
        gate.release(torch.ones(1, 1, 3), at="decode")
    with pytest.raises(BudgetExhausted):
        gate.release(torch.ones(1, 1, 3), at="decode")


def test_every_release_that_the_policy_promises_is_paid_and_then_no_more(policy_of, ledger):
    policy = policy_of(epsilon=3.0, delta=1e-6, activations=(1.0, 0.1, 3), regime="round", gradients=(1.0, 0.2, 7), updates=(1.0, 0.3, 2), generation=(1.0, 0.4, 5))  # fmt: skip
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    for at, count in (("cut", 3), ("gradient", 7), ("decode", 5)):
        for _ in range(count):
            gate.release(torch.ones(1, 1, 2), at=at, records=["a"], memoise=False)
        with pytest.raises(BudgetExhausted):
            gate.release(torch.ones(1, 1, 2), at=at, records=["a"], memoise=False)
    for _ in range(2):
        total = ClippedSum(2, 1.0)
        total.add(torch.ones(2), "a")
        gate.release_update(total)
    assert plan.budget - 17 <= ledger.spent_units() <= plan.budget


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
    gate = Gate(policy, ledger, version="w" if changed == "version" else "v", codec="bf16" if changed == "codec" else "f32")
    second = values(
        gate.release(
            torch.ones(1, 3 if changed == "shape" else 2, 3),
            at="decode" if changed == "channel" else "cut",
            records=["b" if changed == "record" else "a"],
        )
    )
    assert sum(s.releases for s in ledger.summary()) == 2
    assert not (first == second[:, :2]).any()


def test_the_same_bytes_in_another_process(policy_of, ledger, tmp_path):
    policy = policy_of()
    first = Gate(policy, ledger, version="v").release(torch.ones(1, 2, 3), at="cut", records=["a"])
    ledger.close()
    code = """
import sys, torch
from securesplit.policy.schema import Policy
from securesplit.privacy.gate import Gate
from securesplit.privacy.ledger import Ledger
gate = Gate(Policy.model_validate_json(sys.argv[2]), Ledger(sys.argv[1]), version="v")
print(gate.release(torch.zeros(1, 2, 3), at="cut", records=["a"]).payload.hex())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "ledger"), policy.model_dump_json()]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == first.payload.hex()
    again = Ledger(tmp_path / "ledger")
    assert again.summary()[0].releases == 1
    again.close()


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


@pytest.mark.parametrize("codec", ["f32", "bf16"])
def test_residuals_have_the_stated_law_in_every_row(policy_of, ledger, fixed_noise, codec):
    policy = policy_of(epsilon=2.0, **ROUND)
    sigma = plan_for(policy.privacy).cut.sigma
    hidden = torch.randn(500, 6, 24)
    hidden[:, 4:] = 0.0  # padding rows: nothing is there, and nothing shows it
    released = Gate(policy, ledger, codec=codec).release(hidden, at="cut", records=[str(i) for i in range(500)], memoise=False)
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
    plan, asked = plan_for(policy.privacy), []

    def silent(shape, sigma):
        asked.append(sigma)
        return np.zeros(shape)

    monkeypatch.setattr(gates, "gaussian", silent)
    gate = Gate(policy, ledger)
    for at in ("cut", "gradient", "decode"):
        released = values(gate.release(torch.full((1, 2, 3), 1e4), at=at, records=[at]))
        assert np.linalg.norm(released) == pytest.approx(plan.channel(at).clip, rel=1e-6)
    assert asked == [plan.cut.sigma, plan.gradient.sigma, plan.decode.sigma]


def test_bf16_is_torchs_cast_of_the_noised_values(policy_of, ledger, monkeypatch):
    monkeypatch.setattr("securesplit.privacy.noise._fresh_key", lambda: b"\5" * 32)
    policy, hidden = policy_of(), torch.randn(1, 4, 64)
    wide = values(Gate(policy, ledger).release(hidden, at="cut", records=["a"]))
    narrow = Gate(policy, ledger, codec="bf16").release(hidden, at="cut", records=["b"])
    expected = torch.from_numpy(wide.copy()).to(torch.bfloat16)
    assert len(narrow.payload) == 2 * 256
    assert np.array_equal(values(narrow), expected.float().numpy())


def test_half_precision_models_are_noised_in_full_precision(policy_of, ledger):
    released = Gate(policy_of(), ledger).release(torch.ones(1, 4, 4, dtype=torch.bfloat16), at="cut", records=["a"])
    assert len({v & 0xFFFF for v in np.frombuffer(released.payload, "<u4")}) > 1  # bits that bf16 does not have


def test_the_gradient_passes_to_the_clipped_tensor_and_the_noise_is_not_in_the_graph(policy_of, ledger):
    hidden = torch.randn(1, 2, 3, requires_grad=True)
    released = Gate(policy_of(activations=(1e3, 0.4, 1)), ledger).release(hidden, at="cut", records=["a"])
    released.graph.backward(torch.full((1, 2, 3), 5.0))
    assert torch.equal(hidden.grad, torch.full((1, 2, 3), 5.0))
    assert torch.equal(released.graph, hidden)


# ---- forgeries -------------------------------------------------------------------------------------------------------


def test_releases_cannot_be_made_elsewhere(policy_of, ledger):
    graph = torch.ones(1, 1, 1)
    with pytest.raises(TypeError, match="Gate"):
        Released(payload=b"", shape=(1, 1, 1), codec="f32", graph=graph, mint=object())
    with pytest.raises(TypeError, match="Gate"):
        ReleasedUpdate(vector=np.zeros(1), noised=True, mint=None)
    real = Gate(policy_of(), ledger).release(graph, at="cut", records=["a"])
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(real, payload=b"raw!")
    with pytest.raises(dataclasses.FrozenInstanceError):
        real.payload = b"raw!"
    assert not hasattr(real, "mint")
    assert "payload" not in repr(real)
    assert "graph" not in repr(real)


# ---- updates ---------------------------------------------------------------------------------------------------------


def total_of(gradients, bound=3.0):
    total = ClippedSum(gradients.shape[1], bound)
    for i, gradient in enumerate(gradients):
        total.add(gradient, f"r{i}")
    return total


def test_one_record_moves_a_sum_by_at_most_2c():
    gradients = torch.randn(5, 8) * 100
    one = total_of(gradients).vector
    for other in (-gradients[2], torch.zeros(8), gradients[2] * 1e20):
        replaced = gradients.clone()
        replaced[2] = other
        assert np.linalg.norm(one - total_of(replaced).vector) <= 2 * 3.0 * (1 + 1e-12)
    flipped = gradients.clone()
    flipped[2] *= -1
    assert np.linalg.norm(one - total_of(flipped).vector) == pytest.approx(6.0, rel=1e-5)


def test_a_sum_takes_a_record_once_and_no_nan():
    total = total_of(torch.ones(2, 4))
    with pytest.raises(ValueError, match="once"):
        total.add(torch.ones(4), "r1")
    with pytest.raises(CheckFailed) as caught:
        total.add(torch.tensor([1.0, float("nan"), 0.0, 0.0]), "r9")
    assert caught.value.code == "SS-1510"
    assert total.records == ["r0", "r1"]


def test_regime_round_noises_a_sum_and_charges_each_record(policy_of, ledger, fixed_noise):
    policy = policy_of(**ROUND)
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    total = total_of(torch.ones(3, 5000))
    released = gate.release_update(total)
    assert released.noised
    assert [s.releases for s in ledger.summary()] == [3]
    assert ledger.mu("r1") == pytest.approx(plan.update.mu)
    residual = (released.vector - total.vector) / plan.update.sigma
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], 5000)
    assert low < np.square(residual).sum() < high


def test_regime_round_refuses_plain_updates_and_looser_clips(policy_of, ledger):
    gate = Gate(policy_of(**ROUND), ledger)
    with pytest.raises(PolicyDenied) as caught:
        gate.release_update(np.ones(4))
    assert caught.value.code == "SS-2011"
    with pytest.raises(PolicyDenied) as caught:
        gate.release_update(total_of(torch.ones(1, 4), bound=3.1))
    assert caught.value.code == "SS-2010"
    assert ledger.summary() == ()


def test_regime_frozen_lets_plain_updates_into_its_blind_sum(policy_of, ledger):
    gate = Gate(policy_of(), ledger)
    released = gate.release_update(np.arange(4.0))
    assert (released.vector.tolist(), released.noised) == ([0.0, 1.0, 2.0, 3.0], False)
    with pytest.raises(PolicyDenied) as caught:
        gate.release_update(total_of(torch.ones(1, 4)))
    assert caught.value.code == "SS-2010"
    with pytest.raises(CheckFailed) as caught:
        gate.release_update(np.array([1.0, np.nan]))
    assert caught.value.code == "SS-1510"
    assert ledger.summary() == ()


def test_regime_frozen_without_a_blind_sum_lets_nothing_out(policy_of, ledger):
    policy = policy_of()
    seen = policy.model_copy(update={"aggregation": policy.aggregation.model_copy(update={"blind": False})})
    with pytest.raises(PolicyDenied) as caught:
        Gate(seen, ledger).release_update(np.ones(4))
    assert caught.value.code == "SS-2011"


# ---- no privacy ------------------------------------------------------------------------------------------------------


def test_the_unsafe_policy_says_so_and_sends_exactly_the_tensor(policy_of, caplog):
    with caplog.at_level(logging.WARNING):
        gate = Gate(policy_of(epsilon=None), None)
    assert "UnsafeNoPrivacy" in caplog.text
    hidden = torch.randn(2, 3, 4) * 1e6
    for at in ("cut", "gradient", "decode"):
        assert np.array_equal(values(gate.release(hidden, at=at, records=["a", "a"])), hidden.numpy())
    gate.require(10**9, at="decode")
    assert gate.release_update(np.ones(3)).vector.tolist() == [1.0] * 3
    total = total_of(torch.ones(2, 4))
    released = gate.release_update(total)
    assert not released.noised
    assert np.array_equal(released.vector, total.vector)
    with pytest.raises(CheckFailed) as caught:
        gate.release(torch.full((1, 1, 1), float("inf")), at="cut")
    assert caught.value.code == "SS-1510"
