"""The numbers of a run as it goes: ``metrics.jsonl``, one row a line, each on its way to the disk before the next step.

Losses depend on private text (threat-model.md, O8). They are written to the run's folder with mode 0600 and are never sent.

A process may die in the middle of a line: a last line without an end is passed over in reading, and cut off where a run goes
on. The file is locked while a run writes it, so that two runs cannot share it, and so that others can tell a run that is at
work from one that was interrupted.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from securesplit.errors import InputError
from securesplit.policy.meaning import Meaning
from securesplit.runs.spent import Name, Share

__all__ = ["METRICS", "Kind", "Metrics", "Reading", "Row", "Rows", "Sink", "is_written", "read_metrics"]

METRICS = "metrics.jsonl"
Kind = Literal["step", "held-out"]
_MOST_BYTES = 1 << 28
_TRIES, _PAUSE = 10, 0.05


@dataclass(frozen=True, slots=True)
class Reading:
    """What the meters of a client show now.

    Attributes:
        bytes_up, bytes_down: message bytes of this session.
        epsilon: of the record that has spent most; None without a bound.
        meaning: of ``epsilon``.
    """

    bytes_up: int
    bytes_down: int
    epsilon: float | None
    meaning: Meaning | None = None


class Row(BaseModel):
    """One line.

    Attributes:
        kind: ``step`` after a training step, ``held-out`` after an evaluation.
        step: training steps so far.
        round: number of the round, from 0; before the first round, and in a held-out row, that many rounds are over.
        loss: nats per token; None where it was no finite number.
        lr: this side's learning rate, where it is known.
        seconds: since the run began; over an interruption it goes on.
        bytes_up, bytes_down: message bytes since the run began, over interruptions, too.
        epsilon: as :class:`Reading`.
        delta, unit, relation: what ``epsilon`` speaks of; None without a bound, and in rows of earlier versions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    kind: Kind
    step: Annotated[int, Field(ge=0, lt=1 << 63)]
    round: Annotated[int, Field(ge=0, lt=1 << 63)]
    loss: float | None
    lr: float | None = None
    seconds: Annotated[float, Field(ge=0)]
    bytes_up: Annotated[int, Field(ge=0, lt=1 << 63)]
    bytes_down: Annotated[int, Field(ge=0, lt=1 << 63)]
    epsilon: Annotated[float, Field(ge=0)] | None = None
    delta: Share | None = None
    unit: Name | None = None
    relation: Name | None = None

    @property
    def meaning(self) -> Meaning | None:
        """What ``epsilon`` speaks of, where the row says it whole."""
        if self.delta is None or self.unit is None or self.relation is None:
            return None
        return Meaning(self.delta, self.unit, self.relation)


@dataclass(frozen=True, slots=True)
class Rows:
    """A file, read.

    Attributes:
        rows: in the file's order.
        torn: whether the last line has no end; it is left out.
        faults: one for each other line that is no row, with its number and without its content.
    """

    rows: tuple[Row, ...]
    torn: bool
    faults: tuple[str, ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """Of the training steps."""
        return tuple(row.loss for row in self.rows if row.kind == "step" and row.loss is not None)

    @property
    def curve(self) -> tuple[float, ...]:
        """Held-out losses."""
        return tuple(row.loss for row in self.rows if row.kind == "held-out" and row.loss is not None)


class Sink(Protocol):
    """Whoever else wants the rows, such as securesplit/runs/tensorboard.py."""

    def take(self, row: Row) -> None:
        """One row, just written."""
        ...

    def close(self) -> None:
        """No more rows follow."""
        ...


class Metrics:
    """Writes one run's rows.

    Args:
        folder: of the run.
        read: shows the meters.
        after: None begins anew; a number of steps goes on with a run behind its checkpoint of that step: later rows, of
            steps that are about to be done again, are cut off.
        looked: with ``after``, how many rounds were over at the checkpoint's last evaluation, -1 before the first; evaluations
            behind that one are about to be done again, too. None keeps them.
        lr: learning rate to note where a step does not name one.
        sink: gets every row, too.
        clock: seconds, never going back.

    Raises:
        InputError: SS-1282 when another process writes this run, or when its file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        read: Callable[[], Reading],
        *,
        after: int | None = None,
        looked: int | None = None,
        lr: float | None = None,
        sink: Sink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._lr, self._sink, self._clock = read, lr, sink, clock
        path = folder / METRICS
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _unusable(path, type(error).__name__) from None
        self._file = os.fdopen(handle, "r+b", buffering=0)
        try:
            _lock(self._file)
            os.fchmod(handle, 0o600)
            kept, last = _kept(self._file.read(), after, looked)
            self._file.truncate(kept)
            self._file.seek(kept)
        except OSError as error:
            self._file.close()
            raise _unusable(path, type(error).__name__) from None
        self._origin = clock() - (last.seconds if last else 0.0)
        self._up, self._down = (last.bytes_up, last.bytes_down) if last else (0, 0)

    def step(self, *, number: int, step: int, loss: float, lr: float | None = None) -> None:
        """A training step is done.

        Args:
            number: the round, from 0.
            step: training steps so far, this one included.
            loss: of its batch, nats per token.
            lr: learning rate of it, where it is not the one that the run began with.
        """
        self._write("step", number, step, loss, self._lr if lr is None else lr)

    def held_out(self, *, number: int, step: int, loss: float) -> None:
        """An evaluation is done, after ``number`` rounds and ``step`` training steps."""
        self._write("held-out", number, step, loss, None)

    def close(self) -> None:
        """Let go of the file, on the disk."""
        if self._file.closed:
            return
        os.fsync(self._file.fileno())
        self._file.close()
        if self._sink is not None:
            self._sink.close()

    def _write(self, kind: Kind, number: int, step: int, loss: float, lr: float | None) -> None:
        now = self._read()
        said = now.meaning
        row = Row(
            kind=kind, step=step, round=number, loss=loss if math.isfinite(loss) else None, lr=lr,
            seconds=max(0.0, round(self._clock() - self._origin, 4)), bytes_up=self._up + now.bytes_up, bytes_down=self._down + now.bytes_down,
            epsilon=now.epsilon, delta=None if said is None else said.delta, unit=None if said is None else said.unit,
            relation=None if said is None else said.relation,
        )  # fmt: skip
        line = row.model_dump_json().encode() + b"\n"
        while line:  # One write as a rule; a disk that takes less gets the rest.
            line = line[self._file.write(line) or 0 :]
        if self._sink is not None:
            self._sink.take(row)


def read_metrics(folder: Path, *, last_bytes: int = _MOST_BYTES) -> Rows:
    """The rows of a run that is over, at work, or was interrupted; none where there is no file.

    Args:
        folder: of the run.
        last_bytes: look at no more than the end of the file.
    """
    if (folder / METRICS).exists() and not (folder / METRICS).is_file():  # Reading a pipe would never end.
        return Rows((), torn=False, faults=(f"{METRICS}: no file",))
    try:
        with (folder / METRICS).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - last_bytes)
            file.seek(start)
            data = file.read(last_bytes)
    except FileNotFoundError:
        return Rows((), torn=False, faults=())
    except OSError as error:
        return Rows((), torn=False, faults=(f"{METRICS}: {type(error).__name__}",))
    if start:  # The first line of a part is most likely half of one.
        data = data[data.find(b"\n") + 1 :]
    rows: list[Row] = []
    faults: list[str] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(Row.model_validate_json(line))
        except ValidationError as error:
            faults.append(f"{METRICS} line {number}: {error.error_count()} fault(s)")
    return Rows(tuple(rows), bool(lines[-1]), tuple(faults))


def is_written(folder: Path) -> bool:
    """Whether a process is writing this run's rows now."""
    if not (folder / METRICS).is_file():
        return False
    try:
        with (folder / METRICS).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lock(file: IO[bytes]) -> None:
    """For this process alone. Whoever looks whether a run is at work holds the file for a moment, too; that is waited out."""
    for left in reversed(range(_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not left:
                raise
            time.sleep(_PAUSE)
        else:
            return


def _kept(data: bytes, after: int | None, looked: int | None = None) -> tuple[int, Row | None]:
    """How many bytes stay of what is there, and the last row among them."""
    kept: int = 0
    last: Row | None = None
    for line in data.split(b"\n")[:-1] if after is not None else ():
        try:
            row = Row.model_validate_json(line)
        except ValidationError:
            break
        if after is not None and row.step > after:
            break
        if looked is not None and row.kind == "held-out" and row.round > looked:
            break
        kept, last = kept + len(line) + 1, row
    return kept, last


def _unusable(path: Path, why: str) -> InputError:
    return InputError(
        "SS-1282", f"{path} cannot be written: another run writes it, or {why}",
        hint="Wait for the other run, or name another --out.",
    )  # fmt: skip
