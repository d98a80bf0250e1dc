"""The JSON Schema of a policy, for editors and for checks elsewhere.

It says what a key may hold and which way is looser. It does not say the rules between keys, such as that shares add up to at
most 1; ``securesplit policy check`` does.
"""

from __future__ import annotations

import json
from typing import Any

from securesplit.policy.directions import DIRECTIONS
from securesplit.policy.orders import Bound
from securesplit.policy.schema import Policy

__all__ = ["policy_schema"]


def policy_schema() -> str:
    """The schema, draft 2020-12, as JSON text with one key a line."""
    whole = Policy.model_json_schema()
    whole["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    whole["title"] = "A SecureSplit policy"
    for direction in DIRECTIONS:
        for place in _places(whole, direction.path.split(".")):
            place["x-why"] = direction.why
            if isinstance(direction.order, Bound):
                place["x-tighter"] = _tight(direction.order, place)
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def _tight(order: Bound, place: dict[str, Any]) -> str:
    if place.get("type") == "boolean":
        return {"small": "false", "large": "true"}[order.tight]
    return {"small": "smaller", "large": "larger"}[order.tight]


def _places(whole: dict[str, Any], path: list[str]) -> list[dict[str, Any]]:
    """Every place in the schema that a path leads to; a table of two shapes has two."""
    nodes = [whole]
    for name in path:
        nodes = [
            node["properties"][name]
            for at in nodes
            for node in _shapes(whole, at)
            if name in node.get("properties", {})
        ]
    return nodes


def _shapes(whole: dict[str, Any], node: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in node:
        return _shapes(whole, whole["$defs"][node["$ref"].rsplit("/", 1)[1]])
    found = [node] if "properties" in node else []
    for name in ("anyOf", "oneOf", "allOf"):
        for inner in node.get(name, ()):
            found += _shapes(whole, inner)
    return found
