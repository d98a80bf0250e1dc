"""Folders of runs: what each holds, also where a run was interrupted, and how a new run takes one.

A run leaves ``about.json`` before its first step, ``metrics.jsonl`` on the way, and ``run.json`` when all is well. Whatever is
there is shown; nothing of another's making brings the list down.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from securesplit.errors import InputError
from securesplit.runs.about import ABOUT, About
from securesplit.runs.losses import HELD_OUT
from securesplit.runs.metrics import METRICS, Row, is_written, read_metrics
from securesplit.runs.spent import UNKNOWN, Spent, spent_by, spent_under
from securesplit.runs.tensorboard import FOLDER

__all__ = [
    "RUN",
    "ChannelLine",
    "Finished",
    "ReleasedLine",
    "RunFolder",
    "State",
    "claim",
    "clear",
    "list_runs",
    "read_run",
]

RUN = "run.json"
State = Literal["finished", "running", "interrupted", "damaged"]
M = TypeVar("M", bound=BaseModel)
_DEPTH = 3
_TAIL = 1 << 16
_MOST_BYTES = 1 << 26
_OWN = ("adapter-*.safetensors", "best/adapter-*.safetensors", "round-*.npz", "round-*.record")


Whole = Annotated[int, Field(ge=0, lt=1 << 63)]


class ChannelLine(BaseModel):
    """What one channel has cost so far."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)
    channel: str
    releases: Whole
    mu: float
    epsilon: float


class ReleasedLine(BaseModel):
    """What left through one channel in this run; the same bytes count once."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    channel: str
    releases: Whole
    bytes: Whole


class Finished(BaseModel):
    """What ``run.json`` tells, as far as lists and comparisons need it; other keys, of later versions, are passed over.

    A loss is None where it was no number.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    client: str
    policy: str
    policy_digest: str
    job: str
    regime: str
    steps: Whole
    loss: float | None
    initial_loss: float | None
    curve: tuple[float | None, ...] = ()
    alone: tuple[float | None, ...] | None = None
    missed: tuple[Whole, ...] = ()
    accuracy: float | None = None
    epsilon: float | None
    delta: float | None
    unit: str = "sequence"
    relation: str = "replace-one"
    channels: tuple[ChannelLine, ...] = ()
    released: tuple[ReleasedLine, ...] = ()
    bytes_up: Whole
    bytes_down: Whole
    seconds: float


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run as its folder shows it.

    Attributes:
        path: the folder.
        state: ``finished``; ``running`` while a process writes; ``interrupted``; ``damaged`` where files are not a run's, or the
            record of a finished one cannot be read.
        about, finished: None where the file is missing or is none.
        last: the last row of the metrics that has a loss, or None.
        faults: what could not be read, without content.
    """

    path: Path
    state: State
    about: About | None
    finished: Finished | None
    last: Row | None
    faults: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Training steps that are known of."""
        return self.finished.steps if self.finished else self.last.step if self.last else 0

    @property
    def loss(self) -> float | None:
        """The last loss: held-out of a finished run, else of the last row."""
        return self.finished.loss if self.finished else self.last.loss if self.last else None

    @property
    def spent(self) -> Spent:
        """What was spent by then, with what it means: by the record, else by the last row, else by the policy it began with."""
        if (done := self.finished) is not None:
            return spent_by(done.epsilon, done.delta, done.unit, done.relation)
        if self.last is not None and self.last.meaning is not None:
            return Spent("stated", self.last.epsilon, self.last.meaning)
        epsilon = None if self.last is None else self.last.epsilon
        return UNKNOWN if self.about is None else spent_under(self.about.policy, epsilon)


def claim(folder: Path, *, overwrite: bool) -> None:
    """Take a folder for a new run. Nothing is deleted yet: a run that never begins must not cost an earlier one.

    Raises:
        InputError: SS-1280 for a finished run without ``overwrite``; SS-1282 when a run is at work there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if is_written(folder):
        raise InputError("SS-1282", f"a run is at work in {folder}", hint="Wait for it, or name another --out.")
    if (folder / RUN).exists() and not overwrite:
        raise InputError(
            "SS-1280",
            f"{folder} holds a finished run",
            hint="Name another --out, or add --overwrite to delete that run.",
        )


def clear(folder: Path, *, results: bool) -> None:
    """Delete what an earlier run left in a claimed folder, just before the new one begins. Other files stay.

    The record goes first: what is half deleted must not look finished.

    Args:
        folder: of the run.
        results: adapters and records of sums, too. Of an interrupted run the latter may show who is to blame, and stay.
    """
    for name in (RUN, ABOUT, HELD_OUT, METRICS):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    for path in (path for path in folder.glob("round-*") if results and path.is_dir() and not path.is_symlink()):
        shutil.rmtree(path, ignore_errors=True)
    for path in (path for pattern in _OWN for path in folder.glob(pattern) if results):
        path.unlink()


def read_run(folder: Path) -> RunFolder:
    """What there is of one run.

    Raises:
        InputError: SS-1281 when there is nothing of a run.
    """
    if not any(_is_file(folder / name) for name in (RUN, ABOUT, METRICS)):
        raise InputError(
            "SS-1281",
            f"{folder} holds no run",
            hint="Name the --out folder of `securesplit train`, or one above for `runs ls`.",
        )
    faults: list[str] = []
    about = _read(folder / ABOUT, About, faults)
    finished = _read(folder / RUN, Finished, faults)
    unreadable = any(fault.startswith(RUN) for fault in faults)
    rows = read_metrics(folder, last_bytes=_TAIL)
    faults += rows.faults
    last = next((row for row in reversed(rows.rows) if row.loss is not None), None)
    state: State = "interrupted"
    if is_written(folder):
        state = "running"
    elif finished is not None:
        state = "finished"
    elif unreadable or (faults and about is None):
        state = "damaged"
    return RunFolder(folder, state, about, finished, last, tuple(faults))


def list_runs(root: Path) -> tuple[RunFolder, ...]:
    """All runs in a folder and up to three levels below, oldest first, then by name.

    Raises:
        InputError: SS-1281 when ``root`` is no folder.
    """
    if not root.is_dir():
        raise InputError("SS-1281", f"{root} is no folder", hint="Name a folder that holds runs.")
    found = list[RunFolder]()
    for folder in _folders(root, _DEPTH):
        if _looks_like_a_run(folder):
            with suppress(InputError):  # Deleted since then, as --overwrite does; the others are still there.
                found.append(read_run(folder))
    return tuple(sorted(found, key=lambda run: (run.about.started.timestamp() if run.about else 0.0, str(run.path))))


def _looks_like_a_run(folder: Path) -> bool:
    return any(_is_file(folder / name) for name in (RUN, ABOUT))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # In a folder that may not be entered.
        return False


def _folders(root: Path, depth: int) -> Iterator[Path]:
    yield root
    if not depth:
        return
    try:
        below = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:  # A folder that may not be read holds no run for us.
        return
    for path in below:
        yield from _folders(path, depth - 1)


def _read(path: Path, kind: type[M], faults: list[str]) -> M | None:
    """The file as a model; None, and a fault for each thing that is wrong, where it is none."""
    try:
        # Reading a pipe or a device would never end.
        if not stat.S_ISREG((found := path.stat()).st_mode) or found.st_size > _MOST_BYTES:
            faults.append(f"{path.name}: no file, or larger than any that a run writes")
            return None
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        faults.append(f"{path.name}: {type(error).__name__}")
    except ValidationError as error:
        faults += [
            f"{path.name}: {'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"
            for fault in error.errors(include_url=False, include_input=False, include_context=False)
        ]
    return None
