"""``securesplit attack sweep``: a grid of recordings, each made by the real server and clients on this machine, and attacked."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from securesplit.cli.connection import Cache, cache_or_default
from securesplit.cli.output import Output, show
from securesplit.cli.progress import ProgressStyle, reporting

if TYPE_CHECKING:
    from attacks.sweep import Cell, Grid, Recorded

__all__ = ["record_cell", "sweep", "to_toml"]

_HELD_OUT = 2


def sweep(
    *,
    grid: Annotated[Path, typer.Option(help="Grid file; see examples/sweep.toml.")],
    out: Annotated[Path, typer.Option(help="Folder of the cells; a second start goes on where the first one ended.")],
    jobs: Annotated[int, typer.Option(min=1, help="Cells at once.")] = 1,
    pool: Annotated[Literal["local", "ray"], typer.Option(help="Processes of this machine, or Ray.")] = "local",
    output: Output = "text",
    progress: ProgressStyle = "auto",
    cache: Cache = None,
) -> None:
    """Record and attack every cell of a grid. Finished cells are kept, whatever ends the sweep."""
    from attacks.report import require_below_ceiling, require_noise
    from attacks.sweep import read_grid, run_cells

    stated = read_grid(grid)
    cells = _cells(stated, grid.parent, cache_or_default(cache))
    with reporting(progress) as tell:

        def told(done: int, total: int, left: float) -> None:
            eta = "" if math.isnan(left) else f", about {left / 60:.0f} min left"
            tell(f"sweep '{stated.name}'{eta}" if progress == "json" else f"sweep '{stated.name}'", done, total, None)

        found = run_cells(cells, out / "cells", record_cell, jobs=jobs, pool=pool, tell=told)
    found = found.model_copy(update={"name": stated.name})
    skip = {"cells": {"__all__": {"report": {"examples"}}}}
    part = out / "sweep.json.part"
    part.write_text(found.model_dump_json(exclude=skip), encoding="utf-8")
    part.replace(out / "sweep.json")
    rows = [
        f"{cell.policy:16} epsilon {cell.budget}  cut {cell.cut[0]}/{cell.cut[1]:<3} {cell.codec:5} "
        f"K={cell.releases:<3} seed {cell.seed}  {cell.report.worst:.3f} by {cell.report.worst_attack:18} guess {cell.report.kappa:.3f}  loss {cell.loss:.3f}"
        for cell in found.cells
    ]
    show(output, "\n".join(rows), json.loads(found.model_dump_json(exclude=skip)))
    for cell in found.cells:
        require_noise(cell.report)
        require_below_ceiling(cell.report)


def _cells(grid: Grid, home: Path, cache: Path) -> tuple[Cell, ...]:
    from functools import cache as once

    from attacks.sweep import cells_of
    from securesplit.model.plan import CutPlan
    from securesplit.model.resolve import resolve_model
    from securesplit.policy.load import load_policy
    from securesplit.protocol.job import load_job

    @once
    def model(cut: tuple[int, int]) -> Path:
        place = home / grid.model
        return resolve_model(str(place) if place.is_dir() else grid.model, cache, CutPlan(*cut))

    policies = [load_policy(home / path) for path in grid.policies]
    return cells_of(grid, policies, load_job(home / grid.job), model, home)


def record_cell(cell: Cell, folder: Path) -> Recorded:
    """Make a cell's recording: real processes over mutual TLS on loopback, as the demo does.

    Args:
        cell: which.
        folder: new; ``transcript/`` is written into it.

    Raises:
        CheckFailed: SS-1561 and SS-1562 when a party fails.
    """
    from attacks.sweep import Recorded
    from securesplit.cli.demo.parties import Party, server
    from securesplit.client.run import RunRecord
    from securesplit.pki.authority import Authority

    names = cell.job.sums.roster
    with tempfile.TemporaryDirectory(prefix="securesplit-sweep-") as made:
        home = Path(made)
        authority = Authority.create(home / "keys")
        authority.issue("gpu", "server", dns=["localhost"])
        for name in names:
            authority.issue(name, "client")
        _deal(cell, home, names)
        (home / "job.toml").write_text(to_toml(cell.job.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
        (home / "policy.toml").write_text(to_toml(cell.policy.model_dump(mode="json")), encoding="utf-8")
        with server(
            "--job", home / "job.toml", "--policy", home / "policy.toml", "--keys", home / "keys" / "gpu", "--listen",
            "127.0.0.1:0", "--model", cell.model, "--record", folder / "transcript", "--threads", "1",
            log=folder / "server.log",
        ) as port:  # fmt: skip
            parties = [
                Party(
                    name, "train", "--policy", home / "policy.toml", "--keys", home / "keys" / name, "--server",
                    f"wss://localhost:{port}", "--data", home / f"{name}.jsonl", "--out", home / name, "--held-out",
                    str(_HELD_OUT), "--max-tokens", str(cell.max_tokens), "--truth", home / f"{name}.truth", "--model",
                    cell.model, "--progress", "none", "--threads", "1", log=folder / f"{name}.log",
                    watch=lambda *_: None,
                )
                for name in names
            ]  # fmt: skip
            try:
                records = [RunRecord.model_validate(party.result()) for party in parties]
            finally:
                for party in parties:
                    party.stop()
        truths = "".join((home / f"{name}.truth").read_text(encoding="utf-8") for name in names)
        (folder / "transcript" / "truth.jsonl").write_text(truths, encoding="utf-8")
    return Recorded(
        loss=sum(r.loss for r in records) / len(records), initial=sum(r.initial_loss for r in records) / len(records)
    )


def _deal(cell: Cell, home: Path, names: tuple[str, ...]) -> None:
    """Give each client its records: the first ones to the first, and so on.

    Raises:
        InputError: SS-1713 when there are too few.
    """
    from securesplit.data.corpus import read_corpus
    from securesplit.errors import InputError

    records, each = read_corpus(cell.data), cell.records + _HELD_OUT
    if len(records) < each * len(names):
        raise InputError(
            "SS-1713",
            f"the private text has {len(records)} records, and {len(names)} clients need {each} each",
            hint="Give more text, or ask for fewer records.",
        )
    for number, name in enumerate(names):
        mine = records[number * each : (number + 1) * each]
        lines = ({"text": r.text, **({"pii": list(r.pii)} if r.pii else {})} for r in mine)
        (home / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def to_toml(value: Mapping[str, object], *, table: str = "") -> str:
    """Nested tables of plain values as TOML; JSON's spelling of strings, numbers and lists is TOML's as well."""
    plain = [
        f"{key} = {json.dumps(item)}" for key, item in value.items() if item is not None and not isinstance(item, dict)
    ]
    inner = [
        f"\n[{table}{key}]\n{to_toml(item, table=f'{table}{key}.')}"
        for key, item in value.items()
        if isinstance(item, dict)
    ]
    return "\n".join((*plain, "")) + "".join(inner)
