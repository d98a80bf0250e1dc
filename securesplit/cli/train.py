"""``securesplit train``: one client's part of a job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from securesplit.cli.choices import Ids, Split, TaskName, TemplateName
from securesplit.cli.output import Cache, Code, Evidence, Keys, Model, Output, Policy, cache_or_default, show
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile, existing
from securesplit.cli.policy_sign import Trusted, trusted_policy
from securesplit.cli.progress import ProgressStyle, reporting


def train(
    policy: Policy,
    keys: Keys,
    server: Annotated[str, typer.Option(help="wss://host:port")],
    data: Annotated[Path, typer.Option(help="Private text: jsonl, json or plain text.")],
    out: Annotated[Path, typer.Option(help="Where adapters and the run's record are written.")],
    held_out: Annotated[int, typer.Option(help="Records kept for evaluation; they are released and charged too.")] = 4,
    limit: Annotated[int | None, typer.Option(help="Use at most so many records.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Cut records here; the policy's largest bucket when absent.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="For experiments: write what was sent, in clear, to this file on this site.")
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Also train the client-only model, for comparison.")] = False,
    model: Model = None,
    cache: Cache = None,
    code: Code = None,
    evidence: Evidence = None,
    policy_key: Trusted = None,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    watch_server: Annotated[
        int,
        typer.Option(
            min=0,
            help="Compute one of so many steps of the server's part here as well, and end the run when its answers are other "
            "ones; needs that part's weights and memory. 0: trust it.",
        ),
    ] = 0,
    task: TaskName = None,
    template: TemplateName = "plain",
    ids: Ids = None,
    split: Split = None,
    keep_tokens: Annotated[
        Path | None, typer.Option(help="With --task: folder where tokenised data is kept, as private as the data.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the finished run that --out holds.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files, too; needs securesplit[tensorboard].")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run of --out that was interrupted; begin where there is none."),
    ] = False,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds for which a lost server is tried again before the run ends.")
    ] = 600.0,
    keep_every: Annotated[int, typer.Option(min=1, help="Local steps between snapshots of the run.")] = 16,
    threads: Annotated[int, typer.Option(help="Threads of computation; 0 leaves torch's choice.")] = 0,
    progress: ProgressStyle = "auto",
    output: Output = "text",
) -> None:
    """Train on private text with a server that never sees it. The ledger lies in the key folder and is charged."""
    secret = existing("the client's key", key_pass_file, key_pass_fd)
    rules = trusted_policy(policy, policy_key, keys, "client", passphrase=secret)
    os.umask(0o077)  # What a run writes is private: adapters, its record, and its own part of each sum.

    import torch

    from securesplit.client.run import Run, run_training
    from securesplit.data.tasks.chosen import Chosen

    if threads:
        torch.set_num_threads(threads)
    with reporting(progress) as report:
        run = Run(
            policy=rules, keys=keys, server=server, data=data, out=out, held_out=held_out, limit=limit, max_tokens=max_tokens,
            truth=truth, alone=alone, model=model, cache=cache_or_default(cache), code=code,
            evidence=evidence, watch=watch_server,
            tasked=None if task is None else Chosen(task, template, ids, split, keep_tokens),
            passphrase=secret, overwrite=overwrite, tensorboard=tensorboard, resume=resume, patience=patience,
            keep_every=keep_every,
        )  # fmt: skip
        record = run_training(run, report)
    epsilon = (
        "none: UNSAFE"
        if record.epsilon is None
        else f"{record.epsilon:.3f} at delta {record.delta:g}, unit {record.unit}, replace-one"
        + ("" if record.honest == 1 else f", with {record.honest} honest clients in each sum")
    )
    named = "" if record.accuracy is None else f", accuracy {record.accuracy:.3f}"
    if record.best is not None:
        named += f", best {record.best[1]:.3f} after {record.best[0]} optimiser steps, in {out / 'best'}"
    if record.stopped:
        named += "; stopped early"
    if record.missed:
        named += f"; {len(record.missed)} rounds went on without this client"
    if not record.exact:
        missed = max(record.residuals, default=0.0)
        named += f"; INEXACT sums, which missed up to {missed:.1%} of the mean of the adapters' products"
    text = (
        f"{record.steps} steps, held-out loss {record.initial_loss:.3f} -> {record.loss:.3f}{named}; epsilon {epsilon}"
    )
    show(output, text, record.model_dump(mode="json"))
