"""Settings that are legal and still deserve a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from securesplit.errors import InputError
from securesplit.policy.lint import Finding, at_least
from securesplit.policy.lint import lint as whole
from securesplit.policy.load import parse_policy

ROOT = Path(__file__).parents[2]
POLICIES = ROOT / "policies"
STRICT = (POLICIES / "strict.toml").read_text(encoding="utf-8")
BALANCED = (POLICIES / "balanced.toml").read_text(encoding="utf-8")
LAB = (POLICIES / "lab.toml").read_text(encoding="utf-8")


def lint(policy, **known) -> tuple[str, ...]:
    """What deserves more than a note."""
    return tuple(finding.line() for finding in at_least(whole(policy, **known), "warning"))


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
    ([("epsilon = 8.0", "epsilon = 17.0")], "privacy.epsilon: 17"),
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
    assert ["20 at delta 1e-05, unit user, replace-one" in line for line in lint(policy)] == [True]


def test_lint_on_a_head_alone_in_a_learning_regime():
    policy = parse_policy(changed(BALANCED, ("min_back = 2", "min_back = 0")))
    assert lint(policy) == ()  # frozen: no gradient crosses
    learning = changed(
        BALANCED,
        ('regime = "frozen"', 'regime = "round"'), ("min_back = 2", "min_back = 0"), ("share = 0.4", "share = 0.2"),
        ("[aggregation]", "[privacy.gradients]\nclip=1.0\nshare=0.1\nreleases=1\n[privacy.updates]\nclip=1.0\nshare=0.1\nreleases=1\n[aggregation]"),
    )  # fmt: skip
    assert ["min_back" in line for line in lint(parse_policy(learning))] == [True]


LEAKAGE = '\n[leakage]\ntoken_recovery = 0.1\nmax_age_days = 14\nprofile = "standard"\n'


@pytest.mark.parametrize(("changes", "path", "word"), [
    ([("share = 0.6", "share = 0.1"), ("share = 0.4", "share = 0.1")], "privacy.activations.share", "2.2 times"),
    ([("clip = 600.0", "clip = 1e7")], "privacy.activations.clip", "larger than all"),
    ([("clip = 100.0", "clip = 0.001")], "privacy.generation.clip", "cut to it"),
    ([("releases = 1 ", "releases = 3 ")], "privacy.activations.releases", "buy nothing"),
    ([("max_update = 1.0", 'max_update = 1.0\nroster = ["a", "b", "c"]'), ("min_clients = 3", "min_clients = 4")], "aggregation.min_clients", "no job is ever admitted"),
    ([("max_update = 1.0", 'max_update = 1.0\nroster = ["a", "b", "c"]\nmin_colluders = 2')], "aggregation.min_colluders", "no job"),
    ([("max_message_bytes = 268435456", "max_message_bytes = 65536")], "limits.max_message_bytes", "no sequence of 512"),
    ([("[transport]", "[leakage]\ntoken_recovery = 0.1\nmax_age_days = 31\n[transport]")], "leakage.max_age_days", "certificate"),
    ([("[transport]", "[leakage]\ntoken_recovery = 0.6\nmax_age_days = 3\n[transport]")], "leakage.token_recovery", "is read"),
    ([("[transport]", "[leakage]\ntoken_recovery = 0.0\nmax_age_days = 3\n[transport]")], "leakage.token_recovery", "no report passes"),
    ([("[transport]", "[leakage]\nmembership_auc = 0.5\nmax_age_days = 3\n[transport]")], "leakage.membership_auc", "chance"),
    ([('unit = "sequence"', 'unit = "token"'), ("min_front = 2", "min_front = 0"), ("[transport]", "[leakage]\npii_exact = 0.1\nmax_age_days = 3\n[transport]")], "leakage.pii_exact", "several tokens"),
])  # fmt: skip
def test_weak_and_contradictory_settings_are_named_by_their_key(changes, path, word):
    said = [f for f in at_least(whole(parse_policy(changed(BALANCED, *changes))), "warning") if f.path == path]
    assert [f.severity for f in said] == ["warning"]
    assert word in said[0].what


def test_delta_is_held_against_the_number_of_records():
    policy = parse_policy(BALANCED)
    assert lint(policy, records=10_000) == ()
    assert whole(policy, records=10_001)[0].severity == "warning"
    assert whole(policy, records=100_001)[0] == Finding(
        "danger", "privacy.delta", whole(policy, records=100_001)[0].what
    )


def test_a_coalition_of_all_but_one_is_noted_where_updates_carry_no_noise():
    (note,) = whole(parse_policy(BALANCED))
    assert (note.severity, note.path) == ("note", "aggregation.min_clients")
    noised = changed(
        BALANCED,
        ("share = 0.4", "share = 0.2"),
        ("[aggregation]", "[privacy.updates]\nclip=1.0\nshare=0.2\nreleases=1\n[aggregation]"),
    )
    assert whole(parse_policy(noised)) == ()


def test_severities_are_ordered():
    lab = whole(parse_policy(LAB + LEAKAGE))
    assert [f.path for f in at_least(lab, "danger")] == ["privacy.mechanism"]
    assert len(at_least(lab, "warning")) == 4, "a limit that no recording without noise can pass is the fourth"
    assert at_least(lab, "note") == lab
