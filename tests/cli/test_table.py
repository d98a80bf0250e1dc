"""Tables: aligned as a terminal shows them, and never wider than it is."""

from __future__ import annotations

import unicodedata

import pytest

from securesplit.cli.table import table

HEAD = ("run", "began", "policy", "epsilon", "note")
ROWS = [
    HEAD,
    ("lab/病历", "2026-11-22 20:23", "lab", "none: UNSAFE", "regime open"),
    ("lab/alice", "2026-11-22 20:24", "balanced", "7.5", ""),
    ("x", "-", "p", "-", "-"),
]


def cells(text: str) -> int:
    """Columns that a terminal needs, by Unicode's own table of widths."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def test_columns_begin_below_each_other_whatever_the_script():
    lines = table(ROWS, None).split("\n")
    assert len(lines) == 4
    for column, heading in ((1, "began"), (2, "policy"), (3, "epsilon")):
        start = lines[0].index(heading)
        for line, row in zip(lines[1:], ROWS[1:], strict=True):
            assert cells(line[: line.index(row[column], 1)]) == start or row[column] == "-"


@pytest.mark.parametrize("columns", [30, 40, 60])
def test_what_does_not_fit_becomes_blocks_without_losing_anything(columns: int):
    text = table(ROWS, columns)
    assert all(cells(line) <= columns for line in text.split("\n"))
    for row in ROWS[1:]:
        assert row[0] in text.split("\n")
        for name, cell in zip(HEAD[1:], row[1:], strict=True):
            assert f"{name} {cell}" in text or cell in ("", "-")
    assert "-," not in text


def test_what_fits_exactly_stays_a_table():
    wide = table(ROWS, None)
    width = max(map(cells, wide.split("\n")))
    assert table(ROWS, width) == wide
    assert table(ROWS, width - 1) != wide
