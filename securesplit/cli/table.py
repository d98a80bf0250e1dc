"""Tables for people: columns where they fit, else one block for each row."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

__all__ = ["room", "table"]

_GAP = "  "


def room() -> int | None:
    """Columns of the terminal; None where stdout is none, and lines may be of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(rows: Sequence[Sequence[str]], columns: int | None) -> str:
    """A head and its rows as aligned columns; where a line would not fit, each row by itself, with the names of its cells.

    Args:
        rows: the head first; all of one length, without control characters.
        columns: of the terminal; None for no limit.
    """
    from rich.cells import cell_len  # Chinese characters take two columns.

    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    if columns is None or sum(widths) + len(_GAP) * (len(widths) - 1) <= columns:
        padded = (
            (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)) for row in rows
        )
        return "\n".join(_GAP.join(line).rstrip() for line in padded)
    head, *others = rows
    return "\n".join(_block(head, row, columns) for row in others)


def _block(head: Sequence[str], row: Sequence[str], columns: int) -> str:
    """The first cell, and under it the others that say anything; a name and its cell stay together where they fit."""
    said = [
        f"{name} {cell}".replace(" ", "\0")
        for name, cell in zip(head[1:], row[1:], strict=True)
        if cell not in ("", "-")
    ]
    lines = textwrap.wrap(
        ", ".join(said), max(columns - len(_GAP), 20), break_long_words=False, break_on_hyphens=False
    )  # fmt: skip
    return "\n".join([row[0], *(_GAP + line.replace("\0", " ") for line in lines)])
