"""Releases come only from states that public and noised values shaped; a new state is new noise and a new charge."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from securesplit.errors import PolicyDenied
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.gate import Gate
from securesplit.privacy.lattice import step_for
from securesplit.privacy.lineage import Lineage
from securesplit.privacy.plan import plan_for
from tests.privacy.released import ROUND, STEP, values


class State:
    """The name of the weights, which a test changes."""

    def __init__(self) -> None:
        self.name = "start"

    def __call__(self) -> str:
        return self.name


@pytest.fixture
def state() -> State:
    return State()


def noised(gate, record="moving"):
    plan = plan_for(gate.policy.privacy).update
    total = ClippedSum(3, plan.clip, step_for(plan.sigma))
    total.add(torch.ones(3), record)
    return gate.release_update(total)


def one(gate, at="cut"):
    return values(gate.release(torch.ones(1, 2, 3), at=at, records=["a"]))


def refused(ledger, call, code="SS-2014"):
    before = ledger.head()
    with pytest.raises(PolicyDenied) as caught:
        call()
    assert caught.value.code == code
    assert caught.value.exit_code == 3
    assert ledger.head() == before


def test_a_lineage_holds_its_start_and_what_was_added():
    lineage = Lineage("start")
    lineage.require("start")
    with pytest.raises(PolicyDenied) as caught:
        lineage.require("elsewhere")
    assert caught.value.code == "SS-2014"
    assert "elsewhere" not in str(caught.value), "a digest of trained weights is no message"
    lineage.extend("elsewhere")
    lineage.require("elsewhere")
    lineage.require("start")


def test_a_state_outside_of_the_lineage_releases_nothing_on_any_channel(policy_of, ledger, state):
    gate = Gate(policy_of(**ROUND), ledger, state=state)
    one(gate)
    state.name = "a clean gradient step"
    for at in ("cut", "gradient", "decode"):
        refused(ledger, lambda at=at: one(gate, at))  # At the cut not even what was released before.


def test_back_in_a_sound_state_the_same_bytes_go_out_again(policy_of, ledger, state):
    gate = Gate(policy_of(**ROUND), ledger, state=state)
    first = one(gate)
    state.name = "elsewhere"
    refused(ledger, lambda: one(gate))
    state.name, head = "start", ledger.head()
    assert np.array_equal(one(gate), first)
    assert ledger.head() == head


def test_a_noised_update_moves_the_lineage_and_what_comes_then_is_drawn_and_paid_anew(policy_of, ledger, state):
    policy = policy_of(**(ROUND | {"activations": (1.0, 0.4, 2)}))
    gate, plan = Gate(policy, ledger, state=state), plan_for(policy.privacy)
    first = one(gate)
    update = noised(gate)
    state.name = "after the round"
    refused(ledger, lambda: one(gate))  # Not before the gate is told what moved it.
    gate.moved(update)
    second = one(gate)
    assert not (first == second).any()
    assert ledger.spent_units("a", ("cut",)) == 2 * plan.cut.units
    assert np.array_equal(one(gate), second)


def test_an_update_without_noise_moves_no_lineage(policy_of, ledger, state):
    gate = Gate(policy_of(), ledger, state=state)
    bare = gate.release_update(np.ones(3))
    assert not bare.noised
    gate.moved(bare)  # C alone has moved, and the state is A's.
    state.name = "A moved"
    refused(ledger, lambda: gate.moved(bare))
    refused(ledger, lambda: one(gate))


def test_in_frozen_not_even_a_noised_update_moves_a(policy_of, ledger, state):
    """The sum is C's. What moved A was something else, and its noise is not known."""
    gate = Gate(policy_of(updates=(3.0, 0.2, 4)), ledger, state=state)
    update = gate.release_update(np.ones(3))
    assert update.noised
    gate.moved(update)
    state.name = "A moved"
    refused(ledger, lambda: gate.moved(update))
    refused(ledger, lambda: gate.restored(gate.policy.digest))
    refused(ledger, lambda: one(gate))


def test_adapters_of_another_policy_are_not_restored(policy_of, ledger, state):
    gate = Gate(policy_of(**ROUND), ledger, state=state)
    state.name = "restored"
    for other in ("", policy_of().digest, policy_of(epsilon=None).digest):
        refused(ledger, lambda other=other: gate.restored(other), "SS-2013")
    refused(ledger, lambda: one(gate))
    gate.restored(gate.policy.digest)
    one(gate)


def test_an_unsafe_gate_restores_only_what_learnt_without_privacy(policy_of):
    gate = Gate(policy_of(epsilon=None), None)
    with pytest.raises(PolicyDenied) as caught:
        gate.restored(policy_of().digest)
    assert caught.value.code == "SS-2013"
    gate.restored(gate.policy.digest)


def test_without_privacy_any_state_releases(policy_of, state):
    gate = Gate(policy_of(epsilon=None), None, state=state)
    state.name = "anything"
    assert values(gate.release(torch.ones(1, 2, 3), at="cut")).tolist() == torch.ones(1, 2, 3).tolist()
    gate.moved(gate.release_update(np.ones(3)))


def test_a_gate_starts_in_the_state_it_was_made_in(policy_of, ledger, state):
    state.name = "of today"
    gate = Gate(policy_of(), ledger, state=state)
    one(gate)
    state.name = "start"
    refused(ledger, lambda: one(gate))


# ---- regime step -----------------------------------------------------------------------------------------------------


def test_in_step_every_noised_sum_is_a_state_and_the_difference_is_free(policy_of, ledger, state):
    gate = Gate(policy_of(**STEP), ledger, state=state)
    for number in range(3):
        one(gate)
        update = noised(gate)
        state.name = f"step {number}"
        gate.moved(update)
    head = ledger.head()
    path = gate.release_update(np.arange(3.0))
    assert (path.vector.tolist(), path.noised) == ([0.0, 1.0, 2.0], True)
    assert ledger.head() == head
    gate.moved(path)
    assert [e.channel for e in ledger.entries()] == ["cut", "update"] * 3


def test_in_step_a_difference_to_an_unsound_state_does_not_leave(policy_of, ledger, state):
    gate = Gate(policy_of(**STEP), ledger, state=state)
    state.name = "a step that was not noised"
    refused(ledger, lambda: gate.release_update(np.arange(3.0)))


def test_in_round_no_plain_difference_leaves_from_any_state(policy_of, ledger, state):
    gate = Gate(policy_of(**ROUND), ledger, state=state)
    for name in ("start", "elsewhere"):
        state.name = name
        refused(ledger, lambda: gate.release_update(np.arange(3.0)), "SS-2011")
