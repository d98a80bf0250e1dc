"""``securesplit baseline``: what splitting and protecting cost, against training without them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from securesplit.cli.choices import Ids, Split, TaskName, TemplateName
from securesplit.cli.claims import claim
from securesplit.cli.computing import Threads, take
from securesplit.cli.connection import Cache, Model, Policy, cache_or_default
from securesplit.cli.output import Output, require_usable, show
from securesplit.cli.progress import ProgressStyle, reporting
from securesplit.cli.table import room, table
from securesplit.errors import InputError

if TYPE_CHECKING:
    from securesplit.client.baseline import Comparison
    from securesplit.client.comparison import Compared
    from securesplit.measures.interval import Estimate

_NAMES = ("unsplit", "plain", "client-only", "fedavg")
_USUAL = ("unsplit", "client-only", "fedavg")
_FEW = 20
_FILE, _PAGE = "baseline.json", "baseline.html"


def baseline(
    job: Annotated[Path, typer.Option(help="The job file of the split run.")],
    policy: Policy,
    data: Annotated[list[Path], typer.Option(help="Private text of one client; again for each further client.")],
    out: Annotated[Path, typer.Option(help="Folder for baseline.json and baseline.html.")],
    run: Annotated[
        list[str] | None,
        typer.Option(
            help="A split run: [NAME=]DIR,DIR,... with the --out folder of each client, in the order of --data."
        ),
    ] = None,
    predictions: Annotated[
        list[str] | None,
        typer.Option(help="With --task: FILE,FILE,... with a run's answers, one file a client; once for each --run."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Train this baseline, of {', '.join(_NAMES)}; again for more. By default all but plain."),
    ] = None,
    held_out: Annotated[
        int, typer.Option(min=1, help="As in the split run: records of each client for evaluation.")
    ] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="As in the split run: use at most so many records.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="As in the split run: cut records here.")] = None,
    task: TaskName = None,
    template: TemplateName = "plain",
    ids: Ids = None,
    split: Split = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="With --task: at most so many tokens an answer; 0 asks for no answers.", min=0)
    ] = 16,
    model: Model = None,
    cache: Cache = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the comparison that --out holds.")] = False,
    threads: Threads = 0,
    progress: ProgressStyle = "auto",
    output: Output = "text",
) -> None:
    """Train the job's baselines on files that lie here, and show them beside split runs, with intervals.

    Nothing is sent and nothing is charged. The policy gives the lengths that batches are made of.
    """
    os.umask(0o077)
    kinds = _kinds(only)
    if (out / _FILE).exists() and not overwrite:
        raise InputError("SS-1280", f"{out} holds a comparison", hint="Name another --out, or add --overwrite.")
    require_usable(out)

    from securesplit.client.baseline import KINDS, Wanted, compare_baselines
    from securesplit.client.splitrun import parse_run
    from securesplit.data.tasks.chosen import Chosen
    from securesplit.pki.files import write_atomically
    from securesplit.policy.load import load_policy
    from securesplit.protocol.job import load_job
    from securesplit.report.comparison import CurveLine, comparison_page

    take(threads)
    wanted = Wanted(
        job=load_job(job), policy=load_policy(policy), data=tuple(data), held_out=held_out, limit=limit, max_tokens=max_tokens,
        tasked=None if task is None else Chosen(task, template, ids, split), runs=tuple(parse_run(text) for text in run or ()),
        predictions=tuple(tuple(Path(f) for f in text.split(",")) for text in predictions or ()),
        kinds=tuple(kind for kind in KINDS if kind in kinds), max_new_tokens=max_new_tokens, model=model, cache=cache_or_default(cache),
    )  # fmt: skip
    with reporting(progress) as report:
        found = compare_baselines(wanted, report)
    values = _values(found)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    head, *lines = _cells(found)
    lines_of = [CurveLine(c.row.name, c.row.curve) for c in found.rows]
    page = comparison_page(title=wanted.job.name, about=_about(found), head=head, rows=lines, curves=lines_of)
    write_atomically(out / _PAGE, page.encode(), mode=0o600)
    records = [
        {"name": c.row.name, "records": [r.model_dump() for r in c.row.losses], "steps": list(steps)}
        for c, steps in zip(found.rows, found.losses, strict=True)
    ]
    write_atomically(out / _FILE, json.dumps({**values, "held_out_losses": records}, indent=1).encode(), mode=0o600)
    show(output, _text(found), {**values, "path": str(out)})


def _kinds(only: list[str] | None) -> tuple[str, ...]:
    unknown = sorted(set(only or ()) - set(_NAMES))
    if unknown:
        raise typer.BadParameter(f"no baseline is called {', '.join(unknown)}; there are {', '.join(_NAMES)}")
    return tuple(only) if only else _USUAL


def _values(found: Comparison) -> dict[str, Any]:
    return {
        "reference": found.reference, "records": found.records, "held_out": found.held_out, "groups": found.groups,
        "rows": [_row(compared) for compared in found.rows],
    }  # fmt: skip


def _row(compared: Compared) -> dict[str, Any]:
    row = compared.row
    return {
        "name": row.name, "note": row.note, "samples": row.samples, "steps": row.steps, **claim(row.spent),
        "loss": compared.loss.value, "ci95": _pair(compared.loss),
        "difference": None if compared.difference is None else compared.difference.value,
        "difference_ci95": None if compared.difference is None else _pair(compared.difference),
        "metrics": {m.name: m.estimate.value for m in row.measures},
        "intervals": {m.name: _pair(m.estimate) for m in row.measures},
        "curve": list(row.curve), "seconds": row.seconds, "bytes_up": row.bytes_up, "bytes_down": row.bytes_down,
    }  # fmt: skip


def _pair(found: Estimate) -> list[float] | None:
    return None if found.low is None or found.high is None else [found.low, found.high]


def _about(found: Comparison) -> str:
    few = f"; {found.groups} groups are few: such intervals are too narrow" if found.groups < _FEW else ""
    return (
        f"{found.records} records learnt, {found.held_out} held out in {found.groups} groups; held-out loss in nats per token, "
        f"intervals of 95 % by bootstrap over groups; differences to '{found.reference}', paired{few}"
    )


def _cells(found: Comparison) -> list[list[str]]:
    """The table: a head, and a row for each model."""
    measures = list(dict.fromkeys(m.name for c in found.rows for m in c.row.measures))
    head = [
        "model",
        "samples",
        "steps",
        "epsilon",
        "loss",
        f"less {found.reference}",
        *measures,
        "seconds",
        "MB up",
        "MB down",
        "note",
    ]
    rows = []
    for compared in found.rows:
        row, known = compared.row, {m.name: m.estimate for m in compared.row.measures}
        rows.append([
            row.name, str(row.samples), str(row.steps),
            "none" if row.spent.bound == "none" else str(row.spent),
            _said(compared.loss), "" if compared.difference is None else _said(compared.difference, sign="+"),
            *(_said(known[name]) if name in known else "-" for name in measures),
            f"{row.seconds:.1f}", f"{row.bytes_up / 1e6:.2f}", f"{row.bytes_down / 1e6:.2f}", row.note,
        ])  # fmt: skip
    return [head, *rows]


def _said(found: Estimate, sign: str = "") -> str:
    value = f"{found.value:{sign}.4f}"
    return value if found.low is None else f"{value} [{found.low:{sign}.4f}, {found.high:{sign}.4f}]"


def _text(found: Comparison) -> str:
    from securesplit.aggregate.findings import printable

    cells = [[printable(cell) for cell in row] for row in _cells(found)]  # Of runs that may be another's.
    return f"{_about(found)}\n{table(cells, room())}"
