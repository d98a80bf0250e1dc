"""``securesplit attack report`` and ``compare``: pages and differences from the JSON that runs and sweeps wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securesplit.cli.output import Output, show

if TYPE_CHECKING:
    from attacks.report import Report
    from attacks.sweep import Sweep


def report(
    *,
    run: Annotated[Path | None, typer.Option("--report", help="report.json of `attack run --out`.")] = None,
    sweep: Annotated[Path | None, typer.Option(help="sweep.json of `attack sweep`.")] = None,
    out: Annotated[Path, typer.Option(help="New directory for the Markdown and HTML pages.")],
    output: Output = "text",
) -> None:
    """Write Markdown and one self-contained HTML page from a run's or a sweep's figures. They hold no texts."""
    from attacks.folder import write_folder, write_sweep_folder
    from securesplit.errors import InputError

    if (run is None) == (sweep is None):
        raise InputError("SS-1715", "give --report or --sweep, and not both", hint="One page is about one thing.")
    if run is not None:
        write_folder(read_report(run), out, texts=False)
    elif sweep is not None:
        write_sweep_folder(_read_sweep(sweep), out)
    show(output, f"wrote {out}", {"path": str(out)})


def compare(
    before: Annotated[Path, typer.Argument(help="report.json of the first run.")],
    after: Annotated[Path, typer.Argument(help="report.json of the second run.")],
    output: Output = "text",
) -> None:
    """What the attacks got in one run against another, and whether the difference is more than chance."""
    from attacks.compare import compare as compared

    found = compared(read_report(before), read_report(after))
    rows = [
        f"{d.name:20} {_cell(d.before)} {_cell(d.after)} {_cell(d.change, sign=True)}  "
        + ({True: "clear", False: "within intervals", None: "not comparable"}[d.clear])
        for d in found.attacks
    ]
    changed = [f"differs: {line}" for line in found.settings]
    head = f"{'attack':20} {'before':>8} {'after':>8} {'change':>8}"
    text = "\n".join((head, *rows, "", f"Worst: {found.worst_before:.3f} -> {found.worst_after:.3f}", *changed))
    show(output, text, found.model_dump(mode="json"))


def _cell(value: float | None, *, sign: bool = False) -> str:
    return f"{'-' if value is None else f'{value:+.3f}' if sign else f'{value:.3f}':>8}"


def read_report(path: Path) -> Report:
    """Read a run's figures.

    Raises:
        InputError: SS-1715 when the file is none.
    """
    from attacks.report import Report
    from securesplit.errors import InputError

    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            "SS-1715",
            f"{path} is no report of this release: {type(error).__name__}",
            hint="Name the report.json of `attack run --out`.",
        ) from None


def _read_sweep(path: Path) -> Sweep:
    from attacks.sweep import Sweep
    from securesplit.errors import InputError

    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        for cell in raw["cells"]:
            cell["report"]["examples"] = []
        return Sweep.model_validate_json(json.dumps(raw))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "SS-1715",
            f"{path} is no sweep of this release: {type(error).__name__}",
            hint="Name the sweep.json of `attack sweep`.",
        ) from None
