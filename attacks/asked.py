"""Texts whose membership in the training data is asked (O6), with the answer, which only the scorer keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from securesplit.errors import InputError

_MAX_FAULTS = 20


class Asked(BaseModel):
    """One line of a file of candidates.

    Attributes:
        text: what is asked about.
        member: whether it was trained on.
        canary: the name of a planted secret; its line and those of its random siblings carry the same name.
        space: how many strings of the secret's format there are; 0 for as many as are listed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)
    text: str
    member: bool
    canary: str = ""
    space: Annotated[int, Field(ge=0)] = 0


def read_asked(path: Path) -> tuple[Asked, ...]:
    """Read a jsonl file of candidates.

    Raises:
        InputError: SS-1710 when it cannot be read, breaks its schema, or lacks members or others. Messages name lines,
            never what stands there.
    """
    hint = 'One object a line: {"text": "...", "member": true}; members and others both.'
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("SS-1710", f"cannot read the candidates {path}: {type(error).__name__}", hint=hint) from None
    found, faults = [], []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append(Asked.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            faults.append(f"line {number}: {'.'.join(map(str, first['loc']))}: {first['type']}")
    if faults:
        raise InputError(
            "SS-1710", f"{path} has {len(faults)} fault(s)", hint=hint, details=tuple(faults[:_MAX_FAULTS])
        )
    if len({c.member for c in found}) < 2:
        raise InputError("SS-1710", f"{path} needs members and others, both", hint=hint)
    return tuple(found)


def shuffled(asked: Sequence[Asked], seed: int) -> tuple[Asked, ...]:
    """The same in the order of digests of seed and text, so that the order tells nothing of who is a member.

    Files tend to list members first, and an attack could read that from the places alone.
    """
    return tuple(sorted(asked, key=lambda a: hashlib.sha256(f"{seed}\0{a.text}".encode()).digest()))
