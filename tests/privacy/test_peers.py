"""What a shared C generates elsewhere is paid for here, before it is shared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from securesplit.errors import BudgetExhausted
from securesplit.policy.load import load_policy
from securesplit.privacy.gate import Gate
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.plan import plan_for

ROOT = Path(__file__).parents[2]
ROSTER = ("alice", "bob", "carol")


@pytest.fixture
def site(tmp_path):
    policy = load_policy(ROOT / "policies" / "balanced.toml")
    ledger = Ledger(tmp_path / "ledger")
    yield policy, ledger, plan_for(policy.privacy)
    ledger.close()


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


def test_a_policy_without_generation_reserves_nothing(tmp_path):
    policy = load_policy(ROOT / "policies" / "strict.toml")
    ledger = Ledger(tmp_path / "ledger")
    share(Gate(policy, ledger, roster=ROSTER))
    assert ledger.mu() == 0
    ledger.close()
