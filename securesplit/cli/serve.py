"""``securesplit serve``: the server; it runs B and nothing else."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securesplit.cli.computing import Threads, take
from securesplit.cli.connection import Cache, Code, Evidence, Keys, Model, Policy, cache_or_default
from securesplit.cli.output import Output, show
from securesplit.cli.passphrase import KeyPassFd, KeyPassFile, existing
from securesplit.cli.policy_sign import Trusted, refusals_logged, trusted_policy
from securesplit.cli.progress import Plain

if TYPE_CHECKING:
    from securesplit.policy.schema import Policy as Rules
    from securesplit.protocol.job import Job

JobFile = Annotated[Path, typer.Option("--job", help="Job file; see examples/job.toml.")]
Listen = Annotated[str, typer.Option(help="HOST:PORT; port 0 picks a free one.")]
Record = Annotated[Path | None, typer.Option(help="Record all that the server sees into this new directory.")]
Out = Annotated[Path | None, typer.Option(help="Write B's trained adapters here at the end.")]
LimitsFile = Annotated[
    Path | None, typer.Option("--limits", help="What the server takes from whom; see docs/limits.md.")
]
State = Annotated[
    Path | None,
    typer.Option(help="Keep the state of learning here; after a crash the same command goes on where it stood."),
]
KeepEvery = Annotated[int, typer.Option(min=1, help="With --state: learning steps between snapshots.")]


def serve(
    job: JobFile,
    policy: Policy,
    keys: Keys,
    listen: Listen = "127.0.0.1:8443",
    model: Model = None,
    cache: Cache = None,
    code: Code = None,
    record: Record = None,
    out: Out = None,
    evidence: Evidence = None,
    policy_key: Trusted = None,
    key_pass_file: KeyPassFile = None,
    key_pass_fd: KeyPassFd = None,
    limits: LimitsFile = None,
    state: State = None,
    keep_every: KeepEvery = 32,
    threads: Threads = 0,
    device: Annotated[str, typer.Option(help="Where B computes: cpu, cuda, or cuda:N.")] = "cpu",
    output: Output = "text",
) -> None:
    """Serve a job until interrupted. With --output json the one object is printed when the server listens."""
    from securesplit.protocol.job import load_job
    from securesplit.transport.limits import load_limits

    loaded, secret = load_job(job), existing("the server's key", key_pass_file, key_pass_fd)
    rules = trusted_policy(policy, policy_key, keys, "server", passphrase=secret)
    bounds = None if limits is None else load_limits(limits)

    from securesplit.server.serve import serve as run

    take(threads)
    tell = Plain()
    with refusals_logged(keys, "server", secret):
        run(
            loaded, rules, keys=keys, listen=listen, model=model, cache=cache_or_default(cache), code=code, record=record, out=out,
            evidence=evidence, limits=bounds, passphrase=secret, state=state, every=keep_every, device=device,
            ready=functools.partial(_listening, output, loaded, rules),
            progress=lambda phase, _fraction: tell(f"model: {phase}", 0, 1, None),
        )  # fmt: skip


def _listening(output: str, job: Job, policy: Rules, host: str, port: int) -> None:
    text = f"listening on {host}:{port}, job '{job.name}', policy '{policy.name}'"
    show(output, text, {"host": host, "port": port, "job": job.digest})
