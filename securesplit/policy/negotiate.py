"""The strictest of two policies, key by key, or a refusal that names the rules on which no value suits both.

Nothing is computed here but the keys themselves; securesplit/agree.py weighs budgets, and decides for a session.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from pydantic import ValidationError

from securesplit.errors import PolicyDenied
from securesplit.policy.compare import said, value_at
from securesplit.policy.directions import CHANNELS, DIRECTIONS, UNSTATED, Direction
from securesplit.policy.load import faults
from securesplit.policy.orders import NoCommonValue
from securesplit.policy.schema import Channel, Policy
from securesplit.policy.table import at

__all__ = ["WORDS", "negotiate", "with_own_measures"]

WORDS = ("name", "purpose", "cost")
"""Keys for people."""


def negotiate(own: Policy, other: Policy) -> Policy:
    """The strictest of both, key by key.

    For each channel it has at most as many releases as either, each with at most either's part of the budget, and so at
    least either's noise over the clip. Clips and words are ``own``'s, or ``other``'s where ``own`` has none.

    Returns:
        ``own`` or ``other`` itself where that is the result but for words; the words of ``own`` otherwise.

    Raises:
        PolicyDenied: SS-2061 with every rule on which no value suits both.
    """
    made, refused = _mix(own, other)
    if made is None:
        raise PolicyDenied(
            "SS-2061",
            f"policies '{own.name}' and '{other.name}' have no common ground in {len(refused)} rule(s)",
            hint="Agree on these keys outside of the system; `securesplit policy negotiate` shows the outcome.",
            details=refused,
        )
    for one in (own, other):
        if made.model_copy(update={name: getattr(one, name) for name in WORDS}) == one:
            return one
    return made


def with_own_measures(own: Policy, other: Policy) -> Policy:
    """``other``, with the clips of ``own`` where both have the channel: a peer has no say in what noise is measured by."""
    raw: dict[str, Any] = other.model_dump(mode="python", exclude_none=True)
    for name in CHANNELS:
        one, two = at(own, "privacy", name), at(other, "privacy", name)
        if isinstance(one, Channel) and isinstance(two, Channel):
            raw["privacy"][name]["clip"] = one.clip
    made = Policy.model_validate(raw)
    return other if made == other else made


def _mix(own: Policy, other: Policy) -> tuple[Policy | None, tuple[str, ...]]:
    raw: dict[str, Any] = own.model_dump(mode="python", exclude_none=True)
    refused: list[str] = []
    one_is_unsafe = own.unsafe != other.unsafe
    if own.unsafe and one_is_unsafe:  # With the protection come the words that describe it.
        raw |= other.model_dump(mode="python", exclude_none=True, include={"privacy", *WORDS})
    for direction in DIRECTIONS:
        settled = one_is_unsafe and direction.path.startswith("privacy.")
        if settled or direction.path in WORDS or _absent(raw, direction) or _whole(own, other, direction):
            continue
        mine, theirs = value_at(own, direction), value_at(other, direction)
        try:
            _put(raw, direction, direction.order.strictest(mine, theirs))
        except NoCommonValue:
            refused.append(f"{direction.path}: {said(mine)} and {said(theirs)}; no value is as strict as both")
    if not one_is_unsafe:
        _divide(raw, own, other)
    if refused:
        return None, tuple(refused)
    try:
        return Policy.model_validate(raw), ()
    except ValidationError as error:  # Each key has a value, and together they are no policy.
        return None, faults(error)


def _whole(own: Policy, other: Policy, direction: Direction) -> bool:
    """Whether there is nothing to decide: the key's table is there in neither policy, or taken whole from the one that has it."""
    if not direction.parent:
        return False
    table = direction.parent.split(".")
    stated = [at(policy, *table) is not None for policy in (own, other)]
    return not (any(stated) if _made_of_keys(direction) else all(stated))


def _absent(raw: dict[str, Any], direction: Direction) -> bool:
    """Whether the table of this key is closed in what is being made."""
    return bool(direction.parent) and at(raw, *direction.parent.split(".")) is None and not _made_of_keys(direction)


def _made_of_keys(direction: Direction) -> bool:
    return direction.path in UNSTATED or direction.parent == "leakage"


def _put(raw: dict[str, Any], direction: Direction, value: object) -> None:
    *tables, key = direction.path.split(".")
    place = raw
    for name in tables:
        place = place.setdefault(name, {})
    if value is None:
        place.pop(key, None)
    elif hasattr(value, "model_dump"):
        place.setdefault(key, value.model_dump(mode="python", exclude_none=True))
    else:
        place[key] = value


def _divide(raw: dict[str, Any], own: Policy, other: Policy) -> None:
    """Releases and shares that leave no channel more than either policy: fewer of them, and none with a larger part.

    A share is a part of the smaller budget; one release's is ``share / releases``, rounded down where it is no float.
    """
    for name in CHANNELS:
        one, two = at(own, "privacy", name), at(other, "privacy", name)
        if not (isinstance(one, Channel) and isinstance(two, Channel) and at(raw, "privacy", name)):
            continue
        releases = min(one.releases, two.releases)
        part = min(Fraction(c.share) / c.releases for c in (one, two))
        share = _rounded_down(part * releases)
        raw["privacy"][name] |= {"releases": releases, "share": min(share, one.share, two.share)}


def _rounded_down(exact: Fraction) -> float:
    near = float(exact)
    return near if Fraction(near) <= exact else math.nextafter(near, 0.0)
