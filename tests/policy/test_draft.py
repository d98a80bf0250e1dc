"""What `policy new` writes is a policy without a warning; what is written of a policy comes back; faults have a place."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError
from securesplit.policy.draft import EPSILONS, Answers, draft
from securesplit.policy.lint import at_least, lint
from securesplit.policy.load import load_policy, parse_policy
from securesplit.policy.place import located
from securesplit.policy.published import policy_schema
from securesplit.policy.schema import Policy
from securesplit.policy.written import write_new, written

ROOT = Path(__file__).parents[2]
USES = ("train", "generate", "both", "adapt")


@pytest.mark.parametrize(("use", "data", "unit"), itertools.product(USES, EPSILONS, ("sequence", "user")))
def test_a_draft_is_sound(use, data, unit):
    for clients, records in ((3, 1), (7, 12_345), (256, 10**9)):
        text = draft(Answers("mine", use, data, unit, clients, records))
        policy = parse_policy(text)
        assert at_least(lint(policy, records=records), "warning") == ()
        assert policy.privacy.epsilon == EPSILONS[data]
        assert policy.privacy.delta * records <= 0.1
        assert (policy.privacy.generation is not None) == (use in ("generate", "both"))
        assert 2 * policy.aggregation.min_threshold > clients
        # Every key is explained on its line, or is one of a group that is plain.
        bare = [line for line in text.splitlines() if "=" in line and "#" not in line]
        assert {line.split(" =")[0] for line in bare} <= {"name", "purpose", "cost", "mechanism", "max_sequences", "max_message_bytes", "loopback_only"}  # fmt: skip


def test_all_impossible_answers_are_told_at_once():
    with pytest.raises(InputError, match="SS-1122") as caught:
        Answers("x", "fly", "odd", clients=2, records=0, clip=-1.0, tokens=0, rounds=0, epsilon=99.0)
    assert [line.split(":")[0] for line in caught.value.details] == ["clients", "records", "clip", "tokens", "rounds", "epsilon", "use", "data"]  # fmt: skip


@given(
    st.text(min_size=20, max_size=60),
    st.lists(st.text(min_size=1, max_size=20), min_size=3, max_size=9, unique=True) | st.none(),
)
@settings(max_examples=60, deadline=None)
def test_a_written_policy_comes_back(words, roster):
    raw = load_policy(ROOT / "policies/balanced.toml").model_dump(mode="python", exclude_none=True)
    raw |= {"purpose": words}
    if roster is not None:
        raw["aggregation"]["roster"] = roster
    try:
        policy = Policy.model_validate(raw)
        policy.canonical()
    except (ValueError, UnicodeEncodeError):
        return
    assert parse_policy(written(policy)) == policy


@pytest.mark.parametrize("name", ["strict", "balanced", "lab"])
def test_the_shipped_ones_come_back(name):
    policy = load_policy(ROOT / f"policies/{name}.toml")
    assert parse_policy(written(policy)).digest == policy.digest


def test_nothing_is_replaced(tmp_path):
    write_new(tmp_path / "p.toml", "a")
    for path in (tmp_path / "p.toml", tmp_path / "absent" / "p.toml"):
        with pytest.raises(InputError, match="SS-1121"):
            write_new(path, "b")
    assert (tmp_path / "p.toml").read_text() == "a"


def test_faults_have_table_key_and_line():
    text = (ROOT / "policies/strict.toml").read_text()
    lines = text.splitlines()
    text = (
        text.replace("epsilon = 2.0", "epsilon = -1.0")
        .replace("blind = true", "blnd = true")
        .replace("[transport]", "[transports]")
    )
    with pytest.raises(InputError) as caught:
        parse_policy(text)
    found = {(f.table, f.key): f for f in located(text, caught.value.details)}
    epsilon = next(i for i, line in enumerate(lines, 1) if line.startswith("epsilon"))
    assert found["privacy", "epsilon"].line == epsilon
    assert found["aggregation", "blind"].line == lines.index("[aggregation]") + 1, (
        "a missing key is missing in its table"
    )
    assert lines[found["aggregation", "blnd"].line - 1].startswith("blind")
    assert found["", "transport"].line is None
    assert found["transports", None].line == lines.index("[transport]") + 1
    assert all(f.what for f in found.values())


# ---- the published schema --------------------------------------------------------------------------------------------


def test_the_page_is_what_the_script_writes():
    assert (ROOT / "docs" / "policy.schema.json").read_text() == policy_schema(), "run scripts/write-policy-schema"
    assert runpy.run_path(str(ROOT / "scripts" / "write-policy-schema"))["policy_schema"] is not None


def conforms(schema: dict, node: dict, value: object) -> bool:
    """The part of JSON Schema that a policy's uses, written out."""
    if "$ref" in node:
        return conforms(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[1]], value)
    for word in ("anyOf", "oneOf"):
        if word in node and not any(conforms(schema, inner, value) for inner in node[word]):
            return False
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": (int, float),
    }
    kind = node.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if isinstance(value, dict) and "properties" in node:
        known = node["properties"]
        return (
            set(node.get("required", ())) <= set(value)
            and (set(value) <= set(known) or node.get("additionalProperties", True) is not False)
            and all(conforms(schema, known[key], inner) for key, inner in value.items() if key in known)
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (
            value > node.get("exclusiveMinimum", -float("inf")) and value >= node.get("minimum", value)
            and value < node.get("exclusiveMaximum", float("inf")) and value <= node.get("maximum", value)
        )  # fmt: skip
    return value in node.get("enum", [value]) and value == node.get("const", value)


def test_the_schema_accepts_what_ships_and_refuses_what_the_loader_refuses():
    schema = json.loads(policy_schema())
    assert schema["$schema"].endswith("2020-12/schema")
    for name in ("strict", "balanced", "lab"):
        raw = load_policy(ROOT / f"policies/{name}.toml").model_dump(mode="json")
        assert conforms(schema, schema, raw)
        for table, key, value in (
            ("limits", "min_front", -1), ("limits", "extra", 1), ("transport", "loopback_only", 0), ("aggregation", "min_clients", 2),
            ("privacy", "mechanism", "none"), ("privacy", "epsilon", 0),
        ):  # fmt: skip
            assert not conforms(schema, schema, {**raw, table: {**raw[table], key: value}}), (table, key)
    properties = schema["$defs"]["Gaussian"]["properties"]
    assert (properties["epsilon"]["x-tighter"], schema["$defs"]["Aggregation"]["properties"]["blind"]["x-tighter"]) == (
        "smaller",
        "true",
    )
