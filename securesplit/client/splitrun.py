"""A split run, as its clients' folders tell of it, as one row beside the baselines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from securesplit.client.comparison import Row, require_same_records
from securesplit.data.tasks.score import Measured
from securesplit.errors import InputError
from securesplit.measures.interval import Estimate
from securesplit.protocol.job import Job
from securesplit.runs.compare import job_differences
from securesplit.runs.folder import RunFolder, read_run
from securesplit.runs.losses import RecordLoss, read_losses
from securesplit.runs.spent import highest

__all__ = ["SplitRun", "parse_run", "split_row"]

_NAMED = re.compile(r"^([^=,/\\\x00-\x1f\x7f]{1,63})=(.+)$")
_NOT_TRAINING = ("job.name", "job.sums", "job.codec")


@dataclass(frozen=True, slots=True)
class SplitRun:
    """What a user gives: a name, or none, and one folder for each client."""

    name: str | None
    folders: tuple[Path, ...]


def parse_run(text: str) -> SplitRun:
    """``DIR,DIR,...`` or ``NAME=DIR,DIR,...``."""
    found = _NAMED.match(text)
    name, rest = (found[1], found[2]) if found else (None, text)
    return SplitRun(name, tuple(Path(part.strip()) for part in rest.split(",") if part.strip()))


def split_row(
    run: SplitRun,
    job: Job,
    ours: Sequence[Sequence[RecordLoss]],
    measures: tuple[Measured, ...],
    data: Sequence[Path] = (),
) -> Row:
    """The row of a finished run.

    Args:
        run: its folders, in the order of the clients' data.
        job: of the baselines.
        ours: the held-out records of the data here, for comparison; only places and lengths count.
        measures: of the run's own predictions, if there are any.
        data: each client's file, where folders in another order are to be found out.

    Raises:
        InputError: SS-1281, SS-1284 with every fault of every folder; SS-1285 for other records; SS-1286 for too few folders.
    """
    if len(run.folders) != len(ours):
        raise InputError(
            "SS-1286", f"run {run.name or run.folders[0]} has {len(run.folders)} folder(s) for {len(ours)} client(s)",
            hint="Give one folder for each --data, in the same order, as --run NAME=DIR,DIR,DIR.",
        )  # fmt: skip
    found = [read_run(folder) for folder in run.folders]
    unfinished = [f"{f.path}: {f.state}" for f in found if f.finished is None or f.about is None]
    if unfinished:
        raise InputError(
            "SS-1284", f"{len(unfinished)} folder(s) hold no finished run of this version",
            hint="Train again, or leave the run out.", details=tuple(unfinished),
        )  # fmt: skip
    _require_order(run, found, data)
    losses = [read_losses(folder) for folder in run.folders]
    name = run.name or f"split, {found[0].about.policy_name}"  # type: ignore[union-attr]
    require_same_records(name, losses, ours)
    return _row(name, job, found, losses, measures)


def _require_order(run: SplitRun, found: Sequence[RunFolder], data: Sequence[Path]) -> None:
    """No folder is of a run on another client's file, as far as names tell: records that are equally long would not show it."""
    names = [path.name for path in data]
    theirs = [
        next((str(o.value) for o in f.about.options if o.name == "data"), "") for f in found if f.about is not None
    ]
    faults = [
        f"client {number}: {folder} is of a run on a file {Path(said).name}, and stands beside --data {name}"
        for number, (folder, said, name) in enumerate(zip(run.folders, theirs, names, strict=False), 1)
        if Path(said).name != name and names.count(Path(said).name) == names.count(name) == 1
    ]
    if faults:
        raise InputError(
            "SS-1285", f"{len(faults)} folder(s) of run {run.name or run.folders[0]} stand beside another client's data",
            hint="Give the folders in the order of --data.", details=tuple(faults),
        )  # fmt: skip


def _row(
    name: str,
    job: Job,
    found: Sequence[RunFolder],
    losses: Sequence[tuple[RecordLoss, ...]],
    measures: tuple[Measured, ...],
) -> Row:
    done = [f.finished for f in found if f.finished is not None]
    about = [f.about for f in found if f.about is not None]
    spents = [f.spent for f in found]
    mixed = len({spent.meaning for spent in spents}) > 1
    keys = [d.key for a in about for d in job_differences(a.job, job.canonical())]  # Folders may be of several jobs.
    other = [key.removeprefix("job.") for key in dict.fromkeys(keys) if not key.startswith(_NOT_TRAINING)]
    samples = sum(round(d.steps / max(a.data.batches, 1) * a.data.records) for d, a in zip(done, about, strict=True))
    accuracies = [d.accuracy for d in done if d.accuracy is not None]
    if not measures and len(accuracies) == len(done):  # Each client's share of its own held-out records.
        counts = [len(loss) for loss in losses]
        value = sum(a * n for a, n in zip(accuracies, counts, strict=True)) / sum(counts)
        measures = (Measured("accuracy", Estimate(value, None, None, sum(counts))),)
    return Row(
        name=name, samples=samples, steps=sum(d.steps for d in done),
        spent=highest(spents),
        note="; ".join([
            f"regime {done[0].regime}", *([f"another job: {', '.join(other)}"] if other else []),
            *(["clients' epsilons differ in delta, unit or relation"] if mixed else []),
        ]),
        losses=tuple(loss for client in losses for loss in client), curve=_joint_curve(_curves(found), losses),
        measures=measures, seconds=max(d.seconds for d in done), bytes_up=sum(d.bytes_up for d in done),
        bytes_down=sum(d.bytes_down for d in done),
    )  # fmt: skip


def _curves(found: Sequence[RunFolder]) -> list[tuple[float, ...]]:
    """Each client's held-out losses, as far as they were numbers."""
    return [tuple(c for c in f.finished.curve if c is not None) for f in found if f.finished is not None]


def _joint_curve(curves: Sequence[tuple[float, ...]], losses: Sequence[tuple[RecordLoss, ...]]) -> tuple[float, ...]:
    """One curve over all clients' records: the mean, weighted by how many tokens each client predicts."""
    weights = [sum(record.tokens for record in client) for client in losses]
    total = sum(weights) or 1
    return tuple(
        sum(c * w for c, w in zip(point, weights, strict=True)) / total for point in zip(*curves, strict=False)
    )
