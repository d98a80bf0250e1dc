"""Updates on their way into a secure sum: what one unit moves, in exact integers; and the policy without privacy."""

from __future__ import annotations

import logging
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from securesplit.errors import BudgetExhausted, CheckFailed, PolicyDenied
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.gate import Gate
from securesplit.privacy.lattice import step_for
from securesplit.privacy.ledger import ALL
from securesplit.privacy.plan import UNITS, plan_for
from tests.privacy.released import ROUND, silence, values

NOISE = 256**2 * (1 + 64**2 + 64**4)  # Variance of the noise, in steps^2.


def sum_of(plan, gradients, *, bound=None, step=None):
    update = plan.update
    total = ClippedSum(gradients.shape[1], bound or update.clip, step or step_for(update.sigma))
    for i, gradient in enumerate(gradients):
        total.add(gradient, f"r{i}")
    return total


# ---- the sum ---------------------------------------------------------------------------------------------------------

NUMBER = st.one_of(
    st.floats(-10, 10), st.sampled_from([0.0, 1e-300, 1e30, -1e30, 1e300, float("nan"), float("inf"), -float("inf")])
)
GRADIENT = st.lists(NUMBER, min_size=4, max_size=4)


@given(
    shared=st.lists(GRADIENT, max_size=4), one=GRADIENT, other=GRADIENT, bound=st.floats(1e-3, 1e3),
    ratio=st.floats(1e-6, 2.0),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_replacing_one_unit_moves_the_sum_by_at_most_2c_in_whole_steps(shared, one, other, bound, ratio):
    step, sums = bound * ratio, []
    for gradient in (one, other):
        total = ClippedSum(4, bound, step)
        for i, kept in enumerate([*shared, gradient]):
            total.add(torch.tensor(kept, dtype=torch.float64), str(i))
        assert total.steps.dtype == np.int64
        sums.append([int(n) for n in total.steps])
    distance = sum((a - b) ** 2 for a, b in zip(*sums, strict=True))
    assert distance <= (2 * Fraction(bound) / Fraction(step)) ** 2


def test_the_bound_is_reached_and_is_what_is_charged_for(policy_of):
    plan = plan_for(policy_of(**ROUND).privacy)
    gradient = torch.tensor([[100.0, 0.0, 0.0]])
    one, other = (sum_of(plan, sign * gradient).steps for sign in (1, -1))
    mu_squared = Fraction(int(((one - other).astype(object) ** 2).sum()), NOISE)
    charged = Fraction(plan.update.units, UNITS)
    assert charged * Fraction(9999, 10000) < mu_squared <= charged


def test_rounding_part_by_part_is_what_bounds_the_sum():
    """A thousand parts of just under one step each are a thousand times nothing, not a sum that is rounded at the end."""
    total = ClippedSum(1, 1.0, 0.01)
    for i in range(1000):
        total.add(torch.tensor([0.0099]), str(i))
    assert total.steps.tolist() == [0]


def test_a_unit_enters_a_sum_once_and_nothing_that_is_no_number_enters(policy_of):
    total = sum_of(plan_for(policy_of(**ROUND).privacy), torch.ones(2, 4))
    with pytest.raises(ValueError, match="once"):
        total.add(torch.ones(4), "r1")
    before = total.steps.copy()
    for i, bad in enumerate((math.nan, math.inf, -math.inf)):
        total.add(torch.tensor([1.0, bad, 0.0, 0.0]), f"bad{i}")  # Counts as zero, and pays like the others.
    assert total.steps.tolist() == before.tolist()
    assert total.records == ["r0", "r1", "bad0", "bad1", "bad2"]


def test_a_users_records_are_one_unit(policy_of, ledger):
    """Added up before the clip they move the sum by 2 C and pay once; one by one the sum refuses the second."""
    policy = policy_of(unit="user", **ROUND)
    plan = plan_for(policy.privacy)
    total = ClippedSum(3, plan.update.clip, step_for(plan.update.sigma))
    total.add(torch.ones(3) * 50 + torch.ones(3) * 50, "ann")
    assert np.linalg.norm(total.steps * total.step) == pytest.approx(plan.update.clip, rel=1e-4)
    Gate(policy, ledger).release_update(total)
    assert [(e.record, e.units) for e in ledger.entries()] == [("ann", plan.update.units)]


# ---- regime round ----------------------------------------------------------------------------------------------------


def test_a_sum_is_noised_on_the_lattice_and_charged_to_each_record(policy_of, ledger, fixed_noise):
    policy = policy_of(**ROUND)
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    total = sum_of(plan, torch.ones(3, 5000))
    released = gate.release_update(total)
    assert released.noised
    assert [(e.record, e.channel, e.units) for e in ledger.entries()] == [
        (f"r{i}", "update", plan.update.units) for i in range(3)
    ]
    steps = np.rint(released.vector / total.step)
    assert np.array_equal(steps * total.step, released.vector)
    residual = (steps - total.steps) / math.sqrt(NOISE)
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], 5000)
    assert low < np.square(residual).sum() < high
    assert stats.kstest(residual, "norm").pvalue > 1e-4


def test_the_same_sum_twice_is_drawn_and_paid_twice(policy_of, ledger):
    policy = policy_of(**ROUND)
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    total = sum_of(plan, torch.ones(1, 50))
    first, second = (gate.release_update(total).vector for _ in "12")
    assert (first != second).mean() > 0.9
    assert ledger.spent_units("r0") == 2 * plan.update.units
    with pytest.raises(BudgetExhausted):
        gate.release_update(total)
    assert ledger.spent_units("r0") == 2 * plan.update.units


def test_one_exhausted_record_keeps_a_whole_sum_back(policy_of, ledger):
    policy = policy_of(**ROUND)
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    for _ in range(2):
        gate.release_update(sum_of(plan, torch.ones(1, 4)))
    with pytest.raises(BudgetExhausted):
        gate.release_update(sum_of(plan, torch.ones(2, 4)))
    assert ledger.spent_units("r1") == 0


def test_plain_updates_and_sums_made_otherwise_are_refused(policy_of, ledger):
    policy = policy_of(**ROUND)
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    one, step = torch.ones(1, 4), step_for(plan.update.sigma)
    for update, code in (
        (np.ones(4), "SS-2011"),
        (sum_of(plan, one, bound=3.1), "SS-2010"),
        (sum_of(plan, one, step=step * 2), "SS-2010"),
        (sum_of(plan, one, step=math.nextafter(step, 0)), "SS-2010"),
    ):
        with pytest.raises(PolicyDenied) as caught:
            gate.release_update(update)
        assert caught.value.code == code
    assert ledger.summary() == ()


# ---- regime frozen ---------------------------------------------------------------------------------------------------


def test_frozen_lets_plain_updates_into_its_blind_sum(policy_of, ledger):
    policy = policy_of()
    gate = Gate(policy, ledger)
    released = gate.release_update(np.arange(4.0))
    assert (released.vector.tolist(), released.noised) == ([0.0, 1.0, 2.0, 3.0], False)
    with pytest.raises(PolicyDenied) as caught:
        gate.release_update(ClippedSum(4, 1.0, 1.0))
    assert caught.value.code == "SS-2010"
    assert gate.release_update(np.array([1.0, np.nan])).vector.tolist() == [0.0, 0.0]
    # One entry, of the smallest cost, says that from here on no epsilon holds against the other clients.
    assert [(e.record, e.channel, e.units) for e in ledger.entries()] == [(ALL, "bare", 1)]


def test_frozen_without_a_blind_sum_lets_nothing_bare_out(policy_of, ledger):
    policy = policy_of()
    seen = policy.model_copy(update={"aggregation": policy.aggregation.model_copy(update={"blind": False})})
    with pytest.raises(PolicyDenied) as caught:
        Gate(seen, ledger).release_update(np.ones(4))
    assert caught.value.code == "SS-2011"


@pytest.mark.parametrize("blind", [True, False])
def test_frozen_with_a_channel_clips_noises_and_charges_the_whole_update_to_all(
    policy_of, ledger, fixed_noise, monkeypatch, blind
):
    policy = policy_of(updates=(3.0, 0.2, 2), generation=(1.0, 0.4, 30), blind=blind)
    gate, plan = Gate(policy, ledger, roster=("alice", "bob", "carol")), plan_for(policy.privacy)
    with monkeypatch.context() as patch:
        silence(patch)
        clipped = gate.release_update(np.full(4000, 100.0)).vector
    assert plan.update.clip * 0.999 < np.linalg.norm(clipped) <= plan.update.clip * (1 + 1e-12)
    released = gate.release_update(np.full(4000, 100.0))
    assert released.noised
    residual = (released.vector - clipped) / plan.update.sigma
    assert stats.kstest(residual, "norm").pvalue > 1e-4
    # To all records, because each may have moved all of it; and nothing for peers, who get noised values.
    assert [(e.record, e.channel, e.units) for e in ledger.entries()] == [(ALL, "update", plan.update.units)] * 2
    with pytest.raises(BudgetExhausted):
        gate.release_update(np.zeros(4000))


def test_frozen_with_a_channel_an_overflow_counts_as_zero_and_pays(policy_of, ledger, monkeypatch):
    silence(monkeypatch)
    gate = Gate(policy_of(updates=(3.0, 0.2, 2)), ledger)
    assert not gate.release_update(np.array([1.0, np.inf])).vector.any()
    assert [(e.record, e.channel) for e in ledger.entries()] == [(ALL, "update")]


# ---- without privacy -------------------------------------------------------------------------------------------------


def test_the_unsafe_policy_says_so_and_sends_exactly_the_tensor(policy_of, caplog):
    with caplog.at_level(logging.WARNING):
        gate = Gate(policy_of(epsilon=None), None)
    assert "UnsafeNoPrivacy" in caplog.text
    hidden = torch.randn(2, 3, 4) * 1e6
    for at in ("cut", "gradient", "decode"):
        assert np.array_equal(values(gate.release(hidden, at=at, records=["a", "a"])), hidden.numpy())
    gate.require(10**9, at="decode")
    gate.reserve_for_peers()
    released = gate.release_update(np.ones(3))
    assert (released.vector.tolist(), released.noised) == ([1.0] * 3, False)
    with pytest.raises(AssertionError):  # Nothing is clipped there, so nobody makes such a sum.
        gate.release_update(ClippedSum(4, 1.0, 1.0))
    with pytest.raises(CheckFailed) as caught:
        gate.release(torch.full((1, 1, 1), float("inf")), at="cut")
    assert caught.value.code == "SS-1510"


def test_a_gradient_that_overflowed_leaves_as_zero_and_pays(policy_of, ledger, monkeypatch):
    # Stopping would tell the server, whose answer provoked it, for whose record it happened.
    silence(monkeypatch)
    gate = Gate(policy_of(**ROUND), ledger)
    rows = torch.ones(2, 2, 4)
    rows[1, 0, 0] = float("nan")
    sent = values(gate.release(rows, at="gradient", records=["a", "b"], memoise=False))
    assert np.abs(sent[0]).max() > 0
    assert not sent[1].any()
    assert [(s.channel, s.releases) for s in ledger.summary()] == [("gradient", 2)]
