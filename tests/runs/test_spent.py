"""What a run has spent: the figure with its meaning, or none; never a figure alone, whatever the folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.policy.load import load_policy
from securesplit.policy.meaning import Meaning
from securesplit.runs.spent import NO_BOUND, UNKNOWN, Spent, highest, spent_by, spent_under

POLICIES = Path(__file__).parents[2] / "policies"
BALANCED = load_policy(POLICIES / "balanced.toml").canonical().decode()
PLAIN = Meaning(1e-5, "sequence", "replace-one")


def test_a_record_has_both_numbers_or_neither():
    assert spent_by(1.5, 1e-5, "sequence", "replace-one") == Spent("stated", 1.5, PLAIN)
    assert str(spent_by(1.5, 1e-5, "user", "replace-one")) == "1.5 at delta 1e-05, unit user, replace-one"
    assert spent_by(None, None, "sequence", "replace-one") == NO_BOUND
    assert str(NO_BOUND) == "none: UNSAFE"
    for half in ((1.5, None), (None, 1e-5)):
        assert spent_by(*half, "sequence", "replace-one") == UNKNOWN
    assert str(UNKNOWN) == "unknown"


def test_before_there_is_a_record_the_policy_says_what_a_figure_means():
    assert spent_under(BALANCED, 0.5) == Spent("stated", 0.5, PLAIN)
    assert str(spent_under(BALANCED, None)) == "not counted yet at delta 1e-05, unit sequence, replace-one"
    lab = load_policy(POLICIES / "lab.toml").canonical().decode()
    # Under a policy that bounds nothing a figure would be a lie.
    assert spent_under(lab, 0.5) == NO_BOUND


def test_a_policy_of_a_later_version_is_understood_as_far_as_it_goes():
    later = json.loads(BALANCED)
    later["something"] = {"new": True}
    later["privacy"] |= {"unit": "household", "relation": "add-remove", "accountant": "prv"}
    found = spent_under(json.dumps(later), 2.0)
    assert str(found) == "2 at delta 1e-05, unit household, add-remove"


@pytest.mark.parametrize(
    "change",
    [
        {"delta": None}, {"delta": "1e-5"}, {"delta": 0}, {"delta": 1.0}, {"delta": -1e-5}, {"delta": 10**400}, {"delta": True},
        {"unit": None}, {"unit": ""}, {"unit": "x" * 33}, {"unit": "sequence\n"}, {"unit": "\u001b[2J"}, {"unit": ["sequence"]},
        {"relation": "replace one"}, {"relation": 1}, {"mechanism": "laplace"}, {"mechanism": None},
    ],
)  # fmt: skip
def test_a_policy_that_does_not_say_it_leaves_the_figure_out(change):
    policy = json.loads(BALANCED)
    policy["privacy"] |= change
    assert spent_under(json.dumps(policy), 0.5) == UNKNOWN


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", "null", "nonsense", "[" * 5000, '{"privacy":' * 400 + "1" + "}" * 400, '{"privacy": NaN}',
        '{"privacy": {"mechanism": "gaussian", "delta": NaN, "unit": "sequence", "relation": "replace-one"}}', "\ud800",
        '{"privacy": []}', '{"privacy": {}}',
    ],
)  # fmt: skip
def test_what_is_no_policy_is_answered_all_the_same(text):
    assert spent_under(text, 0.5) == UNKNOWN


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(
    changed=st.dictionaries(st.sampled_from(["mechanism", "delta", "unit", "relation", "epsilon"]), VALUES, max_size=3),
    cut=st.integers(min_value=0, max_value=5000),
)
def test_a_damaged_policy_never_gives_a_figure_without_its_meaning(changed, cut):
    policy = json.loads(BALANCED)
    policy["privacy"] |= changed
    for text in (json.dumps(policy), json.dumps(policy)[:cut]):
        found = spent_under(text, 0.5)
        assert (found.bound == "stated") == (found.meaning is not None)
        assert found.epsilon is None or found.meaning is not None
        assert str(found).isprintable()


def test_the_highest_of_several_is_one_only_where_they_mean_the_same():
    low, high = Spent("stated", 1.0, PLAIN), Spent("stated", 2.0, PLAIN)
    assert highest([low, high, low]) == high
    for other in (
        Meaning(1e-6, "sequence", "replace-one"), Meaning(1e-5, "user", "replace-one"), Meaning(1e-5, "sequence", "other"),
    ):  # fmt: skip
        assert highest([low, Spent("stated", 0.5, other)]) == UNKNOWN
    assert highest([low, NO_BOUND]) == NO_BOUND, "one site without a bound leaves all without"
    assert highest([low, UNKNOWN]) == UNKNOWN
    assert highest([low, Spent("stated", None, PLAIN)]) == UNKNOWN
