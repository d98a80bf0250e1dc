"""The registry of error codes: what each means and what to do, from the packaged file codes.toml.

The registry is prose about codes, never about a run: nothing private can stand in it. docs/errors.md is written from the
same file, and a test holds the file to the codes that the source raises.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from securesplit.errors import InputError

__all__ = ["Explained", "explain_code", "explained_codes"]


@dataclass(frozen=True, slots=True)
class Explained:
    """One code.

    Attributes:
        code: ``SS-nnnn``.
        meaning: what happened, in plain words.
        action: what to do.
        exit: status of a process that ends by raising it; one from the other side ends a client with its family's.
    """

    code: str
    meaning: str
    action: str
    exit: int


@cache
def explained_codes() -> tuple[Explained, ...]:
    """All codes of this release, rising."""
    raw = tomllib.loads(files("securesplit").joinpath("codes.toml").read_text(encoding="utf-8"))
    return tuple(
        Explained(code=code, meaning=entry["meaning"], action=entry["action"], exit=entry["exit"])
        for code, entry in sorted(raw.items())
    )


def explain_code(code: str) -> Explained:
    """What a code means.

    Args:
        code: such as ``SS-3205``; lower case and surrounding blanks are forgiven.

    Raises:
        InputError: SS-1150 when this release has no such code.
    """
    wanted = code.strip().upper()
    for found in explained_codes():
        if found.code == wanted:
            return found
    raise InputError(
        "SS-1150",
        f"{code[:20]!r} is no error code of this release",
        hint="Codes look like SS-3205; docs/errors.md lists them all.",
    )
