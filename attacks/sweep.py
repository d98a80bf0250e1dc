"""Many recordings, one question: attack x policy x cut x codec x K. Resumable, and the same however it is spread.

A cell is one recording, made by the shipped server and clients, and one run of the suite on it. It lies in a folder that is
named by the SHA-256 of everything that decides it, so that a sweep that was stopped goes on, and a grid that grew keeps what
it had. Noise is fresh in every recording; a recording that is there is never made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cache as once
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attacks.config import ProfileName, config
from attacks.evaluate import Order, evaluate
from attacks.report import Report
from attacks.threat import Threat
from securesplit import __version__
from securesplit.errors import InputError
from securesplit.model.manifest import read_manifest
from securesplit.policy.meaning import Meaning
from securesplit.policy.schema import Gaussian, Policy
from securesplit.protocol.job import Job

__all__ = ["Cell", "Done", "Grid", "Recorded", "Sweep", "cells_of", "read_grid", "run_cells"]

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_FORMAT = 1  # Raised when a cell's files change their meaning.

Pool = Literal["local", "ray"]


class Grid(BaseModel):
    """A grid file. Paths are meant from where the file lies.

    Attributes:
        name: of the sweep.
        model: alias, directory or hub id.
        job: a job file that every cell starts from; model, cut, codec and rounds are the cell's.
        policies: policy files. epsilons: each policy with noise is also tried with these budgets; empty: its own only.
        cuts: decoder layers of A and of C. codecs: how numbers cross.
        releases: K, fresh releases of every record: rounds of the job. Policies whose partition A never changes send one
            release however many rounds there are, and get one cell.
        seeds: recordings per cell, each with fresh noise, and attacks with another seed.
        data: private text, jsonl or plain; aux: public text, or None.
        records: of the private text that each client gets. max_tokens: each is cut here.
        profile, attacks: of the suite; no attacks: all that fit.
    """

    model_config = _STRICT
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
    model: str
    job: str
    policies: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    epsilons: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)] = ()
    cuts: Annotated[
        tuple[Annotated[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], Field(strict=False)], ...],
        Field(min_length=1, strict=False),
    ]
    codecs: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ("f32",)
    releases: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, strict=False)] = (1,)
    seeds: Annotated[int, Field(ge=1)] = 3
    data: str
    aux: str | None = None
    records: Annotated[int, Field(ge=1)] = 12
    max_tokens: Annotated[int, Field(ge=1)] = 48
    profile: ProfileName = "smoke"
    attacks: Annotated[tuple[str, ...], Field(strict=False)] = ()


def read_grid(path: Path) -> Grid:
    """Read a grid file.

    Raises:
        InputError: SS-1713 with one detail per fault.
    """
    hint = "Compare it with examples/sweep.toml."
    try:
        return Grid.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        details = tuple(
            f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors(include_url=False, include_input=False)
        )
        raise InputError("SS-1713", f"{path} has {len(details)} fault(s)", hint=hint, details=details) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError("SS-1713", f"cannot read the grid {path}: {type(error).__name__}", hint=hint) from None


@dataclass(frozen=True, slots=True)
class Cell:
    """One recording to make and to attack.

    Attributes:
        policy, job: complete. model: what the job's clients and server load.
        data, aux: files. records, max_tokens, profile, attacks: as in :class:`Grid`.
        releases: K. seed: number of the repetition.
        digest: SHA-256 of everything above, files and the model by their content, of the shipped settings of all attacks, and
            of the release.
    """

    policy: Policy
    job: Job
    model: Path
    data: Path
    aux: Path | None
    records: int
    max_tokens: int
    profile: ProfileName
    attacks: tuple[str, ...]
    releases: int
    seed: int
    digest: str


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a recording's makers know beside it: utility, for the frontier.

    Attributes:
        loss: held-out loss after the job, nats per token, mean over clients. initial: before it.
    """

    loss: float
    initial: float


class Done(BaseModel):
    """A finished cell.

    Attributes:
        digest: its name. policy, epsilon, cut, codec, releases, seed: which one.
        delta, unit, relation: what epsilon speaks of; None without a bound. Cells of earlier versions have it in the report alone.
        loss, initial_loss: utility. report: of the attacks.
    """

    model_config = _STRICT
    digest: str
    policy: str
    epsilon: float | None
    delta: float | None = None
    unit: str | None = None
    relation: str | None = None
    cut: tuple[int, int]
    codec: str
    releases: int
    seed: int
    loss: float
    initial_loss: float
    report: Report

    @property
    def budget(self) -> str:
        """What the policy grants, with all that belongs to the figure."""
        return "none" if self.epsilon is None else f"{self.epsilon:g} {self.meaning}"

    @property
    def meaning(self) -> str:
        """Of epsilon; empty without a bound."""
        said = self.report
        if said.delta is None or said.unit is None or said.relation is None:
            return ""
        return str(Meaning(said.delta, said.unit, said.relation))


class Sweep(BaseModel):
    """A whole sweep: what `attack report` shows as frontier and heat map."""

    model_config = _STRICT
    name: str
    created: str
    cells: tuple[Done, ...]


def cells_of(
    grid: Grid, policies: Sequence[Policy], job: Job, models: Callable[[tuple[int, int]], Path], home: Path
) -> tuple[Cell, ...]:
    """The cells of a grid, the cheap ones first.

    Args:
        grid: the file's.
        policies: loaded, in the file's order. job: the template.
        models: a model directory for a cut. home: where the grid's paths start.
    """
    aux = None if grid.aux is None else home / grid.aux
    settings = [config().families[name].model_dump(mode="json") for name in sorted(config().families)]

    @once
    def content(cut: tuple[int, int]) -> tuple[str, ...]:
        """The manifest's digest, and the tokenizer's files, which that digest leaves out and which decide the tokens."""
        manifest = read_manifest(models(cut))
        return (manifest.digest, *sorted(f"{file.file} {file.sha256}" for file in manifest.client_files))

    found: dict[str, Cell] = {}
    choices = product(policies, grid.epsilons or (None,), grid.cuts, grid.codecs, grid.releases, range(grid.seeds))
    for policy, epsilon, cut, codec, releases, seed in choices:
        rules = _with_budget(policy, epsilon)
        rounds = releases if isinstance(rules.privacy, Gaussian) and rules.privacy.regime == "round" else 1
        rounds = rounds if isinstance(rules.privacy, Gaussian) else releases
        stated = job.model_dump(mode="json", exclude_none=True)
        stated |= {"model": grid.model, "cut": {"front": cut[0], "back": cut[1]}, "codec": codec}
        stated["schedule"] = {**stated["schedule"], "rounds": rounds}
        made = Job.model_validate_json(json.dumps(stated), strict=False)
        parts = (
            _FORMAT, __version__, settings, content(cut), rules.digest, made.digest, _hash(home / grid.data), None if aux is None else _hash(aux),
            grid.records, grid.max_tokens, config().profiles[grid.profile].model_dump(mode="json"), list(grid.attacks), seed,
        )  # fmt: skip
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        found.setdefault(
            digest,
            Cell(
                policy=rules, job=made, model=models(cut), data=home / grid.data, aux=aux, records=grid.records,
                max_tokens=grid.max_tokens, profile=grid.profile, attacks=grid.attacks, releases=rounds, seed=seed,
                digest=digest,
            ),
        )  # fmt: skip
    return tuple(sorted(found.values(), key=lambda cell: (cell.releases, cell.seed)))


def _with_budget(policy: Policy, epsilon: float | None) -> Policy:
    """The policy with another budget, and without leakage limits, which a rehearsal cannot meet beforehand."""
    stated = policy.model_dump(mode="json")
    stated.pop("leakage", None)
    if epsilon is not None and isinstance(policy.privacy, Gaussian):
        stated["privacy"] |= {"epsilon": epsilon}
    return Policy.model_validate_json(json.dumps(stated))


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            "SS-1713", f"cannot read {path}: {type(error).__name__}", hint="Correct the grid's paths."
        ) from None


Record = Callable[[Cell, Path], Recorded]
"""Makes a recording with its truth in a new folder: ``transcript/`` with ``truth.jsonl`` in it."""


def run_cell(cell: Cell, folder: Path, record: Record) -> Done:
    """One cell, from its files where they are, else from nothing. Every file is whole or absent."""
    place = folder / cell.digest
    finished = place / "cell.json"
    if finished.is_file():
        return Done.model_validate_json(_with_examples(finished))
    recorded = _recording(cell, folder, record)
    transcript = place / "transcript"
    report = evaluate(
        Order(
            transcript=transcript, model=cell.model, truth=transcript / "truth.jsonl", aux=cell.aux, profile=cell.profile,
            attacks=cell.attacks, seed=cell.seed, examples=0,
            threat=Threat(text="none" if cell.aux is None else "same-domain"),
        )
    )  # fmt: skip
    done = Done(
        digest=cell.digest, policy=cell.policy.name, epsilon=report.epsilon, delta=report.delta, unit=report.unit,
        relation=report.relation,
        cut=(cell.job.cut.front, cell.job.cut.back), codec=cell.job.codec, releases=cell.releases, seed=cell.seed,
        loss=recorded.loss, initial_loss=recorded.initial, report=report,
    )  # fmt: skip
    _write(finished, done.model_dump_json(exclude={"report": {"examples"}}))
    return done


def _with_examples(path: Path) -> str:
    """A stored cell; examples are text and are never stored."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["report"]["examples"] = []
    return json.dumps(raw)


def _recording(cell: Cell, folder: Path, record: Record) -> Recorded:
    place = folder / cell.digest
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".making-", dir=folder))
        try:
            made = record(cell, fresh)
            _write(fresh / "utility.json", json.dumps({"loss": made.loss, "initial": made.initial}))
            fresh.rename(place)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    utility = json.loads((place / "utility.json").read_text(encoding="utf-8"))
    return Recorded(loss=float(utility["loss"]), initial=float(utility["initial"]))


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    record: Record,
    *,
    jobs: int = 1,
    pool: Pool = "local",
    tell: Callable[[int, int, float], None] = lambda _done, _total, _left: None,
) -> Sweep:
    """Run all cells that are not finished.

    Args:
        cells: of :func:`cells_of`.
        folder: where their folders lie.
        record: makes a recording; a function of a module, so that other processes find it.
        jobs: cells at once. pool: ``local`` processes, or ``ray`` (install the extra ``ray``), with the same results on the
            same recordings.
        tell: told (done, total, seconds left as the mean of the cells that were run says).

    Raises:
        SecureSplitError: of the first cell that fails; finished cells stay.
    """
    started, ran, done = time.monotonic(), 0, []
    known = sum((folder / cell.digest / "cell.json").is_file() for cell in cells)
    tell(known, len(cells), float("nan"))
    for result in _spread(cells, folder, record, jobs, pool):
        done.append(result)
        ran = max(0, len(done) - known)
        each = (time.monotonic() - started) / ran if ran else float("nan")
        tell(max(known, len(done)), len(cells), each * (len(cells) - len(done)))
    order = {cell.digest: number for number, cell in enumerate(cells)}
    return Sweep(
        name=folder.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        cells=tuple(sorted(done, key=lambda cell: order[cell.digest])),
    )


def _spread(cells: Sequence[Cell], folder: Path, record: Record, jobs: int, pool: Pool) -> Iterator[Done]:
    """Results as they come, finished cells first."""
    waiting = []
    for cell in cells:
        if (folder / cell.digest / "cell.json").is_file():
            yield run_cell(cell, folder, record)
        else:
            waiting.append(cell)
    if pool == "ray":
        yield from _by_ray(waiting, folder, record)
    elif jobs == 1:
        for cell in waiting:
            yield run_cell(cell, folder, record)
    else:
        yield from _by_processes(waiting, folder, record, jobs)


def _by_processes(cells: Sequence[Cell], folder: Path, record: Record, jobs: int) -> Iterator[Done]:
    # A fresh interpreter per process: a copy of one that has run torch's threads can hang.
    with ProcessPoolExecutor(max_workers=min(jobs, os.cpu_count() or 1), mp_context=get_context("spawn")) as workers:
        left: set[Future[Done]] = {workers.submit(run_cell, cell, folder, record) for cell in cells}
        try:
            while left:
                finished, left = wait(left, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def _by_ray(cells: Sequence[Cell], folder: Path, record: Record) -> Iterator[Done]:
    try:
        import ray
    except ImportError:
        raise InputError(
            "SS-1714", "Ray is not installed", hint="Install the extra: pip install 'securesplit[ray]'."
        ) from None
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        task = ray.remote(num_cpus=1)(run_cell)
        left = [task.remote(cell, folder.resolve(), record) for cell in cells]
        while left:
            finished, left = ray.wait(left)
            yield ray.get(finished[0])
    finally:
        if started:
            ray.shutdown()
