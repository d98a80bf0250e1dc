"""``securesplit runs``: what was trained, with what, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from securesplit.cli.claims import claim
from securesplit.cli.output import Output, show
from securesplit.cli.table import room, table

if TYPE_CHECKING:
    from securesplit.runs.compare import Figure, RunDiff
    from securesplit.runs.folder import ChannelLine, RunFolder
    from securesplit.runs.spent import Spent

app = typer.Typer(help="Runs: list them, show one, compare two.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="The --out folder of `securesplit train`.")]
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 60
_MOST = 1e15
"""Values beyond this are drawn as this: a file of another's making may hold sums that are no numbers."""
_DIGEST = 12


@app.command("ls")
def ls(
    folder: Annotated[Path, typer.Argument(help="Where runs lie; up to three levels below.")] = Path(),
    output: Output = "text",
) -> None:
    """List runs, oldest first: finished, running, interrupted or damaged."""
    from securesplit.runs.folder import list_runs

    runs = list_runs(folder)
    show(output, _table([_line(run) for run in runs]), {"runs": [_summary(run) for run in runs]})


@app.command("show")
def show_run(run: Folder, output: Output = "text") -> None:
    """Show one run: how it began, its losses, what it spent and what left."""
    from securesplit.runs.folder import read_run
    from securesplit.runs.metrics import read_metrics

    found, rows = read_run(run), read_metrics(run)
    curve = tuple(c for c in found.finished.curve if c is not None) if found.finished else rows.curve
    value = {
        **_summary(found), "curve": list(curve), "losses": list(rows.losses), "torn": rows.torn, "faults": [*found.faults],
        "about": None if found.about is None else found.about.model_dump(mode="json"),
        "record": None if found.finished is None else found.finished.model_dump(mode="json"),
    }  # fmt: skip
    show(output, "\n".join(_printable(_story(found, curve, rows.losses))), value)


@app.command("diff")
def diff(before: Folder, after: Folder, output: Output = "text") -> None:
    """Tell what differs between two runs: settings, the policy by effect, and what came out."""
    from securesplit.policy.compare import verdict
    from securesplit.runs.compare import compare_runs
    from securesplit.runs.folder import read_run

    found = compare_runs(read_run(before), read_run(after))
    show(
        output,
        "\n".join(_printable(_differences(found))),
        {
            "settings": [{"key": d.key, "before": d.before, "after": d.after} for d in found.settings],
            "policy": None if found.policy is None else {
                "effect": verdict(found.policy),
                "changes": [
                    {"path": c.path, "before": c.before, "after": c.after, "effect": c.effect} for c in found.policy
                ],
            },
            "metrics": [_figure(figure) for figure in found.figures],
        },
    )  # fmt: skip


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """Values as blocks from the least to the most; where there are more than fit, means of neighbours."""
    values = [min(_MOST, max(-_MOST, value)) for value in values]
    if not values:
        return ""
    count = min(width, len(values))
    cuts = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in means)


def _summary(run: RunFolder) -> dict[str, Any]:
    about, done = run.about, run.finished
    return {
        "name": run.path.name or str(run.path), "path": str(run.path), "state": run.state,
        "started": about.started.isoformat(timespec="seconds") if about else None,
        "job": about.job_name if about else None,
        "job_digest": about.job_digest if about else done.job if done else None,
        "policy": about.policy_name if about else done.policy if done else None,
        "policy_digest": about.policy_digest if about else done.policy_digest if done else None,
        "regime": about.regime if about else done.regime if done else None,
        "steps": run.steps, "loss": run.loss, **claim(run.spent),
    }  # fmt: skip


def _figure(figure: Figure) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": figure.name,
        "before": figure.before,
        "after": figure.after,
        "change": figure.change,
    }
    if figure.spent is not None:
        value |= {"claims": [claim(spent) for spent in figure.spent], "comparable": figure.comparable}
    return value


def _line(run: RunFolder) -> tuple[str, ...]:
    said = _summary(run)
    when = "-" if said["started"] is None else said["started"].replace("T", " ")[:16]
    return (
        str(said["path"]), when, said["job"] or (said["job_digest"] or "-")[:_DIGEST], said["policy"] or "-", said["regime"] or "-",
        str(run.steps), _number(run.loss), *_spent_cells(run.spent), run.state,
    )  # fmt: skip


def _spent_cells(spent: Spent) -> tuple[str, str, str, str]:
    if (said := spent.meaning) is None:
        return str(spent), "-", "-", "-"
    return _number(spent.epsilon), f"{said.delta:g}", said.unit, said.relation


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    if not lines:
        return "no runs"
    from securesplit.aggregate.findings import printable

    head = ("run", "began", "job", "policy", "regime", "steps", "loss", "epsilon", "delta", "unit", "relation", "state")
    return table([head, *(tuple(printable(cell) for cell in line) for line in lines)], room())


def _story(run: RunFolder, curve: Sequence[float], losses: Sequence[float]) -> list[str]:
    about, done = run.about, run.finished
    lines = [f"{run.path}: {run.state}, {run.steps} steps, loss {_number(run.loss)}, epsilon {run.spent}"]
    if about is not None:
        v, d = about.versions, about.data
        commit = f" at {v.commit[:_DIGEST]}" if v.commit else ""
        lines += [
            f"began     {about.started.isoformat(timespec='seconds')} as {about.client}, {about.tls}",
            f"job       {about.job_name} {about.job_digest[:_DIGEST]}",
            f"policy    {about.policy_name} {about.policy_digest[:_DIGEST]}, regime {about.regime}",
            f"data      {d.records} records in {d.batches} batches, {d.held_out} held out, named {d.digest[:_DIGEST]}",
            f"versions  securesplit {v.securesplit}{commit}, python {v.python}, torch {v.torch}, transformers {v.transformers}, peft {v.peft}",
            f"options   {', '.join(f'{o.name}={o.value}' for o in about.options)}",
        ]  # fmt: skip
    alone = tuple(c for c in (done.alone or ()) if c is not None) if done else ()
    for name, values in (("held-out", curve), ("alone", alone), ("steps", losses)):
        if values:
            lines.append(f"{name:<9} {sparkline(values)} {values[0]:.4f} -> {values[-1]:.4f}")
    if done is not None:
        if done.missed:
            lines.append(f"missed    {len(done.missed)} rounds, which went on without this client")
        lines.append(f"budget    epsilon {run.spent} by the record that has spent most")
        lines += [f"  {c.channel:<9} {c.releases} releases so far, {_of_channel(c, run.spent)}" for c in done.channels]
        lines += [f"  {c.channel:<9} {c.releases} sequences sent in this run, {c.bytes} bytes" for c in done.released]
        lines.append(f"wire      {done.bytes_up} bytes up, {done.bytes_down} down, {done.seconds:.1f} s")
    lines += [f"damaged: {fault}" for fault in run.faults]
    return lines


def _of_channel(line: ChannelLine, spent: Spent) -> str:
    return f"epsilon {spent if spent.meaning is None else f'{line.epsilon:.3f} {spent.meaning}'}"


def _differences(found: RunDiff) -> list[str]:
    lines = [f"{d.key}: {_value(d.before)} -> {_value(d.after)}" for d in found.settings]
    if found.policy is None:
        lines.append("policy: differs; one of the two is of a version that this one cannot read")
    else:
        lines += [f"policy {change.effect}: {change.line()}" for change in found.policy]
    return lines + [_told(figure) for figure in found.figures]


def _told(figure: Figure) -> str:
    change = "" if figure.change is None else f" ({_number(figure.change, '+')})"
    if figure.spent is None:
        return f"{figure.name}: {_number(figure.before)} -> {_number(figure.after)}{change}"
    before, after = figure.spent
    if figure.comparable:
        return f"epsilon: {_number(before.epsilon)} -> {_number(after.epsilon)}{change}, both {before.meaning}"
    return f"epsilon: {before} -> {after}; not one quantity, so not compared"


def _printable(lines: Sequence[str]) -> list[str]:
    """A run may be another's, and names in it may hold commands for a terminal."""
    from securesplit.aggregate.findings import printable

    return [printable(line) for line in lines]


def _value(value: object) -> str:
    return "absent" if value is None else str(value)


def _number(value: float | None, sign: str = "") -> str:
    """Whole numbers, such as bytes and steps, in full; others to six digits."""
    if value is None:
        return "-"
    return f"{value:{sign}.0f}" if float(value).is_integer() and abs(value) < _MOST else f"{value:{sign}.6g}"
