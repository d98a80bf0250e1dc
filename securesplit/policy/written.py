"""A policy back to a TOML file, without comments; and files that replace nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from securesplit.errors import InputError
from securesplit.policy.schema import Policy

__all__ = ["write_new", "written"]


def written(policy: Policy) -> str:
    """The policy as TOML; parsing it gives the same digest."""
    lines: list[str] = []
    _table(policy.model_dump(mode="json", exclude_none=True), (), lines)
    return "\n".join(lines) + "\n"


def _table(values: Mapping[str, object], path: tuple[str, ...], lines: list[str]) -> None:
    if path:
        lines += ["", f"[{'.'.join(path)}]"]
    # JSON's spelling of strings, numbers, booleans and lists is TOML's too; a float keeps its point or its exponent.
    lines += [f"{key} = {_value(value)}" for key, value in values.items() if not isinstance(value, Mapping)]
    for key, value in values.items():
        if isinstance(value, Mapping):
            _table(value, (*path, key), lines)


def _value(value: object) -> str:
    # JSON would spell characters beyond the first plane as two halves, which TOML refuses, and leave DEL as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet.

    Raises:
        InputError: SS-1121 when it exists or cannot be written.
    """
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o644)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError("SS-1121", f"{path} exists", hint="Name another file; nothing is replaced.") from None
    except OSError as error:
        raise InputError(
            "SS-1121", f"cannot write {path}: {type(error).__name__}", hint="Check the folder and its mode."
        ) from None
