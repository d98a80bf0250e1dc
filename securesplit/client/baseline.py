"""Baselines of a job: the same adapters, steps and batches without a split, without a server, or without secure sums.

``unsplit`` and ``plain``: securesplit/client/pooled.py. ``fedavg``: securesplit/client/federated.py. ``client-only``:
securesplit/client/alone.py, each client for itself. All of it runs in this process, on files that lie here; where clients' texts
may not lie in one place, ``unsplit`` cannot be measured, and each site can run ``client-only`` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from securesplit.client.alone import train_ends
from securesplit.client.comparison import Compared, Row, compare_rows, require_finite
from securesplit.client.federated import train_federated
from securesplit.client.heldout import Asked, Judged, Site, judge, lengths, measured, predicted, read_site
from securesplit.client.joined import Joined
from securesplit.client.pooled import Fitted, Texts, train_pooled
from securesplit.client.splitrun import SplitRun, split_row
from securesplit.client.train import Progress
from securesplit.data.tasks.chosen import Chosen
from securesplit.errors import InputError
from securesplit.model.manifest import read_manifest
from securesplit.model.plan import CutPlan
from securesplit.model.resolve import resolve_model
from securesplit.model.store import load_tokenizer
from securesplit.policy.schema import Policy
from securesplit.protocol.job import Job
from securesplit.runs.spent import NO_BOUND

__all__ = ["KINDS", "Comparison", "Kind", "Wanted", "compare_baselines"]

Kind = Literal["unsplit", "plain", "client-only", "fedavg"]
KINDS: tuple[Kind, ...] = ("unsplit", "plain", "client-only", "fedavg")
_NOTES: dict[Kind, str] = {
    "unsplit": "all texts in one place; the split's own steps",
    "plain": "all texts in one place; both factors, one optimiser",
    "client-only": "A and C without B; each client for itself",
    "fedavg": "the whole model at every client; plain sums",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to compare; the fields are options of ``securesplit baseline``.

    Attributes:
        data: one file for each client.
        runs: split runs of the same clients, in the order of ``data``.
        predictions: for each run, one file of answers for each client; empty for none.
        max_new_tokens: of an answer, where there is a task; 0 for no answers.
    """

    job: Job
    policy: Policy
    data: tuple[Path, ...]
    held_out: int
    limit: int | None
    max_tokens: int | None
    tasked: Chosen | None
    runs: tuple[SplitRun, ...]
    predictions: tuple[tuple[Path, ...], ...]
    kinds: tuple[Kind, ...]
    max_new_tokens: int
    model: str | None
    cache: Path


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome.

    Attributes:
        rows: runs first, then the baselines in the order of :data:`KINDS`.
        reference: name of the row that the others are compared with: the first run, else the first baseline.
        records, held_out, groups: how many.
        losses: of every step, by row; empty for runs.
    """

    rows: tuple[Compared, ...]
    reference: str
    records: int
    held_out: int
    groups: int
    losses: tuple[tuple[float, ...], ...]


def compare_baselines(wanted: Wanted, progress: Progress) -> Comparison:
    """Train the baselines, read the runs, and compare all on the same held-out records.

    Raises:
        InputError: SS-1286 for options that do not fit each other; SS-1281, SS-1284, SS-1285 for runs; what data, model and
            task raise.
    """
    _require_options(wanted)
    job = wanted.job
    directory = resolve_model(wanted.model or job.model, wanted.cache, CutPlan(front=job.cut.front, back=job.cut.back))
    tokenizer = load_tokenizer(directory)
    asked = Asked(
        job, wanted.policy, wanted.held_out, wanted.limit, wanted.max_tokens, wanted.tasked, wanted.max_new_tokens
    )
    sites = tuple(read_site(asked, path, tokenizer, read_manifest(directory).digest) for path in wanted.data)
    ours = [lengths(site) for site in sites]
    rows = [
        split_row(run, job, ours, predicted(sites, wanted.predictions[i] if wanted.predictions else ()), wanted.data)
        for i, run in enumerate(wanted.runs)
    ]
    # Before hours of training, whose rows would be lost with these.
    require_finite(rows)
    _require_names([*(row.name for row in rows), *wanted.kinds])
    steps: list[tuple[float, ...]] = [() for _ in rows]
    for kind in KINDS:
        if kind in wanted.kinds:
            row, losses = _train(kind, wanted, directory, sites, tokenizer, progress)
            rows.append(row)
            steps.append(losses)
    groups = [f"{i}/{group}" for i, site in enumerate(sites) for group in site.groups]
    compared = compare_rows(rows, groups, 0)
    return Comparison(
        compared, rows[0].name, sum(site.texts.records for site in sites), len(groups), len(set(groups)), tuple(steps)
    )


def _require_options(wanted: Wanted) -> None:
    faults = []
    if wanted.predictions and wanted.tasked is None:
        faults.append("--predictions needs --task, whose measure judges them")
    if wanted.predictions and len(wanted.predictions) != len(wanted.runs):
        faults.append(f"{len(wanted.predictions)} --predictions for {len(wanted.runs)} --run")
    faults += [
        f"--predictions {number}: {len(files)} file(s) for {len(wanted.data)} client(s)"
        for number, files in enumerate(wanted.predictions, 1)
        if len(files) != len(wanted.data)
    ]
    if not wanted.kinds and not wanted.runs:
        faults.append("nothing to compare: no baseline and no run")
    if faults:
        raise InputError(
            "SS-1286", f"the options of the comparison have {len(faults)} fault(s)", details=tuple(faults),
            hint="Give each --run one folder, and each --predictions one file, for each --data, in the same order.",
        )  # fmt: skip


def _require_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            "SS-1286", f"{len(twice)} name(s) stand twice in the table", details=tuple(twice),
            hint="Name each run: --run NAME=DIR.",
        )  # fmt: skip


def _train(
    kind: Kind, wanted: Wanted, directory: Path, sites: Sequence[Site], tokenizer: Any, progress: Progress
) -> tuple[Row, tuple[float, ...]]:
    """One baseline's row, and the loss of each of its steps."""
    started, job = time.monotonic(), wanted.job
    data = [site.texts for site in sites]
    judged: list[Judged] = []

    def judge_client(model: Joined, i: int) -> None:
        progress(f"{kind}: held-out records of client {i + 1}", 0, 1, None)
        judged.append(judge(model, sites[i], wanted.max_new_tokens, tokenizer))

    if kind == "client-only":
        made = _alone(job, directory, data, progress, judge_client)
    else:
        model = Joined.load(directory, job, alike=kind == "fedavg")
        if kind == "fedavg":
            made = train_federated(model, job, data, progress, lambda i: judge_client(model, i))
        else:
            made = train_pooled(model, job, data, progress, plain=kind == "plain")
            for i in range(len(sites)):
                judge_client(model, i)
    row = Row(
        name=kind, samples=made.samples, steps=len(made.losses) or _steps(job, data), spent=NO_BOUND,
        note=_NOTES[kind], losses=tuple(loss for j in judged for loss in j.losses), curve=made.curve,
        measures=measured(job, sites, judged), seconds=time.monotonic() - started, bytes_up=made.bytes_up,
        bytes_down=made.bytes_down,
    )  # fmt: skip
    return row, made.losses


def _alone(
    job: Job, directory: Path, data: Sequence[Texts], progress: Progress, judge: Callable[[Joined, int], None]
) -> Fitted:
    """Every client for itself, one after the other, each from fresh adapters; the curve is over all their records."""
    curves = []
    for i, texts in enumerate(data):
        model = Joined.load(directory, job, server=False)
        curves.append(train_ends(model.front, model.back, job, texts.batches, texts.held_out, progress))
        judge(model, i)
    tokens = [sum(batch.scored for batch in texts.held_out) for texts in data]
    curve = tuple(
        sum(c * n for c, n in zip(point, tokens, strict=True)) / sum(tokens) for point in zip(*curves, strict=True)
    )
    samples = job.schedule.rounds * job.schedule.epochs * sum(texts.records for texts in data)
    return Fitted((), curve, samples)


def _steps(job: Job, data: Sequence[Texts]) -> int:
    return job.schedule.rounds * job.schedule.epochs * sum(len(texts.batches) for texts in data)
