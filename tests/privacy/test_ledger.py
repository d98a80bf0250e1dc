"""No order of charges spends more of a record than its budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import BudgetExhausted, PolicyDenied
from securesplit.privacy.ledger import ALL, Charge, Ledger
from securesplit.privacy.plan import UNITS

CHARGE = Charge(record="r", channel="cut", units=10, clip=1.0, sigma=2.0, policy="p")


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path / "ledger")
    yield opened
    opened.close()


def pay(ledger, *charges, budget=100, cap=1000):
    ledger.charge(charges, budget=budget, caps=[cap] * len(charges))


def test_the_entry_that_would_exceed_the_budget_is_refused_and_no_other(ledger):
    for _ in range(10):
        pay(ledger, CHARGE)
    with pytest.raises(BudgetExhausted) as caught:
        pay(ledger, replace(CHARGE, units=1))
    assert caught.value.code == "SS-5001"
    assert caught.value.exit_code == 6
    assert ledger.mu("r") == pytest.approx((100 / UNITS) ** 0.5)
    pay(ledger, replace(CHARGE, record="other"))  # another record's life has its own budget


def test_the_release_over_the_cap_is_refused_and_no_other(ledger):
    for _ in range(3):
        pay(ledger, CHARGE, cap=3)
    with pytest.raises(BudgetExhausted) as caught:
        pay(ledger, CHARGE, cap=3)
    assert caught.value.code == "SS-5002"
    pay(ledger, replace(CHARGE, channel="gradient"), cap=3)  # another channel counts for itself


def test_a_group_is_paid_whole_or_not_at_all(ledger):
    before = ledger.head()
    with pytest.raises(BudgetExhausted):
        pay(ledger, *[CHARGE] * 11)  # the first ten would have fitted
    with pytest.raises(BudgetExhausted):
        pay(ledger, replace(CHARGE, record="a"), replace(CHARGE, record="b"), replace(CHARGE, record="a"), cap=1)
    assert ledger.head() == before
    assert ledger.spent_units() == 0
    assert ledger.summary() == ()


def test_a_charge_to_all_counts_against_every_record_and_every_record_against_it(ledger):
    pay(ledger, replace(CHARGE, units=40))
    pay(ledger, replace(CHARGE, record=ALL, units=50))
    assert ledger.spent_units() == 90
    with pytest.raises(BudgetExhausted):
        pay(ledger, replace(CHARGE, units=11))  # 40 + 50 + 11
    with pytest.raises(BudgetExhausted):
        pay(ledger, replace(CHARGE, record="never seen", units=51))  # 50 + 51
    with pytest.raises(BudgetExhausted):
        pay(ledger, replace(CHARGE, record=ALL, units=11))  # record r would have 40 + 61
    pay(ledger, replace(CHARGE, record="never seen", units=50))
    assert ledger.spent_units() == 100


def test_require_asks_and_does_not_pay(ledger):
    ledger.require(CHARGE, count=10, budget=100, cap=10)
    with pytest.raises(BudgetExhausted, match="budget") as caught:
        ledger.require(CHARGE, count=11, budget=100, cap=100)
    assert caught.value.code == "SS-5001"
    with pytest.raises(BudgetExhausted) as caught:
        ledger.require(CHARGE, count=5, budget=100, cap=4)
    assert caught.value.code == "SS-5002"
    assert ledger.summary() == ()


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", ALL]), st.integers(1, 60)), max_size=14))
@settings(max_examples=40, deadline=None)
def test_no_order_of_charges_overspends_a_record(tmp_path_factory, wishes):
    ledger = Ledger(tmp_path_factory.mktemp("l"))
    paid: list[tuple[str, int]] = []  # the oracle is a list
    for record, units in wishes:

        def total(of, paid=paid):
            return sum(u for r, u in paid if r in {of, ALL})

        fits = all(total(r) + units <= 100 for r in ({"a", "b", "c", "d"} if record == ALL else {record}))
        try:
            pay(ledger, replace(CHARGE, record=record, units=units))
            assert fits
            paid.append((record, units))
        except BudgetExhausted:
            assert not fits
    for record in "abc":
        assert ledger.mu(record) ** 2 * UNITS == pytest.approx(total(record) if wishes else 0)
    ledger.close()


def test_summary_names_each_channel_with_its_dearest_record(ledger):
    pay(ledger, CHARGE, CHARGE, replace(CHARGE, record="other", units=15), replace(CHARGE, channel="gradient", units=4))
    found = {s.channel: (s.releases, s.mu**2 * UNITS) for s in ledger.summary()}
    assert found == {"cut": (3, pytest.approx(20)), "gradient": (1, pytest.approx(4))}


def test_the_worst_record_over_some_channels_is_worst_on_these_together(ledger):
    pay(ledger, replace(CHARGE, record="a", units=30), replace(CHARGE, record="b", channel="update", units=5))
    pay(
        ledger,
        replace(CHARGE, record="a", channel="update", units=4),
        replace(CHARGE, record=ALL, channel="peers", units=7),
    )
    assert ledger.spent_units() == 41
    assert ledger.spent_units(channels=["update"]) == 5
    assert ledger.spent_units(channels={"update", "peers"}) == 12
    assert ledger.spent_units("a", {"update", "peers"}) == 11
    assert ledger.spent_units(ALL) == 7
    assert ledger.spent_units(channels=[]) == 0
    assert ledger.mu(channels=["update"]) == pytest.approx((5 / UNITS) ** 0.5)


@pytest.mark.parametrize("bad", [{"units": 0}, {"units": -5}, {"channel": "adopted"}])
def test_no_charge_refunds_or_forges_an_adoption(bad):
    with pytest.raises(ValueError, match="unit"):
        replace(CHARGE, **bad)


def test_time_decides_nothing(ledger, monkeypatch):
    for now in (5_000, 10, -3):
        monkeypatch.setattr("time.time_ns", lambda now=now: now)
        pay(ledger, CHARGE)
    assert [e.time for e in ledger.entries()] == [5_000, 10, -3]
    ledger.verify()
    assert ledger.spent_units() == 30


def test_entries_come_in_order_over_many_pages(ledger):
    pay(ledger, *[replace(CHARGE, record=str(i)) for i in range(2100)])
    assert [(e.seq, e.record) for e in ledger.entries()] == [(i + 1, str(i)) for i in range(2100)]


def test_a_ledger_counts_in_one_unit_of_privacy(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.unit is None
    ledger.charge([Charge("a", "cut", 5, 1.0, 2.0, "p", unit="token")], budget=10**6, caps=[9])
    before = ledger.head()
    with pytest.raises(PolicyDenied) as caught:
        ledger.charge([Charge("b", "cut", 5, 1.0, 2.0, "p", unit="sequence")], budget=10**6, caps=[9])
    assert (caught.value.code, caught.value.exit_code) == ("SS-2016", 3)
    assert (ledger.unit, ledger.head()) == ("token", before)
    ledger.close()
