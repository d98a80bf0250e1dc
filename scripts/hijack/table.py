"""Finished cells to the tables of docs/benchmarks/hijack.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

CELLS = (
    *(f"detect:{cell}" for cell in ("1e-3:none", "1e-3:balanced", "1e-4:none", "3e-3:none", "1e-3:strict", "3e-3:balanced")),
    *(f"worth:{variant}:none" for variant in ("published", "full", "known text", "discriminator")),
    *(f"worth:{variant}:balanced" for variant in ("published", "known text")),
    *(f"worth:{variant}:37" for variant in ("published", "honest", "full", "known text", "discriminator", "half", "edge")),
)  # fmt: skip


def tables(cells: Sequence[dict[str, Any]]) -> str:
    """Detection, then worth, as Markdown."""
    watched = [c for c in cells if "detection" in c]
    read = [c for c in cells if "worth" in c]
    return "\n\n".join(part for part in (_alarms(watched), _caught(watched), _worth(read)) if part)


def _name(cell: dict[str, Any]) -> str:
    _, rate, noise = cell["cell"].split(":")
    return f"{float(rate):g}, {noise}"


def _alarms(cells: Sequence[dict[str, Any]]) -> str:
    if not cells:
        return ""
    columns = (
        "server's learning rate, noise", "watched honest steps", "false alarms", "likeness of outputs, first 20 / last 20",
        "of gradients, first 20 / last 20", "least in a step", "blunt",
    )  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for cell in cells:
        steps, found = cell["steps"], cell["detection"]
        outputs, gradients = [s["outputs"] for s in steps], [max(0.0, sum(s["honest"][:2]) / 2) for s in steps]
        ends = " | ".join(f"{_mean(v[:20]):.2f} / {_mean(v[-20:]):.2f}" for v in (outputs, gradients))
        rows.append(
            f"| {_name(cell)} | {found['watched']} | {found['false_alarms']} | {ends} | {min(gradients):.2f} | {found['blunt']:.0%} |"
        )
    return "\n".join(rows)


def _caught(cells: Sequence[dict[str, Any]]) -> str:
    if not cells:
        return ""
    variants = list(cells[0]["detection"]["caught"])
    rows = ["| hijack | " + " | ".join(map(_name, cells)) + " |", "|---" * (len(cells) + 1) + "|"]
    for variant in variants:
        entries = [cell["detection"]["caught"].get(variant) for cell in cells]
        told = " | ".join(f"{e['rate']:.2f} ({_count(e['watched'])})" if e else "not run" for e in entries)
        rows.append(f"| {variant} | {told} |")
    return "\n".join(rows)


def _worth(cells: Sequence[dict[str, Any]]) -> str:
    if not cells:
        return ""
    rows = ["| noise (mu) | hijack | recovery | ridge | trap | guess | ceiling |", "|---|---|---|---|---|---|---|"]
    for cell in cells:
        w, noise = cell["worth"], cell["cell"].split(":")[2]
        trap = "" if w["trap"] is None or math.isnan(w["trap"]) else f"{w['trap']:.3f}"
        rows.append(
            f"| {noise} ({cell['mu']:.2f}) | {w['variant']} | {w['recovery']:.3f} ± {_error(w['hits']):.3f} | {w['ridge']:.3f} | {trap} "
            f"| {w['kappa']:.3f} | {w['bound']:.3f} |"
        )
    return "\n".join(rows)


def _error(hits: Sequence[int], length: int = 24) -> float:
    """Standard error over sequences."""
    mean = _mean(hits)
    return math.sqrt(_mean([(h - mean) ** 2 for h in hits]) / max(1, len(hits) - 1)) / length


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _count(watched: float) -> str:
    return "never" if watched == math.inf else f"{watched:g}"
