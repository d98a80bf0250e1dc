"""What stands beside an epsilon."""

from __future__ import annotations

from pathlib import Path

import pytest

from securesplit.agree import agree, compare
from securesplit.client.verdict import judge
from securesplit.errors import PolicyDenied
from securesplit.policy.load import load_policy
from securesplit.policy.meaning import Meaning, meaning_of
from securesplit.policy.schema import Policy

POLICIES = Path(__file__).parents[2] / "policies"


@pytest.mark.parametrize(("name", "delta"), [("balanced", 1e-5), ("strict", 1e-6)])
def test_a_policy_says_what_its_epsilon_speaks_of(name, delta):
    found = meaning_of(load_policy(POLICIES / f"{name}.toml").privacy)
    assert (found.delta, found.unit, found.relation) == (delta, "sequence", "replace-one")
    assert str(found) == f"at delta {delta:g}, unit sequence, replace-one"


@pytest.mark.parametrize(
    "other",
    [
        Meaning(1e-6, "sequence", "replace-one"),
        Meaning(1e-5, "user", "replace-one"),
        Meaning(1e-5, "sequence", "add-remove"),
    ],
)
def test_each_of_the_three_makes_another_quantity(other):
    assert other != Meaning(1e-5, "sequence", "replace-one")
    assert str(other) != str(Meaning(1e-5, "sequence", "replace-one"))


def other(base: Policy, **keys: object) -> Policy:
    raw = base.model_dump(mode="python", exclude_none=True)
    raw["privacy"].update(keys)
    return Policy.model_validate(raw)


def line_of(before: Policy, after: Policy) -> str:
    (line,) = (change.line() for change in compare(before, after).changes if change.path == "privacy.epsilon")
    return line


BALANCED = load_policy(POLICIES / "balanced.toml")


def test_a_changed_epsilon_is_told_with_what_it_speaks_of():
    both = "at delta 1e-05, unit sequence, replace-one"
    assert line_of(BALANCED, other(BALANCED, epsilon=4.0)).startswith(f"privacy.epsilon: 8 -> 4, both {both}; ")
    for key, value, said in (
        ("delta", 1e-6, "at delta 1e-06, unit sequence"),
        ("unit", "token", "at delta 1e-05, unit token"),
    ):
        line = line_of(BALANCED, other(BALANCED, epsilon=4.0, **{key: value}))
        assert line.startswith(f"privacy.epsilon: 8 {both} -> 4 {said}, replace-one; not one quantity")
    (change,) = (c for c in compare(BALANCED, other(BALANCED, epsilon=4.0)).changes if c.path == "privacy.epsilon")
    assert change.meaning == (meaning_of(BALANCED.privacy),) * 2, "and the JSON of `policy diff` has it"
    assert all(c.meaning is None for c in compare(BALANCED, other(BALANCED, delta=1e-6)).changes)


def test_a_refused_offer_tells_what_its_epsilon_speaks_of():
    looser = other(BALANCED, epsilon=9.0)
    with pytest.raises(PolicyDenied, match="SS-2060") as caught:
        agree(BALANCED, looser, peer="gpu")
    both = "at delta 1e-05, unit sequence, replace-one"
    assert caught.value.details[0].startswith(f"privacy.epsilon: 8 -> 9, both {both}; ")
    (breach,) = judge(BALANCED, offer=looser).refusals
    assert breach.line().startswith(f"privacy.epsilon: 8 {both} here, 9 {both} in the offer; ")
