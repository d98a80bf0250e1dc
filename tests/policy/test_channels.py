"""Which channels a regime has: every set of them under every regime, against the rules in words of this file."""

from __future__ import annotations

from pathlib import Path

import pytest

from securesplit.errors import InputError
from securesplit.policy.load import parse_policy

BALANCED = (Path(__file__).parents[2] / "policies" / "balanced.toml").read_text(encoding="utf-8")


def changed(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def details(text: str) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        parse_policy(text)
    assert caught.value.code == "SS-1102"
    return caught.value.details


CHANNELS = {
    "gradients": "clip = 1.0\nshare = 0.1\nreleases = 2\n",
    "labels": "classes = 3\nshare = 0.1\n",
    "updates": "clip = 1.0\nshare = 0.1\nreleases = 2\n",
    "generation": "clip = 1.0\nshare = 0.1\nreleases = 2\n",
}


def with_channels(regime, names, *, blind=True, unit="sequence"):
    head, _, tail = BALANCED.partition("[privacy.generation]")
    rest = "[aggregation]" + tail.partition("[aggregation]")[2]
    tables = "".join(f"[privacy.{name}]\n{CHANNELS[name]}" for name in names)
    text = changed(
        head + tables + rest, ('regime = "frozen"', f'regime = "{regime}"'), ('unit = "sequence"', f'unit = "{unit}"')
    )
    return text if blind else changed(text, ("blind = true", "blind = false"))


def expected_faults(regime, names, *, blind):
    """The rules in words of this test: what each regime sends, and what it must send."""
    gradients, labels, updates = (name in names for name in ("gradients", "labels", "updates"))
    faults = []
    if regime == "frozen":
        if gradients or labels:
            faults.append("sends no gradients")
        if not updates and not blind:
            faults.append("set aggregation.blind = true")
    else:
        if gradients + labels != 1:
            faults.append("exactly one of")
        if not updates:
            faults.append("[privacy.updates] is needed")
    return faults


@pytest.mark.parametrize("blind", [True, False])
@pytest.mark.parametrize("regime", ["frozen", "round", "step"])
def test_every_set_of_channels_under_every_regime(regime, blind):
    for mask in range(16):
        names = [name for i, name in enumerate(CHANNELS) if mask >> i & 1]
        text, expected = with_channels(regime, names, blind=blind), expected_faults(regime, names, blind=blind)
        if not expected:
            policy = parse_policy(text)
            assert [getattr(policy.privacy, name) is not None for name in CHANNELS] == [n in names for n in CHANNELS]
            continue
        found = details(text)
        assert len(found) == len(expected), (names, found)
        for word in expected:
            assert any(word in line for line in found), (names, word, found)


@pytest.mark.parametrize("unit", ["sequence", "token", "user"])
def test_all_three_units_are_legal_in_every_regime(unit):
    assert parse_policy(with_channels("frozen", ["updates", "generation"], unit=unit)).privacy.unit == unit
    for regime in ("round", "step"):
        assert parse_policy(with_channels(regime, ["labels", "updates"], unit=unit)).privacy.unit == unit


def test_a_channel_more_is_another_policy():
    digests = {parse_policy(with_channels("frozen", names)).digest for names in ([], ["updates"], ["generation"])}
    digests |= {parse_policy(with_channels(r, ["labels", "updates"])).digest for r in ("round", "step")}
    digests |= {parse_policy(with_channels("frozen", [], unit=u)).digest for u in ("token", "user")}
    assert len(digests) == 7
