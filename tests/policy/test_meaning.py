"""What stands beside an epsilon."""

from __future__ import annotations

from pathlib import Path

import pytest

from securesplit.policy.load import load_policy
from securesplit.policy.meaning import Meaning, meaning_of

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
