"""What a shared C generates elsewhere is paid for here, before it is shared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from securesplit.errors import BudgetExhausted
from securesplit.policy.load import load_policy
from securesplit.privacy.gate import Gate
from securesplit.privacy.ledger import ALL
from securesplit.privacy.plan import plan_for

ROOT = Path(__file__).parents[2]
ROSTER = ("alice", "bob", "carol")


@pytest.fixture
def site(ledger):
    policy = load_policy(ROOT / "policies" / "balanced.toml")
    return policy, ledger, plan_for(policy.privacy)


def share(gate):
    """What joining a blind sum costs: the reserve for the peers."""
    return gate.release_update(np.zeros(4))


def test_all_sites_together_stay_within_the_channel(site):
    policy, ledger, plan = site
    gate = Gate(policy, ledger, roster=ROSTER)
    share(gate)
    own = plan.decode.releases // 3
    gate.require(own, at="decode")
    with pytest.raises(BudgetExhausted, match="release"):
        gate.require(own + 1, at="decode")
    reserved = round(ledger.mu("x") ** 2 * 2**40)
    assert abs(reserved - 2 * own * plan.decode.units) <= 1
    # Three sites that each reserve for two peers and spend their own part: no record pays more than the channel's share.
    assert reserved + own * plan.decode.units <= plan.decode.releases * plan.decode.units


def test_the_reserve_is_paid_once_per_roster(site):
    policy, ledger, _ = site
    share(Gate(policy, ledger, roster=ROSTER))
    once = ledger.mu()
    share(Gate(policy, ledger, roster=tuple(reversed(ROSTER))))
    assert ledger.mu() == once
    share(Gate(policy, ledger, roster=("alice", "bob", "dave")))
    assert ledger.mu() > once


def test_other_peers_can_exhaust_the_budget_before_anything_is_shared(site):
    policy, ledger, _ = site
    gate = Gate(policy, ledger, roster=ROSTER)
    gate.release(torch.ones(1, 16, 4), at="cut", records=[ledger.key(b"one")])
    share(gate)
    with pytest.raises(BudgetExhausted):
        share(Gate(policy, ledger, roster=("alice", "dave", "erin")))


def test_a_smaller_roster_later_does_not_enlarge_this_sites_part(site):
    policy, ledger, plan = site
    share(Gate(policy, ledger, roster=[f"site-{i}" for i in range(20)]))
    small = Gate(policy, ledger, roster=ROSTER)
    small.require(plan.decode.releases // 20, at="decode")
    with pytest.raises(BudgetExhausted):
        small.require(plan.decode.releases // 20 + 1, at="decode")


def test_a_policy_without_generation_reserves_nothing(ledger):
    policy = load_policy(ROOT / "policies" / "strict.toml")
    share(Gate(policy, ledger, roster=ROSTER))
    assert [(e.channel, e.units) for e in ledger.entries()] == [("bare", 1)]


def test_the_reserve_comes_before_the_first_release_and_is_one_entry_for_all(site):
    policy, ledger, plan = site
    gate = Gate(policy, ledger, roster=ROSTER)
    gate.reserve_for_peers()
    gate.reserve_for_peers()
    assert [(e.record, e.channel, e.units) for e in ledger.entries()] == [
        (ALL, "peers", 2 * (plan.decode.releases // 3) * plan.decode.units)
    ]


def test_nobody_reserves_for_oneself(site):
    policy, ledger, plan = site
    for roster in ((), ("alice",)):
        gate = Gate(policy, ledger, roster=roster)
        gate.reserve_for_peers()
        gate.require(plan.decode.releases, at="decode")
    assert ledger.mu() == 0


@pytest.mark.parametrize("odd", [("alice", "bob", "carol|dave"), ("alice", "bob|carol|dave", "erin")])
def test_a_name_cannot_pass_for_two(site, odd):
    """The roster is the server's; one that is written like another must not share its reserve."""
    policy, ledger, plan = site
    Gate(policy, ledger, roster=odd).reserve_for_peers()
    roster = sorted("|".join(odd).split("|"))
    before = ledger.spent_units()
    try:
        Gate(policy, ledger, roster=roster).reserve_for_peers()
    except BudgetExhausted:
        return  # Nothing can be shared then, which is as good.
    paid = ledger.spent_units() - before
    assert paid == (len(roster) - 1) * (plan.decode.releases // len(roster)) * plan.decode.units


def test_noised_updates_need_no_reserve(policy_of, ledger):
    policy = policy_of(updates=(3.0, 0.2, 4), generation=(1.0, 0.4, 30))
    gate, plan = Gate(policy, ledger, roster=ROSTER), plan_for(policy.privacy)
    assert share(gate).noised
    assert [(e.record, e.channel, e.units) for e in ledger.entries()] == [(ALL, "update", plan.update.units)]
