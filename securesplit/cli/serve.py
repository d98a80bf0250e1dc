"""``securesplit serve``: the server; it runs B and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from securesplit.cli.output import Cache, Code, Evidence, Keys, Model, Output, Policy, cache_or_default, show
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile, existing
from securesplit.cli.policy_sign import Trusted, refusals_logged, trusted_policy
from securesplit.cli.progress import Plain


def serve(
    job: Annotated[Path, typer.Option("--job", help="Job file; see examples/job.toml.")],
    policy: Policy,
    keys: Keys,
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 picks a free one.")] = "127.0.0.1:8443",
    model: Model = None,
    cache: Cache = None,
    code: Code = None,
    record: Annotated[
        Path | None, typer.Option(help="Record all that the server sees into this new directory.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write B's trained adapters here at the end.")] = None,
    evidence: Evidence = None,
    policy_key: Trusted = None,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    limits: Annotated[
        Path | None, typer.Option("--limits", help="What the server takes from whom; see docs/limits.md.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Keep the state of learning here; after a crash the same command goes on where it stood."),
    ] = None,
    keep_every: Annotated[int, typer.Option(min=1, help="With --state: learning steps between snapshots.")] = 32,
    threads: Annotated[int, typer.Option(help="Threads of computation; 0 leaves torch's choice.")] = 0,
    output: Output = "text",
) -> None:
    """Serve a job until interrupted. With --output json the one object is printed when the server listens."""
    from securesplit.protocol.job import load_job
    from securesplit.transport.limits import load_limits

    loaded, secret = load_job(job), existing("the server's key", key_pass_file, key_pass_fd)
    rules = trusted_policy(policy, policy_key, keys, "server", passphrase=secret)
    bounds = None if limits is None else load_limits(limits)

    import torch

    from securesplit.server.serve import serve as run

    if threads:
        torch.set_num_threads(threads)

    def ready(host: str, port: int) -> None:
        show(
            output,
            f"listening on {host}:{port}, job '{loaded.name}', policy '{rules.name}'",
            {"host": host, "port": port, "job": loaded.digest},
        )

    tell = Plain()

    def progress(phase: str, _fraction: float) -> None:
        tell(f"model: {phase}", 0, 1, None)

    with refusals_logged(keys, "server", secret):
        run(
            loaded,
            rules,
            keys=keys,
            listen=listen,
            model=model,
            cache=cache_or_default(cache),
            code=code,
            record=record,
            out=out,
            evidence=evidence,
            limits=bounds,
            passphrase=secret,
            state=state,
            every=keep_every,
            ready=ready,
            progress=progress,
        )
