"""``securesplit model``: get a model, cut it, look at it, check it, and export what was trained."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securesplit.cli.model_fit import fit

if TYPE_CHECKING:
    from securesplit.model.manifest import Manifest
    from securesplit.model.plan import CutPlan

__all__ = ["app", "default_cache"]

app = typer.Typer(
    no_args_is_help=True, help="Models: fetch, cut, inspect, verify, fit a code at the cut, export what was trained."
)
app.command("fit")(fit)


class Output(StrEnum):
    """How a command answers."""

    text = "text"
    json = "json"


def default_cache() -> Path:
    """Where model directories are kept: ``$XDG_CACHE_HOME/securesplit/models``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "securesplit" / "models"


Name = Annotated[
    str, typer.Argument(help="An alias (smollm2-135m), a directory, or a hub id owner/name.", show_default=False)
]
Front = Annotated[int, typer.Option("--front", help="Decoder layers that stay in front with the client.", min=0)]
Back = Annotated[int, typer.Option("--back", help="Decoder layers that stay behind with the client.", min=0)]
AnyFront = Annotated[int | None, typer.Option("--front", help="With which cut; default: the one that is there.", min=0)]
AnyBack = Annotated[int | None, typer.Option("--back", help="With which cut; default: the one that is there.", min=0)]
Cache = Annotated[
    Path | None, typer.Option("--cache", help="Cache directory; default: the user's.", show_default=False)
]
Format = Annotated[Output, typer.Option("--output", help="text, or json: one object on stdout.")]


@app.command()
def pull(name: Name, front: Front = 2, back: Back = 2, cache: Cache = None, output: Format = Output.text) -> None:
    """Get a model ready: fetch it if needed and write each party's file."""
    from securesplit.model.plan import CutPlan
    from securesplit.model.resolve import resolve_model

    with _bars() as progress:
        directory = resolve_model(name, cache or default_cache(), CutPlan(front, back), progress=progress)
    _describe(directory, output)


@app.command()
def split(
    name: Name,
    *,
    front: Front,
    back: Back,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory to make; default: one in the cache.", show_default=False)
    ] = None,
    cache: Cache = None,
    output: Format = Output.text,
) -> None:
    """Cut a model elsewhere, from the files that are there already."""
    from securesplit.model.plan import CutPlan
    from securesplit.model.resolve import resolve_model

    plan = CutPlan(front, back)
    with _bars() as progress:
        if out is None:
            directory = resolve_model(name, cache or default_cache(), plan, progress=progress)
        else:
            from securesplit.model.writer import resplit

            source = resolve_model(name, cache or default_cache(), None, progress=progress)
            resplit(source, plan, out, progress=lambda done: progress("write", done))
            directory = out
    _describe(directory, output)


@app.command()
def inspect(
    name: Name, front: AnyFront = None, back: AnyBack = None, cache: Cache = None, output: Format = Output.text
) -> None:
    """Show what a model directory holds and its digest, without loading any weights."""
    from securesplit.model.resolve import cached_model

    _describe(cached_model(name, cache or default_cache(), _wanted(front, back)), output)


@app.command()
def verify(
    name: Name, front: AnyFront = None, back: AnyBack = None, cache: Cache = None, output: Format = Output.text
) -> None:
    """Recompute the hash of every file of a model directory; exit 1 if one was altered."""
    from securesplit.model.manifest import MANIFEST, read_manifest
    from securesplit.model.resolve import cached_model
    from securesplit.model.store import verify_model

    directory = cached_model(name, cache or default_cache(), _wanted(front, back))
    states = verify_model(directory)
    manifest = read_manifest(directory)
    if output is Output.json:
        files = [{"file": state.file, "state": state.state} for state in states]
        body = {
            "manifest": str(directory / MANIFEST),
            "sha256": manifest.digest,
            "parts": _parts(manifest),
            "files": files,
        }
        typer.echo(json.dumps({**body, "ok": True}))
        return
    for state in states:
        typer.echo(f"{state.state:7} {state.file}")
    typer.echo(f"digest  {manifest.digest}")


@app.command("export-adapter")
def export_adapter(
    files: Annotated[
        list[Path], typer.Argument(help="adapter-front/middle/back.safetensors of one run.", show_default=False)
    ],
    base: Annotated[str, typer.Option("--base", help="Name of the base model to record.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="PEFT directory to write.", show_default=False)],
    output: Format = Output.text,
) -> None:
    """Join the adapters of a run's parts into one standard PEFT adapter for the whole model."""
    from securesplit.model import export

    done = export.export_adapter([export.read_part_adapters(path) for path in files], out, base)
    if output is Output.json:
        body = {
            "path": str(done.directory),
            "adapted_layers": list(done.adapted),
            "untouched_layers": list(done.untouched),
        }
        typer.echo(json.dumps(body))
        return
    typer.echo(f"wrote {done.directory}: adapters for {len(done.adapted)} layers")
    if done.untouched:
        typer.echo(f"{len(done.untouched)} layers have no adapter in these files and stay as in the base model")


def _wanted(front: int | None, back: int | None) -> CutPlan | None:
    """A cut, if either option was given."""
    from securesplit.model.plan import CutPlan

    if front is None and back is None:
        return None
    return CutPlan(2 if front is None else front, 2 if back is None else back)


def _parts(manifest: Manifest) -> list[dict[str, object]]:
    """The parts as they are printed in JSON."""
    return [
        {**part.model_dump(mode="json", exclude={"tensors"}), "tensors": list(part.tensors)} for part in manifest.parts
    ]


def _describe(directory: Path, output: Output) -> None:
    """Print what a model directory holds."""
    from securesplit.model.manifest import MANIFEST, read_manifest

    manifest = read_manifest(directory)
    if output is Output.json:
        facts = manifest.model_dump(
            mode="json", include={"architecture", "layers", "hidden", "vocabulary", "front", "back", "dtype", "tied"}
        )
        body = {"manifest": str(directory / MANIFEST), "sha256": manifest.digest, "parts": _parts(manifest)}
        typer.echo(json.dumps({**body, "path": str(directory), **facts}))
        return
    middle = manifest.layers - manifest.front - manifest.back
    typer.echo(f"{directory}")
    typer.echo(
        f"{manifest.architecture}, {manifest.layers} layers cut {manifest.front}/{middle}/{manifest.back}, {manifest.dtype}"
    )
    for part in manifest.parts:
        here = "" if (directory / part.file).is_file() else "  (not here)"
        typer.echo(
            f"{part.name:7} {part.bytes / 1e6:9.1f} MB  {len(part.tensors):5} tensors  sha256 {part.sha256[:16]}{here}"
        )
    typer.echo(f"digest  {manifest.digest}")


@contextmanager
def _bars() -> Iterator[Callable[[str, float], None]]:
    """Progress bars on stderr, one per phase."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, fraction: float) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=1.0)
            bars.update(tasks[phase], completed=fraction)

        yield report
