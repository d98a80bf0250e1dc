"""What a shared C generates elsewhere is paid for here, before it is shared."""

from __future__ import annotations

from pathlib import Path

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


def test_all_sites_together_stay_within_the_channel(site):
    policy, ledger, plan = site
    gate = Gate(policy, ledger, sites=3)
    gate.reserve_for_peers(ROSTER)
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
    Gate(policy, ledger, sites=3).reserve_for_peers(ROSTER)
    once = ledger.mu()
    Gate(policy, ledger, sites=3).reserve_for_peers(tuple(reversed(ROSTER)))
    assert ledger.mu() == once
    Gate(policy, ledger, sites=3).reserve_for_peers(("alice", "bob", "dave"))
    assert ledger.mu() > once


def test_other_peers_can_exhaust_the_budget_before_anything_is_shared(site):
    policy, ledger, _ = site
    gate = Gate(policy, ledger, sites=3)
    gate.release(torch.ones(1, 16, 4), at="cut", records=[ledger.key(b"one")])
    gate.reserve_for_peers(ROSTER)
    with pytest.raises(BudgetExhausted):
        gate.reserve_for_peers(("alice", "dave", "erin"))


def test_a_policy_without_generation_reserves_nothing(tmp_path):
    policy = load_policy(ROOT / "policies" / "strict.toml")
    ledger = Ledger(tmp_path / "ledger")
    Gate(policy, ledger, sites=3).reserve_for_peers(ROSTER)
    assert ledger.mu() == 0
    ledger.close()
