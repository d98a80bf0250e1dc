"""The policy that a server offers in Welcome: canonical text, so that one policy has one spelling and one digest.

An offer only ever tightens; what a client makes of it is securesplit/agree.py.
"""

from __future__ import annotations

import json

from pydantic import ValidationError

from securesplit.errors import InputError, RemoteProtocolError
from securesplit.policy.schema import Policy

__all__ = ["MOST", "parse_offer", "require_short"]

MOST = 1 << 15
"""Longest text of an offer, in characters."""


def require_short(policy: Policy) -> None:
    """Refuse to serve a policy that no Welcome has room for.

    Raises:
        InputError: SS-1103.
    """
    if len(policy.canonical()) > MOST:
        raise InputError(
            "SS-1103", f"policy '{policy.name}' is too long to be offered to clients, over {MOST // 1024} KiB",
            hint="Shorten its words, its list of lengths or its roster.",
        )  # fmt: skip


def parse_offer(text: str) -> Policy | None:
    """The policy of a Welcome; None where the server offers none.

    Raises:
        RemoteProtocolError: SS-4030 when it is no policy, or not in its canonical form.
    """
    if not text:
        return None
    try:
        policy = Policy.model_validate(json.loads(text))
    except (ValueError, RecursionError, ValidationError):
        policy = None
    if policy is None or policy.canonical() != text.encode():
        raise RemoteProtocolError(
            "SS-4030",
            "the server's policy is none, or not in its canonical form",
            hint="Run the same release on both ends.",
        )
    return policy
