"""All faults of a file at once, each with file and line. A message names places and keys of the format, never content.

What a fault may say of an unknown key is that there is one: its name stands in the file, and a file with the wrong
columns has texts there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from securesplit.errors import InputError

__all__ = ["Faults"]

MOST = 1000
"""So many faults are listed; the rest is counted."""

_Model = TypeVar("_Model", bound=BaseModel)


class Faults:
    """Collects what is wrong.

    Args:
        hint: what to do, for whoever reads the report.
    """

    def __init__(self, hint: str) -> None:
        self._hint = hint
        self._listed: list[str] = []
        self._count = 0

    def add(self, path: Path, line: int | None, what: str) -> None:
        """Note a fault.

        Args:
            path: of the file.
            line: from 1; None where the whole file is meant.
            what: free of content.
        """
        self._count += 1
        if len(self._listed) < MOST:
            self._listed.append(f"{path}: {what}" if line is None else f"{path}:{line}: {what}")

    def checked(self, model: type[_Model], value: object, path: Path, line: int) -> _Model | None:
        """The value as a model, or None with all its faults noted."""
        try:
            return model.model_validate(value)
        except ValidationError as error:
            told: dict[str, list[str]] = {}
            for fault in error.errors(include_url=False, include_input=False, include_context=False):
                where, what = _told(model, fault["type"], fault["loc"], fault["msg"])
                told.setdefault(where, []).append(what)
            for where, whats in told.items():
                # One place may have several: of each of its types one, or of each key that is not known.
                self.add(path, line, f"{where}: {', or '.join(dict.fromkeys(whats))}")
            return None

    def done(self) -> None:
        """Nothing more to read.

        Raises:
            InputError: SS-1240 with every fault.
        """
        if not self._count:
            return
        more = self._count - len(self._listed)
        details = (*self._listed, f"and {more} more") if more else tuple(self._listed)
        raise InputError("SS-1240", f"the data has {self._count} fault(s)", hint=self._hint, details=details)


def _told(model: type[BaseModel], kind: str, place: tuple[int | str, ...], message: str) -> tuple[str, str]:
    known = _keys(model)
    if kind == "extra_forbidden":
        place, message = place[:-1], "has a key that the format does not know"
    elif kind == "value_error":
        message = message.removeprefix("Value error, ")
    elif kind in {"model_type", "model_attributes_type"}:
        message = "must be a JSON object"
    elif kind == "tuple_type":
        message = "must be a list"
    elif kind.startswith("string_pattern"):
        message = "has not the form that the format asks for"
    where = ".".join(str(part) for part in place if isinstance(part, int) or part in known)
    return where or "this entry", message


@cache
def _keys(model: type[BaseModel]) -> frozenset[str]:
    """All keys that the format knows, at any depth."""
    schema = model.model_json_schema()
    tables = (schema, *schema.get("$defs", {}).values())
    return frozenset(key for table in tables for key in table.get("properties", {}))
