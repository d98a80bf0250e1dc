"""The order refuse, clip, charge, noise, release; who pays; and nothing around it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from securesplit.errors import BudgetExhausted, CheckFailed, InputError, PolicyDenied
from securesplit.privacy import gate as gates
from securesplit.privacy.gate import ClippedSum, Gate, Released, ReleasedUpdate
from securesplit.privacy.ledger import ALL, Ledger
from securesplit.privacy.plan import plan_for
from tests.privacy.released import ROUND


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path / "ledger")
    yield opened
    opened.close()


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


# ---- forgeries -------------------------------------------------------------------------------------------------------


def test_releases_cannot_be_made_elsewhere(policy_of, ledger):
    graph = torch.ones(1, 1, 1)
    with pytest.raises(TypeError, match="Gate"):
        Released(payload=b"", shape=(1, 1, 1), codec="f32", gain=1.0, graph=graph, mint=object())
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
