"""The benchmark's page: tables from finished cells, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from scripts.span.cells import Cell, Score, mean

__all__ = ["page"]

_HEADS = {
    "textbook": "## The textbook: a plain gradient of one client, span check",
    "textbook clients": "## The same, summed over clients: 16 tokens each",
    "first": "## What clients send in the first round, span check",
    "bag": "## What clients send in the first round, update-bag",
    "later": "## A later round: factor A learns, B stands where the first sum left it",
    "noise": "## Clipped and noised, as in regime `round`",
}


def page(results: Sequence[tuple[Cell, Sequence[Score]]], words: dict[str, str], made: str) -> str:
    """The whole page.

    Args:
        results: finished cells with their draws, in the order of the tables.
        words: paragraphs: ``head`` above all tables, ``foot`` below, and one by a table's name below that table.
        made: on what it was measured.
    """
    parts = [words["head"].strip()]
    for table, head in _HEADS.items():
        rows = [(cell, scores) for cell, scores in results if cell.table == table]
        if rows:
            parts += [head, "\n".join(_rows(rows))]
            if table in words:
                parts.append(words[table].strip())
    return "\n\n".join([*parts, made.strip(), words["foot"].strip()]) + "\n"


def _rows(rows: Sequence[tuple[Cell, Sequence[Score]]]) -> list[str]:
    lines = [
        "| attack | rank | clients x records x tokens | sent | bag: recall | precision | by the prior alone | positions | attack, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, scores in rows:
        positions = f"{mean(scores, 'positions'):.2f}" if cell.attack == "span" else ""
        claimed = mean(scores, "claimed")
        precision = f"{mean(scores, 'precision'):.2f}" if claimed else "nothing claimed"
        lines.append(
            f"| {cell.attack} | {cell.rank} | {cell.clients} x {cell.records} x {cell.length} | {_sent(cell)} "
            f"| **{mean(scores, 'recall'):.2f}** | {precision} | {mean(scores, 'prior'):.2f} | {positions} "
            f"| {mean(scores, 'seconds'):.0f} |"
        )
    return lines


def _sent(cell: Cell) -> str:
    if cell.how == "gradient":
        return "gradient, float32"
    if cell.how == "clipped":
        return f"gradients, clipped, sigma = {cell.sigma:g} C"
    weights = "weights 1" if cell.weights == "uniform" else "weights up to 255"
    both = "; both rounds together" if cell.joint else ""
    return f"{cell.steps} step{'s' if cell.steps > 1 else ''} of AdamW, {weights}{both}"


def as_rows(results: Sequence[tuple[Cell, Sequence[Score]]]) -> list[dict[str, object]]:
    """For the JSON file: one object per cell."""
    return [{"cell": asdict(cell), "draws": [asdict(found) for found in scores]} for cell, scores in results]
