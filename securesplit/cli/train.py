"""``securesplit train``: one client's part of a job."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securesplit.cli.choices import Ids, Split, TaskName, TemplateName
from securesplit.cli.computing import Threads, take
from securesplit.cli.connection import Cache, Code, Evidence, Keys, Model, Policy, Server, connection
from securesplit.cli.output import Output, require_usable, show
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile
from securesplit.cli.policy_sign import Trusted
from securesplit.cli.progress import ProgressStyle, reporting

if TYPE_CHECKING:
    from securesplit.client.run import RunRecord

Data = Annotated[Path, typer.Option(help="Private text: jsonl, json or plain text.")]
Out = Annotated[Path, typer.Option(help="Where adapters and the run's record are written.")]
HeldOut = Annotated[int, typer.Option(min=1, help="Records kept for evaluation; they are released and charged too.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use at most so many records.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=2, help="Cut records here; the policy's largest bucket when absent.")
]
Truth = Annotated[
    Path | None, typer.Option(help="For experiments: write what was sent, in clear, to this file on this site.")
]
Alone = Annotated[bool, typer.Option("--alone", help="Also train the client-only model, for comparison.")]
WatchServer = Annotated[
    int,
    typer.Option(
        min=0,
        help="Compute one of so many steps of the server's part here as well, and end the run when its answers are other "
        "ones; needs that part's weights and memory. 0: trust it.",
    ),
]
KeepTokens = Annotated[
    Path | None, typer.Option(help="With --task: folder where tokenised data is kept, as private as the data.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the finished run that --out holds.")]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write event files, too; needs the extra tensorboard.")
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with the run of --out that was interrupted; begin where there is none."),
]
Patience = Annotated[
    float, typer.Option(min=0, help="Seconds for which a lost server is tried again before the run ends.")
]
KeepEvery = Annotated[int, typer.Option(min=1, help="Local steps between snapshots of the run.")]


def train(
    policy: Policy,
    keys: Keys,
    server: Server,
    data: Data,
    out: Out,
    held_out: HeldOut = 4,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    truth: Truth = None,
    alone: Alone = False,
    model: Model = None,
    cache: Cache = None,
    code: Code = None,
    evidence: Evidence = None,
    policy_key: Trusted = None,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    watch_server: WatchServer = 0,
    task: TaskName = None,
    template: TemplateName = "plain",
    ids: Ids = None,
    split: Split = None,
    keep_tokens: KeepTokens = None,
    overwrite: Overwrite = False,
    tensorboard: TensorBoard = False,
    resume: Resume = False,
    patience: Patience = 600.0,
    keep_every: KeepEvery = 16,
    threads: Threads = 0,
    progress: ProgressStyle = "auto",
    output: Output = "text",
) -> None:
    """Train on private text with a server that never sees it. The ledger lies in the key folder and is charged."""
    site = connection(
        policy, keys, server, policy_key, (key_pass_file, key_pass_fd), model=model, cache=cache, code=code, evidence=evidence,
    )  # fmt: skip
    require_usable(out)
    os.umask(0o077)  # What a run writes is private: adapters, its record, and its own part of each sum.

    from securesplit.client.resume import is_unfinished
    from securesplit.client.run import Run, run_training
    from securesplit.data.tasks.chosen import Chosen

    take(threads)
    run = Run(
        policy=site.policy, keys=site.keys, server=site.server, data=data, out=out, held_out=held_out, limit=limit,
        max_tokens=max_tokens, truth=truth, alone=alone, model=site.model, cache=site.cache, code=site.code,
        evidence=site.evidence, watch=watch_server,
        tasked=None if task is None else Chosen(task, template, ids, split, keep_tokens),
        passphrase=site.passphrase, overwrite=overwrite, tensorboard=tensorboard, resume=resume, patience=patience,
        keep_every=keep_every,
    )  # fmt: skip
    try:
        with reporting(progress) as report:
            record = run_training(run, report)
    except KeyboardInterrupt:
        if is_unfinished(out):
            sys.stderr.write(f"the run in {out} is kept: the same command with --resume goes on with it\n")
        raise
    show(output, _text(record, out), record.model_dump(mode="json"))


def _text(record: RunRecord, out: Path) -> str:
    text = f"{record.steps} steps, held-out loss {record.initial_loss:.3f} -> {record.loss:.3f}"
    if record.alone:
        text += f" (client-only model: {record.alone[-1]:.3f})"
    if record.accuracy is not None:
        text += f", accuracy {record.accuracy:.3f}"
    if record.best is not None:
        text += f", best {record.best[1]:.3f} after {record.best[0]} optimiser steps, in {out / 'best'}"
    if record.stopped:
        text += "; stopped early"
    if record.missed:
        text += f"; {len(record.missed)} rounds went on without this client"
    if not record.exact:
        missed = max(record.residuals, default=0.0)
        text += f"; INEXACT sums, which missed up to {missed:.1%} of the mean of the adapters' products"
    return f"{text}; epsilon {_spent(record)}"


def _spent(record: RunRecord) -> str:
    if record.epsilon is None:
        return "none: UNSAFE"
    honest = "" if record.honest == 1 else f", with {record.honest} honest clients in each sum"
    return f"{record.epsilon:.3f} at delta {record.delta:g}, unit {record.unit}, {record.relation}{honest}"
