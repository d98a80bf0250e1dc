"""Where in a policy file a fault is: table, key and line, found from the fault's own path."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Fault", "located"]

_TABLE = re.compile(r"^\s*\[([A-Za-z0-9_.\- ]+)\]\s*(#.*)?$")
_KEY = re.compile(r"^\s*([A-Za-z0-9_-]+)\s*=")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        table: such as ``privacy.activations``; empty for the file's own keys.
        key: its last part; None where a rule between keys is broken, or a table is missing.
        line: of the key, or of its table's head; None where neither is there.
        what: what is wrong.
    """

    table: str
    key: str | None
    line: int | None
    what: str


def located(text: str, faults: tuple[str, ...]) -> tuple[Fault, ...]:
    """Place the faults of :func:`securesplit.policy.load.faults` in the file that they are of.

    Args:
        text: the file's content; TOML that parses, or close to it. A key that is written in another way than ``key = value``
            under its ``[table]`` is not found, and has no line.
        faults: lines of the form ``path: what is wrong``.
    """
    lines = _lines(text)
    found = []
    for fault in faults:
        path, _, what = fault.partition(": ")
        path = "" if path == "policy" else path
        table, _, key = path.rpartition(".")
        whole = path in lines.tables or not key
        if whole:
            found.append(Fault(path, None, lines.tables.get(path), what))
        else:
            at = lines.keys.get((table, key)) or lines.tables.get(table)
            found.append(Fault(table, key, at, what))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Lines:
    tables: dict[str, int]
    keys: dict[tuple[str, str], int]


def _lines(text: str) -> _Lines:
    found = _Lines({}, {})
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if head := _TABLE.match(line):
            table = head[1].replace(" ", "")
            found.tables.setdefault(table, number)
        elif key := _KEY.match(line):
            found.keys.setdefault((table, key[1]), number)
    return found
