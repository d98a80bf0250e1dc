"""Settings that are legal and still deserve a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from securesplit.errors import InputError
from securesplit.policy.lint import lint
from securesplit.policy.load import parse_policy

ROOT = Path(__file__).parents[2]
POLICIES = ROOT / "policies"
STRICT = (POLICIES / "strict.toml").read_text(encoding="utf-8")
BALANCED = (POLICIES / "balanced.toml").read_text(encoding="utf-8")
LAB = (POLICIES / "lab.toml").read_text(encoding="utf-8")


def changed(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def details(text: str) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        parse_policy(text)
    assert caught.value.code == "SS-1102"
    assert caught.value.exit_code == 2
    assert f"{len(caught.value.details)} fault(s)" in caught.value.what
    return caught.value.details


@pytest.mark.parametrize(("changes", "word"), [
    ([("epsilon = 8.0", "epsilon = 17.0")], "privacy.epsilon = 17"),
    ([("delta = 1e-5", "delta = 2e-5")], "privacy.delta"),
    ([("min_front = 2", "min_front = 0")], "min_front"),
    ([("[16, 32, 48, 64, 128, 256, 512]", str(list(range(1, 15))))], "14 lengths"),
    ([('regime = "frozen"', 'regime = "round"'), ("share = 0.4", "share = 0.2"), ("blind = true", "blind = false"),
      ("[aggregation]", "[privacy.gradients]\nclip=1.0\nshare=0.1\nreleases=1\n[privacy.updates]\nclip=1.0\nshare=0.1\nreleases=1\n[aggregation]")], "aggregation.blind"),
])  # fmt: skip
def test_lint_speaks_of_what_is_legal_and_doubtful(changes, word):
    said = lint(parse_policy(changed(BALANCED, *changes)))
    assert len(said) == 1
    assert word in said[0]


@pytest.mark.parametrize(("front", "said"), [(0, False), (1, True), (2, True)])
def test_lint_on_unit_token_with_attention_in_front(front, said):
    """One token moves all later rows then, so the noise is that of a sequence and the claim that of a token."""
    policy = parse_policy(
        changed(BALANCED, ('unit = "sequence"', 'unit = "token"'), ("min_front = 2", f"min_front = {front}"))
    )
    assert any("A has attention" in line for line in lint(policy)) == said


@pytest.mark.parametrize("unit", ["sequence", "user"])
def test_lint_on_other_units_speaks_of_no_attention(unit):
    assert lint(parse_policy(changed(BALANCED, ('unit = "sequence"', f'unit = "{unit}"')))) == ()


def test_lint_names_the_unit_of_a_large_epsilon():
    policy = parse_policy(
        changed(BALANCED, ("epsilon = 8.0", "epsilon = 20.0"), ('unit = "sequence"', 'unit = "user"'))
    )
    assert ["per user" in line for line in lint(policy)] == [True]


def test_lint_on_a_head_alone_in_a_learning_regime():
    policy = parse_policy(changed(BALANCED, ("min_back = 2", "min_back = 0")))
    assert lint(policy) == ()  # frozen: no gradient crosses
    learning = changed(
        BALANCED,
        ('regime = "frozen"', 'regime = "round"'), ("min_back = 2", "min_back = 0"), ("share = 0.4", "share = 0.2"),
        ("[aggregation]", "[privacy.gradients]\nclip=1.0\nshare=0.1\nreleases=1\n[privacy.updates]\nclip=1.0\nshare=0.1\nreleases=1\n[aggregation]"),
    )  # fmt: skip
    assert ["min_back" in line for line in lint(parse_policy(learning))] == [True]
