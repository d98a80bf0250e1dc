"""The same rows as TensorBoard reads them: event files in the run's folder, an option. They are as private as the rows."""

from __future__ import annotations

import time
from collections.abc import Callable
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
        from tensorboard.summary import Writer

        place = folder / FOLDER
        place.mkdir(mode=0o700, exist_ok=True)
        self._now = now
        self._writer: Any = Writer(str(place))

    def take(self, row: Row) -> None:
        """See :class:`securesplit.runs.metrics.Sink`."""
        for tag, value in (
            (f"loss/{row.kind}", row.loss), ("lr", row.lr), ("bytes/up", row.bytes_up),
            ("bytes/down", row.bytes_down), (f"epsilon/{row.meaning}", None if row.meaning is None else row.epsilon),
        ):  # fmt: skip
            if value is not None:
                self._writer.add_scalar(tag, value, row.step, wall_time=self._now())
        if row.kind == "held-out":
            self._writer.flush()

    def close(self) -> None:
        """See :class:`securesplit.runs.metrics.Sink`."""
        self._writer.close()
