"""What one unit of privacy can move, in whole lattice steps: found by brute force on the release path, not by the formula."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from securesplit.errors import BudgetExhausted
from securesplit.privacy import mechanism
from securesplit.privacy.gate import Gate
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.plan import UNITS, plan_for, rows_moved
from tests.privacy.released import ROUND, silence, values

ROWS, WIDTH = 4, 3
NOISE = 256**2 * (1 + 64**2 + 64**4)  # Variance of the noise on every channel, in steps^2.
SIZES = st.sampled_from([0.0, 1e-30, 0.3, 0.99999, 1.0, 1.00001, 7.5, 1e30])
DIRECTIONS = st.sampled_from([(1, 0, 0), (-1, 0, 0), (0, 1, 0), (1, 1, 1), (-1, -1, -1), (3, -4, 0), (1e-3, -1, 1e-6)])
ROW = st.tuples(SIZES, DIRECTIONS).map(lambda p: [p[0] * x / math.hypot(*p[1]) for x in p[1]])
MATRIX = st.lists(ROW, min_size=ROWS, max_size=ROWS)


@pytest.fixture
def steps_of(tmp_path, monkeypatch):
    """``steps_of(policy, hidden, at, front)``: what the gate puts on the lattice, as exact integers, before the noise."""
    seen = []

    def recording(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    real = mechanism.quantise_like
    monkeypatch.setattr(mechanism, "quantise_like", recording)
    silence(monkeypatch)
    ledger = Ledger(tmp_path / "unit", anchors=tmp_path / "anchors")

    def run(policy, hidden, at="cut", front=0):
        monkeypatch.setattr(Ledger, "charge", lambda _self, charges, **_: tuple(c.payload for c in charges))
        seen.clear()
        gate = Gate(policy, ledger, front=front)
        gate.release(torch.tensor([hidden], dtype=torch.float64), at=at, records=["a"], memoise=False)
        return np.concatenate([np.asarray(part).ravel() for part in seen]).astype(object)

    yield run
    ledger.close()


def squared_distance(one, other) -> int:
    return int(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)))


def pays(units: int, distance: int) -> bool:
    """Whether a charge covers integer neighbours this far apart: mu^2 = distance^2 / sigma^2, in exact numbers."""
    return Fraction(distance, NOISE) <= Fraction(units, UNITS)


PATIENT = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@given(one=MATRIX, other=MATRIX)
@PATIENT
def test_unit_sequence_any_record_for_any_other(policy_of, steps_of, one, other):
    policy = policy_of(**ROUND)
    for at in ("cut", "gradient", "decode"):
        plan = plan_for(policy.privacy).channel(at)
        scaled = [[[x * plan.clip for x in row] for row in hidden] for hidden in (one, other)]
        assert pays(plan.units, squared_distance(*(steps_of(policy, hidden, at) for hidden in scaled)))


@given(one=MATRIX, row=ROW, place=st.integers(0, ROWS - 1))
@PATIENT
def test_unit_token_at_an_embedding_one_row_moves(policy_of, steps_of, one, row, place):
    policy = policy_of(unit="token")
    plan = plan_for(policy.privacy, rows=1).cut
    other = [row if i == place else kept for i, kept in enumerate(one)]
    assert pays(plan.units, squared_distance(steps_of(policy, one), steps_of(policy, other)))


@given(one=MATRIX, other=MATRIX, place=st.integers(0, ROWS - 1))
@PATIENT
def test_unit_token_after_attention_all_later_rows_move(policy_of, steps_of, one, other, place):
    """A causal A: the token at ``place`` changes its row and every row after it, to anything."""
    policy = policy_of(unit="token", buckets=(2, ROWS))
    plan = plan_for(policy.privacy, rows=ROWS).cut
    moved = one[:place] + other[place:]
    found = [steps_of(policy, hidden, front=1) for hidden in (one, moved)]
    assert pays(plan.units, squared_distance(*found))


@pytest.mark.parametrize(("unit", "front", "rows"), [("sequence", 2, 1), ("user", 2, 1), ("token", 0, 1), ("token", 2, ROWS)])  # fmt: skip
def test_the_worst_neighbours_are_what_is_charged_for(policy_of, steps_of, unit, front, rows):
    """The bound is reached: sigma is no larger than it must be, and a smaller one would be a false claim."""
    policy = policy_of(unit=unit)
    plan = plan_for(policy.privacy, rows=ROWS if front else 1).cut
    hidden = np.zeros((ROWS, WIDTH))
    hidden[:rows, 1] = 100.0
    distance = squared_distance(*(steps_of(policy, (sign * hidden).tolist(), front=front) for sign in (1, -1)))
    assert pays(plan.units, distance)
    assert not pays(math.floor(plan.units * (1 - 1e-4)), distance)


def test_rows_that_a_token_moves():
    assert rows_moved(0, (16, 512)) == 1
    assert rows_moved(1, (16, 512)) == rows_moved(30, (16, 512)) == 512
    assert rows_moved(1, (7,)) == 7


def test_the_sensitivity_of_every_channel_by_unit(policy_of):
    for unit, cut in (("sequence", 2.0), ("user", 2.0), ("token", 2.0 * 9**0.5)):
        plan = plan_for(policy_of(unit=unit, **ROUND).privacy, rows=9)
        found = [plan.channel(at).sensitivity for at in ("cut", "gradient", "decode", "update")]
        assert found == [cut, 4.0, 1.0, 6.0], unit  # A generated token's row is one; a gradient is clipped whole.
    with pytest.raises(ValueError, match="rows"):
        plan_for(policy_of(unit="token").privacy)


def test_a_tensor_longer_than_what_was_counted_does_not_leave_under_unit_token(policy_of, ledger):
    gate = Gate(policy_of(unit="token", buckets=(2, ROWS)), ledger, front=1)
    with pytest.raises(ValueError, match="longest public length"):
        gate.release(torch.ones(1, ROWS + 1, WIDTH), at="cut", records=["a"])
    assert list(ledger.entries()) == []
    gate.release(torch.ones(1, ROWS, WIDTH), at="cut", records=["a"])


def test_several_generated_rows_at_once_are_clipped_as_one_under_unit_token(policy_of, steps_of):
    """One token of the record may move all of them, and 2 C is charged."""
    policy = policy_of(unit="token", generation=(0.5, 0.2, 4))
    plan = plan_for(policy.privacy, rows=1).decode
    hidden = np.full((ROWS, WIDTH), 100.0)
    assert pays(plan.units, squared_distance(*(steps_of(policy, (s * hidden).tolist(), "decode") for s in (1, -1))))


def test_rows_are_clipped_and_lifted_one_by_one_under_unit_token(policy_of, ledger, fixed_noise):
    policy = policy_of(unit="token", epsilon=4.0, buckets=(400,))
    gate = Gate(policy, ledger, front=0)
    hidden = torch.ones(1, 400, 50)
    hidden[0, 1] *= 1e6
    hidden[0, 2] = 0.0
    released = gate.release(hidden, at="cut", records=["a"])
    norms = np.linalg.norm(released.graph[0].numpy(), axis=1)
    assert norms.max() <= 1.0
    assert (norms[0], norms[1], norms[2]) == (pytest.approx(1.0), pytest.approx(1.0), 0.0)
    lifted = np.linalg.norm(values(released)[0] * released.gain, axis=1)
    assert lifted.mean() == pytest.approx(1.0, rel=0.05)


# ---- whose budget ----------------------------------------------------------------------------------------------------


def test_the_records_of_one_user_add_up_under_one_key(policy_of, ledger):
    policy = policy_of(unit="user", activations=(1.0, 0.9, 3))
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    sent = values(gate.release(torch.ones(3, 2, 3), at="cut", records=["ann", "bea", "ann"], contents=["x", "y", "z"]))
    assert not (sent[0] == sent[2]).any(), "two records of one user are two releases"
    assert ledger.spent_units("ann") == 2 * plan.cut.units
    assert ledger.spent_units("bea") == plan.cut.units
    gate.release(torch.ones(1, 2, 3), at="cut", records=["ann"], contents=["x"])  # Remembered, as under any unit.
    gate.release(torch.ones(1, 2, 3), at="cut", records=["ann"], contents=["w"])
    with pytest.raises(BudgetExhausted):
        gate.release(torch.ones(1, 2, 3), at="cut", records=["ann"], contents=["v"])
    assert ledger.spent_units("ann") == 3 * plan.cut.units


def test_under_unit_user_a_memory_needs_to_know_which_record_it_is(policy_of, ledger):
    """Without contents two records of one user would be taken for one, and the second would be sent as the first."""
    gate = Gate(policy_of(unit="user", activations=(1.0, 0.9, 3)), ledger)
    with pytest.raises(ValueError, match="contents"):
        gate.release(torch.ones(2, 2, 3), at="cut", records=["ann", "ann"])
    assert list(ledger.entries()) == []
    gate.release(torch.ones(2, 2, 3), at="cut", records=["ann", "ann"], memoise=False)
