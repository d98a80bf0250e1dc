"""``securesplit aggregate``: secure sums without a network, and a check of recorded ones."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from typing import TYPE_CHECKING, Annotated, cast

import typer

from securesplit.cli.aggregate_verify import verify

if TYPE_CHECKING:
    from securesplit.aggregate.config import Backend

app = typer.Typer(no_args_is_help=True, help="Secure aggregation of updates.")
app.command("verify")(verify)

_BACKENDS = ("masks", "bfv", "ckks")


class Output(Enum):
    """How to print."""

    TEXT = "text"
    JSON = "json"


@app.callback()
def _aggregate() -> None:
    """Secure aggregation of updates."""


@app.command()
def simulate(
    *,
    clients: Annotated[int, typer.Option(help="Number of clients in the roster.")] = 10,
    threshold: Annotated[
        int | None, typer.Option(help="Clients that must agree to open a sum; more than half. Two thirds when absent.")
    ] = None,
    dim: Annotated[int, typer.Option(help="Coordinates of an update.")] = 100_000,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE:COUNT",
            help="COUNT clients vanish instead of sending advertise, shares, masked, consistent or unmask. May be repeated.",
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="How sums are hidden: masks; or bfv or ckks, which encrypt the masked words once more.")
    ] = "masks",
    ring: Annotated[int, typer.Option(help="Bits of a word of the sum: 32 or 64.")] = 32,
    colluders: Annotated[
        int | None, typer.Option(help="Clients that may side with the server; one in five, if the threshold allows.")
    ] = None,
    blind: Annotated[bool, typer.Option("--blind", help="Hide the sum from the server too.")] = False,
    output: Annotated[Output, typer.Option(help="What to print.")] = Output.TEXT,
) -> None:
    """Run a whole secure round in one process and compare its sum with plain integers."""
    from securesplit.aggregate.simulate import parse_drop
    from securesplit.aggregate.simulate import simulate as run
    from securesplit.errors import AggregationAborted, CheckFailed, InputError

    if backend not in _BACKENDS or ring not in (32, 64):
        what = f"there is no backend {backend!r}" if backend not in _BACKENDS else f"there is no ring of {ring} bits"
        raise InputError("SS-1602", what, hint=f"Backends: {', '.join(_BACKENDS)}. Rings: 32 and 64 bits.")
    done = run(
        clients=clients, threshold=2 * clients // 3 + 1 if threshold is None else threshold, dim=dim, drops=tuple(parse_drop(text) for text in drop or ()), blind=blind,
        backend=cast("Backend", backend), ring_bits=64 if ring == 64 else 32, colluders=colluders,
    )  # fmt: skip
    if output is Output.JSON:
        typer.echo(json.dumps(asdict(done)))
    elif done.aborted is None:
        typer.echo(
            f"sum over {done.survivors} of {clients} clients, {dim} coordinates: {'exact, bit for bit' if done.exact else 'WRONG'}"
        )
        hidden = blind or backend != "masks"
        typer.echo(f"opened by {done.finished} clients; {'hidden from' if hidden else 'visible to'} the server")
        typer.echo(
            f"each client's secrets are shared among {done.degree} others, of whom {done.share_threshold} open them; "
            f"{done.colluders} may side with the server"
        )
        typer.echo(
            f"{done.cpu_seconds:.2f} s of processor time for all parties; {done.bytes_per_param_up:.2f} bytes up per coordinate and client"
        )
    if done.aborted is not None:
        raise AggregationAborted(
            done.aborted,
            "the simulated round was aborted, as it must be",
            hint="Too few clients were left for a sum that hides each of them.",
        )
    if not done.exact:
        raise CheckFailed(
            "SS-1604",
            "the secure sum differs from the plain sum",
            hint="This is a defect; report it with the command line.",
        )
