"""The same rows as TensorBoard reads them: event files in the run's folder, an option. They are as private as the rows.

Event files only grow, one for each process, and one that was killed had not written its last rows. So a run that goes on
marks all that stands there as void, from step 0, and writes the rows that stay once more: then TensorBoard shows every step
once, and no step less than ``metrics.jsonl``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from securesplit.errors import InputError
from securesplit.runs.metrics import Row

__all__ = ["FOLDER", "TensorBoard", "require_tensorboard"]

FOLDER = "tensorboard"


def require_tensorboard() -> None:
    """Look before anything is sent.

    Raises:
        InputError: SS-1283 when the package ``tensorboard`` is not there.
    """
    if find_spec("tensorboard") is None:
        raise InputError(
            "SS-1283", "--tensorboard needs the package tensorboard, which is not installed",
            hint="Install securesplit[tensorboard], or read metrics.jsonl.",
        )  # fmt: skip


class TensorBoard:
    """Writes scalars: ``loss/step``, ``loss/held-out``, ``lr``, ``bytes/up``, ``bytes/down``, and ``epsilon/`` with what it
    means as its name, such as ``epsilon/at delta 1e-05, unit sequence, replace-one``; by step.

    Args:
        folder: of the run.
        now: seconds since 1970.

    Raises:
        InputError: SS-1283 when the package ``tensorboard`` is not there.
    """

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.time) -> None:
        require_tensorboard()
        place = folder / FOLDER
        place.mkdir(mode=0o700, exist_ok=True)
        self._now = now
        self._place = str(place)
        self._writer: Any = None

    def again(self, rows: Sequence[Row]) -> None:
        """See :class:`securesplit.runs.metrics.Sink`. The rows' times are as if the run had not been interrupted."""
        self.close()
        self._writer = _writer(self._place)
        ended = self._now()
        for row in rows:
            self._write(row, ended - (rows[-1].seconds - row.seconds))
        self._writer.flush()

    def take(self, row: Row) -> None:
        """See :class:`securesplit.runs.metrics.Sink`."""
        if self._writer is None:
            self._writer = _writer(self._place)
        self._write(row, self._now())
        if row.kind == "held-out":
            self._writer.flush()

    def close(self) -> None:
        """See :class:`securesplit.runs.metrics.Sink`."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, row: Row, when: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        for tag, value in (
            (f"loss/{row.kind}", row.loss), ("lr", row.lr), ("bytes/up", row.bytes_up),
            ("bytes/down", row.bytes_down), (f"epsilon/{row.meaning}", None if row.meaning is None else row.epsilon),
        ):  # fmt: skip
            if value is not None:
                self._writer.add_event(Event(wall_time=when, step=row.step, summary=scalar_pb(tag, value)))


def _writer(place: str) -> Any:
    """A new event file, behind whose first mark all that earlier files of the folder say is void.

    TensorBoard takes the first such mark for a start and obeys those that follow, so each file has one.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(place)
    writer.add_event(Event(step=0, session_log=SessionLog(status=SessionLog.START)))
    return writer
