"""A policy file: what ships is sound, every fault of a bad one is named at once, and its digest never drifts."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from securesplit.errors import InputError
from securesplit.policy.lint import at_least, lint
from securesplit.policy.load import load_policy, parse_policy
from securesplit.policy.schema import Channel, Gaussian, Limits, Policy

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


# ---- what ships ------------------------------------------------------------------------------------------------------


def test_exactly_three_policies_ship_under_their_own_names():
    found = {path.stem: load_policy(path) for path in POLICIES.glob("*.toml")}
    assert set(found) == {"strict", "balanced", "lab"}
    assert {name: policy.name for name, policy in found.items()} == {n: n for n in found}


def test_the_private_ones_give_lint_nothing_to_say_and_the_unsafe_one_much():
    for text in (STRICT, BALANCED):
        assert at_least(lint(parse_policy(text)), "warning") == ()
    said = [finding.line() for finding in lint(parse_policy(LAB))]
    assert len(said) == 3
    assert all(any(word in line for line in said) for word in ("UnsafeNoPrivacy", "min_front", "min_back"))


def test_the_unsafe_one_stays_on_loopback():
    lab = parse_policy(LAB)
    assert lab.unsafe
    assert lab.transport.loopback_only
    assert not parse_policy(STRICT).unsafe


# The canonical bytes are what the handshake compares: a change here is a change of the protocol.
DIGESTS = {
    "strict": "c6f9d758ffefe3d22ebe58a2976d849b42f1909f092da975fb48db1d7afb3130",
    "balanced": "f189aaf6c59a27db3c1bfaff83cf1e9773c36e0cafadbf28593476e11c35f2df",
    "lab": "9ede8849a1cdf855299fbaf58fa6746f60eeafbfa7ac43cde09b54e1513305f8",
}


@pytest.mark.parametrize("name", sorted(DIGESTS))
def test_digests_are_stable(name):
    assert load_policy(POLICIES / f"{name}.toml").digest == DIGESTS[name]


@pytest.mark.parametrize("text", [STRICT, BALANCED, LAB])
def test_the_canonical_form_comes_back_as_the_same_policy(text):
    policy = parse_policy(text)
    again = Policy.model_validate_json(policy.canonical())
    assert again == policy
    assert again.canonical() == policy.canonical()
    assert b" " not in re.sub(rb'"[^"]*"', b"", policy.canonical())


def test_comments_and_order_do_not_change_the_digest_and_any_value_does():
    policy = parse_policy(BALANCED)
    plain = re.sub(r"\s*#[^\n]*", "", BALANCED)
    assert plain != BALANCED
    assert parse_policy(plain).digest == policy.digest
    head, *tables = re.split(r"\n(?=\[)", plain)
    assert parse_policy("\n".join([head, *reversed(tables)])).digest == policy.digest
    for old, new in (
        ("epsilon = 8.0", "epsilon = 8.000000000000002"),
        ("releases = 256", "releases = 255"),
        ("512]", "513]"),
    ):
        assert parse_policy(changed(BALANCED, (old, new))).digest != policy.digest


# ---- single faults ---------------------------------------------------------------------------------------------------

FAULTS = [
    (('unit = "sequence"', ""), "privacy.unit: Field required"),
    (('relation = "replace-one"', ""), "privacy.relation: Field required"),
    (('unit = "sequence"', 'unit = "word"'), "privacy.unit"),
    (('relation = "replace-one"', 'relation = "zero-out"'), "privacy.relation"),
    (("epsilon = 8.0", "epsilon = -8.0"), "privacy.epsilon"),
    (("epsilon = 8.0", "epsilon = 0.0"), "privacy.epsilon"),
    (("epsilon = 8.0", "epsilon = nan"), "privacy.epsilon"),
    (("epsilon = 8.0", "epsilon = inf"), "privacy.epsilon"),
    (("epsilon = 8.0", "epsilon = 1001.0"), "privacy.epsilon"),
    (("epsilon = 8.0", 'epsilon = "8"'), "privacy.epsilon"),
    (("epsilon = 8.0", "epsilon = true"), "privacy.epsilon"),
    (("epsilon = 8.0", "epsilom = 8.0"), "privacy.epsilom: unknown key"),
    (("delta = 1e-5", "delta = 0.0"), "privacy.delta"),
    (("delta = 1e-5", "delta = 0.001"), "privacy.delta"),
    (("delta = 1e-5", "delta = -inf"), "privacy.delta"),
    (('regime = "frozen"', 'regime = "melted"'), "privacy.regime"),
    (('mechanism = "gaussian"', 'mechanism = "laplace"'), "privacy"),
    (('mechanism = "gaussian"', ""), "privacy"),
    (("clip = 600.0", "clip = 0.0"), "privacy.activations.clip"),
    (("clip = 600.0", "clip = 1e300"), "privacy.activations.clip"),
    (("clip = 600.0", "clip = nan"), "privacy.activations.clip"),
    (("share = 0.6", "share = 1.1"), "privacy.activations.share"),
    (("share = 0.6", "share = 0.0"), "privacy.activations.share"),
    (("releases = 1 ", "releases = 0 "), "privacy.activations.releases"),
    (("releases = 1 ", "releases = 1.0 "), "privacy.activations.releases"),
    (("releases = 1 ", "sigma = 1.0\nreleases = 1 "), "privacy.activations.sigma: unknown key"),
    (("min_clients = 3", "min_clients = 2"), "aggregation.min_clients"),
    (("min_threshold = 2", "min_threshold = 1"), "aggregation.min_threshold"),
    (("blind = true", 'blind = "yes"'), "aggregation.blind"),
    (("blind = true", "blind = 1"), "aggregation.blind"),
    (("max_update = 1.0", "max_update = 0.0"), "aggregation.max_update"),
    (("min_front = 2", "min_front = -1"), "limits.min_front"),
    (("max_sequences = 64", "max_sequences = 0"), "limits.max_sequences"),
    (("[16, 32,", "[0, 32,"), "limits.buckets"),
    (("[16, 32,", "[32, 16,"), "limits: buckets must rise"),
    (("[16, 32,", "[16, 16,"), "limits: buckets must rise"),
    (("[16, 32, 48, 64, 128, 256, 512]", "[]"), "limits.buckets"),
    (("max_message_bytes = 268435456", "max_message_bytes = 1"), "limits.max_message_bytes"),
    (("loopback_only = false", ""), "transport.loopback_only: Field required"),
    (("[transport]", "[transports]"), "transport"),
    (('name = "balanced"', 'name = "Balanced!"'), "name"),
    (('name = "balanced"', ""), "name: Field required"),
    (("share = 0.4", "share = 0.5"), "shares add up to 1.1000"),
    (("[privacy.generation]", "[privacy.gradients]"), "regime 'frozen' sends no gradients"),
    (("[privacy.generation]", "[privacy.labels]\nshare = 0.1\nclasses = 2\n[privacy.generation]"), "regime 'frozen' sends no gradients"),
    (('regime = "frozen"', 'regime = "round"'), "exactly one of [privacy.gradients] and [privacy.labels]"),
    (('regime = "frozen"', 'regime = "round"'), "[privacy.updates] is needed"),
    (('regime = "frozen"', 'regime = "step"'), "regime 'step' lets A and C learn by noised sums alone: [privacy.updates] is needed"),
    (("[privacy.generation]", "[privacy.labels]\nclasses = 2\nshare = 0.0\n[privacy.generation]"), "privacy.labels.share"),
    (("[privacy.generation]", "[privacy.labels]\nclasses = 1\nshare = 0.1\n[privacy.generation]"), "privacy.labels.classes"),
    (("[privacy.generation]", "[privacy.labels]\nclasses = 2\nshare = 0.1\nclip = 1.0\n[privacy.generation]"), "privacy.labels.clip: unknown key"),
    (("blind = true", "blind = false"), "set aggregation.blind = true"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), FAULTS, ids=[f"{a[1][:24]}-{i}" for i, (a, _) in enumerate(FAULTS)])
def test_one_fault_is_named(change, expected):
    found = details(changed(BALANCED, change))
    assert any(expected in line for line in found), found


def test_the_unsafe_mechanism_off_loopback_and_with_a_budget_is_refused():
    found = details(
        changed(
            LAB,
            ("loopback_only = true", "loopback_only = false"),
            ('"UnsafeNoPrivacy"', '"UnsafeNoPrivacy"\nepsilon = 8.0'),
        )
    )
    assert len(found) == 2
    assert "policy: UnsafeNoPrivacy is allowed on loopback only: set transport.loopback_only = true" in found
    assert "privacy.epsilon: unknown key" in found


# ---- all faults at once ----------------------------------------------------------------------------------------------


def test_every_fault_of_a_bad_file_is_reported_at_once():
    found = details(
        changed(
            BALANCED,
            ('name = "balanced"', 'name = "Bad Name"\nextends = "strict"'),
            ('unit = "sequence"', ""),
            ("epsilon = 8.0", "epsilon = -1.0"),
            ("delta = 1e-5", "delta = nan"),
            ("clip = 600.0", "clip = inf"),
            ("share = 0.6", "share = 2.0"),
            ("min_clients = 3", 'min_clients = "3"'),
            ("[16, 32,", "[32, 16,"),
            ("min_front = 2", "min_front = -1"),
            ("loopback_only = false", "loopback_only = 0\nproxy = true"),
            ("blind = true", "blind = false"),
            ("[privacy.generation]", "[privacy.gradients]"),
        )
    )
    starts = (
        "name:", "extends: unknown key", "privacy.unit:", "privacy.epsilon:", "privacy.delta:", "privacy.activations.clip:",
        "privacy.activations.share:", "privacy: regime 'frozen'", "aggregation.min_clients:", "limits.min_front:",
        "limits: buckets", "transport.loopback_only:", "transport.proxy: unknown key", "policy: regime 'frozen'",
    )  # fmt: skip
    for start in starts:
        assert any(line.startswith(start) for line in found), (start, found)
    assert len(found) == len(starts), found


def test_two_broken_rules_of_one_table_are_both_reported():
    found = details(changed(BALANCED, ("share = 0.4", "share = 0.9"), ("[privacy.generation]", "[privacy.gradients]")))
    assert len(found) == 2
    assert all(line.startswith("privacy: ") for line in found)


# Faults that leave the meaning of the others as it is: without its mechanism the privacy table has no shape, and the rules
# between keys depend on the regime and on which tables there are.
INDEPENDENT = [f for f in FAULTS if not f[0][0].startswith(("mechanism", "regime", "["))]


@given(st.lists(st.sampled_from(INDEPENDENT), min_size=2, max_size=6, unique_by=lambda f: f[0][0].split(" ")[0]))
@settings(max_examples=60, deadline=None)
def test_faults_do_not_hide_each_other(chosen):
    found = details(changed(BALANCED, *(change for change, _ in chosen)))
    for _, sentence in chosen:
        assert any(sentence in line for line in found), (sentence, found)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["privacy", "mechanism", "regime", "activations", "gradients", "share", "limits", "buckets", "aggregation", "blind", "transport", "x"]),
        inner, max_size=4),
    max_leaves=20,
))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_nonsense_is_a_validation_error_and_nothing_else(raw):
    with pytest.raises(ValidationError):
        Policy.model_validate(raw)
    for mechanism in ("gaussian", "UnsafeNoPrivacy"):
        if isinstance(raw, dict):
            with pytest.raises(ValidationError):
                Policy.model_validate({**raw, "privacy": {**raw, "mechanism": mechanism}})


# ---- the file --------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tmp_path):
    big, binary = tmp_path / "big.toml", tmp_path / "binary.toml"
    big.write_bytes(b"#" * ((1 << 20) + 1))
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.toml", tmp_path, big, binary):
        with pytest.raises(InputError) as caught:
            load_policy(path)
        assert caught.value.code == "SS-1100", path


def test_text_that_is_not_toml():
    deep, long = "a=" + "[" * 100_000, "a=" + "9" * 5000
    for text in ("name = ", "[privacy", "a = 1\na = 2", "\0", deep, long):
        with pytest.raises(InputError) as caught:
            parse_policy(text, source="here.toml")
        assert caught.value.code == "SS-1101"
        assert "here.toml" in caught.value.what


def test_an_empty_file_lacks_every_table():
    assert len(details("")) == sum(field.is_required() for field in Policy.model_fields.values())


# ---- objects ---------------------------------------------------------------------------------------------------------


def test_a_policy_cannot_be_changed_in_place():
    policy = parse_policy(BALANCED)
    with pytest.raises(ValidationError):
        policy.privacy.epsilon = 100.0
    with pytest.raises(ValidationError):
        policy.transport.loopback_only = True


def test_rules_hold_for_objects_built_in_code():
    channel = Channel(clip=1.0, share=0.7, releases=1)
    base = {"mechanism": "gaussian", "unit": "sequence", "relation": "replace-one", "epsilon": 1.0, "delta": 1e-6}
    with pytest.raises(ValidationError, match=r"add up to 1\.4000"):
        Gaussian(**base, regime="frozen", activations=channel, generation=channel)
    with pytest.raises(ValidationError, match="round"):
        Gaussian(**base, regime="round", activations=channel)
    with pytest.raises(ValidationError, match="rise"):
        Limits(min_front=0, min_back=0, max_sequences=1, buckets=(2, 1), max_message_bytes=1 << 16)
    with pytest.raises(ValidationError, match="finite"):
        Channel(clip=math.inf, share=0.7, releases=1)
