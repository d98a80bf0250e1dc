"""Every error the product raises on purpose, on one screen.

    SecureSplitError
    ├── InputError            SS-1xxx  exit 2   what the user gave cannot be used
    ├── CheckFailed           SS-15xx  exit 1   a check ran and its answer is no
    ├── PolicyDenied          SS-2xxx  exit 3   well formed, but the policy forbids it
    ├── ConnectionFailed      SS-3xxx  exit 4   network, TLS or identity
    ├── ProtocolError         SS-4xxx  exit 5
    │   ├── LocalProtocolError                  we broke the rules: a bug on this side
    │   └── RemoteProtocolError                 the peer broke them
    ├── BudgetExhausted       SS-5xxx  exit 6   the ledger refuses; nothing was sent
    ├── AggregationAborted    SS-6xxx  exit 5   a secure-aggregation round ended without a sum
    └── LeakageExceeded       SS-7xxx  exit 7   a measured leak is above what the policy accepts

Rules. A message says what happened; the hint says what to do. Neither ever holds text, tokens, tensors or keys.
A peer is told a code and nothing else.
"""

from __future__ import annotations

import re
from typing import ClassVar

_CODE = re.compile(r"^SS-[0-9]{4}$")


class SecureSplitError(Exception):
    """Root of the tree.

    Args:
        code: stable identifier, ``SS-`` and four digits; documented in docs/errors.md.
        what: one sentence on what happened, free of private content.
        hint: one sentence on what to do next.
        details: further faults of the same input, when there are several; all are shown at once.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, code: str, what: str, *, hint: str = "", details: tuple[str, ...] = ()) -> None:
        if not _CODE.fullmatch(code):
            raise ValueError(f"not an error code: {code!r}")
        super().__init__(what)
        self.code = code
        self.what = what
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        return f"[{self.code}] {self.what}"


class InputError(SecureSplitError):
    """What the user gave (a file, an option, a model) cannot be used."""

    exit_code = 2


class CheckFailed(SecureSplitError):
    """A check was carried out and its answer is no."""

    exit_code = 1


class PolicyDenied(SecureSplitError):
    """The request is well formed, but a policy forbids it."""

    exit_code = 3


class ConnectionFailed(SecureSplitError):
    """The network, TLS or the identity of the other side failed."""

    exit_code = 4


class ProtocolError(SecureSplitError):
    """A message or an order of messages breaks docs/protocol.md."""

    exit_code = 5


class LocalProtocolError(ProtocolError):
    """This side tried to do something the protocol does not allow now; a bug, never the peer's fault."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something the protocol does not allow; its connection is closed with the code."""


class BudgetExhausted(SecureSplitError):
    """The privacy ledger refuses the release. Nothing was noised, nothing was sent."""

    exit_code = 6


class AggregationAborted(SecureSplitError):
    """A secure-aggregation round ended without a sum. No partial or wrong sum is ever returned."""

    exit_code = 5


class LeakageExceeded(SecureSplitError):
    """An attack recovered more than the policy accepts."""

    exit_code = 7


def raised_for(code: str) -> type[SecureSplitError]:
    """The class to raise for a code that a peer gave: what it refused is what this side was denied."""
    families: dict[str, type[SecureSplitError]] = {
        "SS-2": PolicyDenied,
        "SS-3": ConnectionFailed,
        "SS-6": AggregationAborted,
    }
    return families.get(code[:4], RemoteProtocolError)
