"""A purse by itself: prices, names and answers. What peers may spend is in test_peers.py, the gate's use of it in test_gate.py."""

from __future__ import annotations

import pytest

from securesplit.errors import BudgetExhausted
from securesplit.privacy.ledger import ALL
from securesplit.privacy.plan import plan_for
from securesplit.privacy.purse import Purse


@pytest.fixture
def purse_of(policy_of, ledger):
    def make(roster=(), **options) -> Purse:
        policy = policy_of(**options)
        return Purse(ledger, policy, plan_for(policy.privacy), roster)

    return make


def test_a_price_is_the_plans_whole_price_and_says_what_it_is_for(purse_of, policy_of):
    purse, policy = purse_of(), policy_of()
    channel = plan_for(policy.privacy).cut
    charge = purse.priced("a record", "cut", channel, version="name", payload=b"rows")
    assert (charge.record, charge.channel, charge.version, charge.payload) == ("a record", "cut", "name", b"rows")
    assert (charge.units, charge.clip, charge.sigma) == (channel.units, channel.clip, channel.sigma)
    assert (charge.unit, charge.policy) == ("sequence", policy.digest)


def test_what_was_paid_under_a_name_comes_back_and_nothing_else_does(purse_of, ledger):
    purse = purse_of(activations=(1.0, 0.4, 2))
    channel = purse._plan.cut
    assert purse.pay([purse.priced("r", "cut", channel, version="n", payload=b"first")], "cut", channel) == (b"first",)
    spent = ledger.mu()
    assert purse.pay([purse.priced("r", "cut", channel, version="n", payload=b"second")], "cut", channel) == (b"first",)
    assert ledger.mu() == spent
    assert purse.recall("r", "cut", "n") == b"first"
    assert [purse.recall(*other) for other in (("r", "cut", "m"), ("q", "cut", "n"), ("r", "decode", "n"))] == [
        None
    ] * 3


def test_a_record_has_its_channels_number_of_releases_and_no_more(purse_of):
    purse = purse_of(activations=(1.0, 0.4, 2))
    channel = purse._plan.cut
    purse.require(2, "cut", channel)
    with pytest.raises(BudgetExhausted, match=r"SS-500[12]"):
        purse.require(3, "cut", channel)
    for _ in range(2):
        purse.pay([purse.priced(ALL, "cut", channel)], "cut", channel)
    with pytest.raises(BudgetExhausted, match=r"SS-500[12]"):
        purse.pay([purse.priced(ALL, "cut", channel)], "cut", channel)


def test_names_depend_on_the_moment_the_matter_the_content_and_the_site(purse_of):
    purse = purse_of()
    names = {purse.name(*about) for about in (("a", "b", b"c"), ("x", "b", b"c"), ("a", "x", b"c"), ("a", "b", b"x"))}
    assert len(names) == 4
    assert purse.name("a", "b", b"c") == purse.name("a", "b", b"c")


def test_an_answer_is_drawn_and_paid_once(purse_of, ledger):
    purse = purse_of(regime="step", labels=(0.2, 4), updates=(1.0, 0.3, 1))
    labels = purse._plan.labels
    assert purse.pay_answers([3, 1], labels, records=["r", "s"], contents=["x", "x"]) == ((3, 1), (labels.units,) * 2)
    spent = ledger.spent_units()
    assert purse.pay_answers([0, 2], labels, records=["r", "t"], contents=["x", "x"]) == ((3, 2), (labels.units,))
    assert ledger.spent_units() == spent, "the worst record has paid for one answer still"
