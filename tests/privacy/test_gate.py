"""The order refuse, clip, noise, charge and keep, release; who pays; and nothing around it."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from securesplit.errors import BudgetExhausted, CheckFailed, InputError, PolicyDenied
from securesplit.privacy import gate as gates
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.gate import Gate, ReleasedCommon
from securesplit.privacy.lattice import step_for
from securesplit.privacy.ledger import ALL, Ledger
from securesplit.privacy.plan import plan_for
from tests.privacy.released import ROUND, values


def entries(ledger):
    return [(e.record, e.channel, e.units) for e in ledger.entries()]


def sum_of(plan, gradient, *records):
    total = ClippedSum(len(gradient), plan.update.clip, step_for(plan.update.sigma))
    for record in records:
        total.add(gradient, record)
    return total


# ---- the order -------------------------------------------------------------------------------------------------------


def test_the_charge_is_on_disk_before_anything_is_handed_over(policy_of, ledger, open_ledger, monkeypatch):
    policy, seen = policy_of(**ROUND), []
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)

    def dying(**_):
        seen.append(entries(open_ledger()))  # Another connection sees what is committed, and nothing else.
        raise RuntimeError("here the process would die")

    monkeypatch.setattr(gates, "Released", dying)
    monkeypatch.setattr(gates, "ReleasedUpdate", dying)
    with pytest.raises(RuntimeError):
        gate.release(torch.ones(1, 2, 3), at="cut", records=["a"])
    with pytest.raises(RuntimeError):
        gate.release_update(sum_of(plan, torch.ones(3), "b"))
    assert seen == [[("a", "cut", plan.cut.units)], [("a", "cut", plan.cut.units), ("b", "update", plan.update.units)]]


def test_a_death_before_the_commit_costs_nothing_and_its_noise_is_never_seen_again(policy_of, ledger, monkeypatch):
    gate, offered = Gate(policy_of(), ledger), []

    def dying(_self, charges, **_):
        offered.extend(charge.payload for charge in charges)
        raise RuntimeError("here the process would die")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "charge", dying)
        with pytest.raises(RuntimeError):
            gate.release(torch.ones(1, 2, 3), at="cut", records=["a"])
    assert entries(ledger) == []
    released = gate.release(torch.ones(1, 2, 3), at="cut", records=["a"])
    assert not (np.frombuffer(offered[0], "<f4") == values(released).ravel()).any()
    assert len(entries(ledger)) == 1


def test_a_release_that_the_budget_refuses_leaves_nothing_behind(policy_of, ledger):
    gate = Gate(policy_of(), ledger, version="v")
    gate.release(torch.ones(1, 2, 3), at="cut", records=["a"], memoise=False)
    before = entries(ledger)
    for memoise in (True, False):
        with pytest.raises(BudgetExhausted) as caught:
            gate.release(torch.ones(2, 2, 3), at="cut", records=["b", "a"], memoise=memoise)
        assert caught.value.code == "SS-5002"
    assert entries(ledger) == before
    assert ledger.mu("b") == 0.0
    assert ledger.versions("b", "cut") == ledger.versions("a", "cut") == ()


def test_nothing_is_charged_for_what_is_refused_before(policy_of, ledger):
    gate = Gate(policy_of(), ledger)
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(CheckFailed) as caught:
            gate.release(torch.tensor([[[1.0, bad]], [[3.0, 4.0]]]), at="cut", records=["a", "b"])
        assert caught.value.code == "SS-1510"
        assert not any(character.isdigit() for character in caught.value.what), "it says of no row that it was this one"
    for tensor, records, contents in (
        (torch.ones(2, 3), ["a"], None),
        (torch.ones(2, 2, 3), ["a"], None),
        (torch.ones(1, 2, 3), ["a", "b"], None),
        (torch.ones(2, 2, 3), ["a", "b"], ["c"]),
    ):
        with pytest.raises(ValueError, match=r"\(B, T, D\)|one record"):
            gate.release(tensor, at="cut", records=records, contents=contents)
    assert entries(ledger) == []


def test_a_disk_that_refuses_the_commit_releases_and_remembers_nothing(policy_of, ledger, monkeypatch):
    policy = policy_of(**ROUND)
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    database = ledger._custody.db
    database.execute("PRAGMA query_only = ON")
    for call in (
        lambda: gate.release(torch.ones(1, 2, 3), at="cut", records=["a"]),
        lambda: gate.release_update(sum_of(plan, torch.ones(3), "a")),
    ):
        with pytest.raises(CheckFailed) as caught:
            call()
        assert caught.value.code == "SS-1522"
    database.execute("PRAGMA query_only = OFF")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # The entry could be written, and its payload not: neither stays.
        patch.setattr(ledger._custody.memo, "keep", full)
        with pytest.raises(CheckFailed) as caught:
            gate.release(torch.ones(1, 2, 3), at="cut", records=["a"])
        assert caught.value.code == "SS-1522"
    assert entries(ledger) == []
    assert ledger.versions("a", "cut") == ()
    gate.release(torch.ones(1, 2, 3), at="cut", records=["a"])
    assert len(entries(ledger)) == 1


def test_what_leaves_is_what_the_ledger_answers(policy_of, ledger, monkeypatch):
    gate = Gate(policy_of(activations=(1.0, 0.4, 2)), ledger)
    for memoise in (True, False):
        released = gate.release(torch.ones(1, 2, 3), at="cut", records=["a"], memoise=memoise)
        assert ledger.knows(hashlib.sha256(released.payload).hexdigest()) is not None
    monkeypatch.setattr(Ledger, "charge", lambda _self, charges, **_: (b"\1\2\3\4" * 6,) * len(charges))
    assert gate.release(torch.ones(1, 2, 3), at="cut", records=["b"]).payload == b"\1\2\3\4" * 6


def test_a_private_policy_needs_a_ledger(policy_of):
    with pytest.raises(InputError) as caught:
        Gate(policy_of(), None)
    assert caught.value.code == "SS-1530"


@pytest.mark.parametrize("at", ["gradient", "decode", "update", "labels"])
def test_a_closed_channel_releases_nothing(policy_of, ledger, at):
    gate = Gate(policy_of(), ledger)
    for call in (lambda: gate.release(torch.ones(1, 1, 3), at=at), lambda: gate.require(1, at=at)):
        with pytest.raises(PolicyDenied) as caught:
            call()
        assert caught.value.code == "SS-2010"
    assert entries(ledger) == []


# ---- who pays --------------------------------------------------------------------------------------------------------


def test_each_record_pays_for_itself(policy_of, ledger):
    policy = policy_of(**ROUND)
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    gate.release(torch.ones(2, 2, 3), at="cut", records=["a", "b"])
    gate.release(torch.ones(1, 2, 3), at="gradient", records=["a"], memoise=False)
    gate.release_update(sum_of(plan, torch.ones(3), "b"))
    assert ledger.mu("a") == pytest.approx((plan.cut.mu**2 + plan.gradient.mu**2) ** 0.5)
    assert ledger.mu("b") == pytest.approx((plan.cut.mu**2 + plan.update.mu**2) ** 0.5)
    found = [
        (e.record, e.channel, e.units, e.clip, e.sigma, e.step / e.sigma, e.policy, bool(e.version))
        for e in ledger.entries()
    ]
    lattice = pytest.approx(1 / 1048704, rel=1e-6)  # 256 sqrt(1 + 64^2 + 64^4)
    assert found == [
        ("a", "cut", plan.cut.units, 1.0, plan.cut.sigma, lattice, policy.digest, True),
        ("b", "cut", plan.cut.units, 1.0, plan.cut.sigma, lattice, policy.digest, True),
        ("a", "gradient", plan.gradient.units, 2.0, plan.gradient.sigma, lattice, policy.digest, False),
        ("b", "update", plan.update.units, 3.0, plan.update.sigma, lattice, policy.digest, False),
    ]


def test_a_release_without_records_is_paid_by_all(policy_of, ledger):
    policy = policy_of(**ROUND)
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    gate.release(torch.ones(1, 1, 3), at="decode")
    assert entries(ledger) == [(ALL, "decode", plan.decode.units)]
    assert ledger.mu("whoever") == pytest.approx(plan.decode.mu)
    gate.require(3, at="decode")
    with pytest.raises(BudgetExhausted):
        gate.require(4, at="decode")
    gate.release(torch.ones(3, 1, 3), at="decode")  # Three sequences are three releases, and all pay for each.
    assert ledger.mu("whoever") == pytest.approx(2 * plan.decode.mu)
    with pytest.raises(BudgetExhausted):
        gate.release(torch.ones(1, 1, 3), at="decode")


def test_what_all_have_paid_is_gone_for_each(policy_of, ledger):
    """The cut's cap would allow more; the life budget of each record does not."""
    policy = policy_of(activations=(1.0, 1.0, 2))
    gate = Gate(policy, ledger)
    gate.release(torch.ones(2, 1, 3), at="cut")
    with pytest.raises(BudgetExhausted) as caught:
        gate.release(torch.ones(1, 1, 3), at="cut", records=["a"])
    assert caught.value.code == "SS-5001"


def test_every_release_that_the_policy_promises_is_paid_and_then_no_more(policy_of, ledger):
    policy = policy_of(epsilon=3.0, delta=1e-6, activations=(1.0, 0.1, 3), regime="round", gradients=(1.0, 0.2, 7), updates=(1.0, 0.3, 2), generation=(1.0, 0.4, 5))  # fmt: skip
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    for at, count in (("cut", 3), ("gradient", 7), ("decode", 5)):
        for _ in range(count):
            gate.release(torch.ones(1, 1, 2), at=at, records=["a"], memoise=False)
        with pytest.raises(BudgetExhausted):
            gate.release(torch.ones(1, 1, 2), at=at, records=["a"], memoise=False)
    for _ in range(2):
        gate.release_update(sum_of(plan, torch.ones(2), "a"))
    with pytest.raises(BudgetExhausted):
        gate.release_update(sum_of(plan, torch.ones(2), "a"))
    assert plan.budget - 17 <= ledger.spent_units() <= plan.budget


@pytest.mark.parametrize("records", [None, []])
def test_an_empty_batch_costs_nothing_and_carries_nothing(policy_of, ledger, records):
    gate = Gate(policy_of(), ledger)
    released = gate.release(torch.zeros(0, 3, 4), at="cut", records=records)
    assert (released.payload, released.shape, released.gain) == (b"", (0, 3, 4), 1.0)
    assert entries(ledger) == []


def test_a_sum_of_nothing_carries_noise_alone(policy_of, ledger, fixed_noise):
    policy = policy_of(**ROUND)
    plan = plan_for(policy.privacy)
    vector = Gate(policy, ledger).release_update(sum_of(plan, torch.ones(4000))).vector
    assert vector.std() == pytest.approx(plan.update.sigma, rel=0.05)
    assert entries(ledger) == []


# ---- forgeries -------------------------------------------------------------------------------------------------------


def test_releases_cannot_be_made_elsewhere(policy_of, ledger):
    graph = torch.ones(1, 1, 1)
    with pytest.raises(TypeError, match="Gate"):
        gates.Released(payload=b"", shape=(1, 1, 1), codec="f32", gain=1.0, graph=graph, mint=object())
    with pytest.raises(TypeError, match="Gate"):
        gates.ReleasedUpdate(vector=np.zeros(1), noised=True, mint=None)
    real = Gate(policy_of(), ledger).release(graph, at="cut", records=["a"])
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(real, payload=b"raw!")
    with pytest.raises(dataclasses.FrozenInstanceError):
        real.payload = b"raw!"
    assert not hasattr(real, "mint")
    assert "payload" not in repr(real)
    assert "graph" not in repr(real)


# ---- what all clients hold alike -------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ["frozen", "round"])
def test_only_what_a_round_began_from_is_handed_over_and_it_costs_nothing(policy_of, ledger, regime):
    seen = []
    policy = policy_of(**ROUND) if regime == "round" else policy_of()
    gate = Gate(policy, ledger, witness=seen.append)
    common, moved = np.arange(4, dtype="<f4").tobytes(), np.arange(1, 5, dtype="<f4").tobytes()
    with pytest.raises(PolicyDenied) as caught:
        gate.release_common(common)
    assert caught.value.code == "SS-2011", "before a round began"
    gate.settled(common)
    assert gate.release_common(common).payload == common
    assert gate.release_common(common, whole=False).payload == b""
    with pytest.raises(PolicyDenied):
        gate.release_common(moved, whole=False)
    with pytest.raises(PolicyDenied) as caught:
        gate.release_common(moved)
    assert caught.value.code == "SS-2011", "what this site's own work made of it"
    gate.settled(moved)
    with pytest.raises(PolicyDenied):
        gate.release_common(common)
    assert entries(ledger) == []
    assert [(let.channel, let.noised, let.size) for let in seen] == [
        ("common", regime == "round", 16),
        ("common", regime == "round", 32),
    ]


def test_what_others_hand_over_may_shape_releases_except_in_a_frozen_a(policy_of, ledger):
    state = ["start"]
    gate = Gate(policy_of(**ROUND), ledger, state=lambda: state[0])
    state[0] = "handed over"
    with pytest.raises(PolicyDenied):
        gate.release(torch.ones(1, 2, 3), at="cut", records=["a"])
    gate.received()
    gate.release(torch.ones(1, 2, 3), at="cut", records=["a"])


def test_a_frozen_a_takes_nothing_from_others(policy_of, ledger):
    state = ["start"]
    gate = Gate(policy_of(), ledger, state=lambda: state[0])
    gate.received()
    state[0] = "handed over"
    with pytest.raises(PolicyDenied) as caught:
        gate.received()
    assert caught.value.code == "SS-2014"


def test_nobody_else_makes_what_may_be_handed_over():
    with pytest.raises(TypeError):
        ReleasedCommon(payload=b"", mint=object())
