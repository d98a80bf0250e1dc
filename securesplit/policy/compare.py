"""What changed between two policies, and whether it loosens, tightens, or neither."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel

from securesplit.policy.directions import CHANNELS, DIRECTIONS, UNSTATED, Direction
from securesplit.policy.meaning import Meaning, meaning_of
from securesplit.policy.orders import Effect
from securesplit.policy.schema import Gaussian, Policy
from securesplit.policy.table import at

__all__ = ["Change", "changes", "said", "value_at", "verdict"]

_LONGEST = 60


@dataclass(frozen=True, slots=True)
class Change:
    """One key that differs.

    Attributes:
        path: such as ``privacy.epsilon``; a table's own name where it is there in one policy alone.
        before, after: the values, as JSON has them; None where there is none.
        effect: of going from the first to the second.
        why: what the key decides.
        meaning: of an epsilon, what the two figures speak of; None for any other key.
    """

    path: str
    before: object
    after: object
    effect: Effect
    why: str
    meaning: tuple[Meaning, Meaning] | None = None

    @property
    def values(self) -> tuple[str, str]:
        """Before and after in words, an epsilon with what it speaks of."""
        before, after = self.meaning or ("", "")
        return f"{said(self.before)} {before}".rstrip(), f"{said(self.after)} {after}".rstrip()

    def line(self) -> str:
        """One line for people."""
        if self.meaning is not None and self.meaning[0] == self.meaning[1]:
            return f"{self.path}: {said(self.before)} -> {said(self.after)}, both {self.meaning[0]}; {self.why}"
        told = f"{self.path}: {' -> '.join(self.values)}"
        if self.meaning is not None:
            told += "; not one quantity, so each key is judged by itself"
        return f"{told}; {self.why}"


def said(value: object) -> str:
    """A value in a sentence."""
    match value:
        case None:
            return "absent"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case dict():
            return "stated"
        case _:
            words = str(value)
            return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."


def changes(before: Policy, after: Policy) -> tuple[Change, ...]:
    """Every key whose value differs, in the order of the table of directions.

    Where the mechanisms differ, that one change stands for all of ``[privacy]``; where a channel is opened or closed, its
    table stands for its keys.
    """
    mechanism = at(before, "privacy", "mechanism") != at(after, "privacy", "mechanism")
    found = []
    for direction in DIRECTIONS:
        if mechanism and direction.parent.startswith("privacy") and direction.path != "privacy.mechanism":
            continue
        old, new = value_at(before, direction), value_at(after, direction)
        if _is_table(old, new) and not (old is None) ^ (new is None):
            continue  # There in both or in neither: its keys tell.
        if direction.path in _BY_KEYS or _channel_missing(before, after, direction) or _json(old) == _json(new):
            continue
        effect = direction.order.effect(old, new)
        meaning = _meaning(before, after) if direction.path == "privacy.epsilon" else None
        found.append(Change(direction.path, _json(old), _json(new), effect, direction.why, meaning))
    return tuple(found)


def verdict(found: Iterable[Change]) -> Effect:
    """One word for all: what loosens anything loosens, whatever else it tightens."""
    effects = {change.effect for change in found}
    return "loosens" if "loosens" in effects else "tightens" if "tightens" in effects else "neutral"


def value_at(policy: Policy, direction: Direction) -> object:
    """A key's value, or what holds where its table is absent."""
    value: object = at(policy, *direction.path.split("."))
    if value is None and at(policy, *direction.parent.split(".")) is None:
        return UNSTATED.get(direction.path)
    return value


_BY_KEYS = frozenset({"privacy.activations", "aggregation.plausible", "leakage"})
_OPTIONAL = frozenset(f"privacy.{name}" for name in (*CHANNELS, "labels"))


def _channel_missing(before: Policy, after: Policy, direction: Direction) -> bool:
    """Whether the key's channel is there in at most one policy; then its table has told it."""
    if direction.parent not in _OPTIONAL:
        return False
    path = direction.parent.split(".")
    return at(before, *path) is None or at(after, *path) is None


def _meaning(before: Policy, after: Policy) -> tuple[Meaning, Meaning] | None:
    if not (isinstance(before.privacy, Gaussian) and isinstance(after.privacy, Gaussian)):
        return None
    return meaning_of(before.privacy), meaning_of(after.privacy)


def _is_table(*values: object) -> bool:
    return any(isinstance(value, BaseModel) for value in values)


def _json(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value
