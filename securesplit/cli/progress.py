"""Progress of long work on stderr: bars for people, JSON lines for a parent process, nothing when asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import typer

ProgressStyle = Annotated[
    Literal["auto", "bars", "json", "none"], typer.Option("--progress", help="How progress is shown on stderr.")
]
Report = Callable[[str, int, int, float | None], None]


def _silent(_what: str, _done: int, _total: int, _loss: float | None) -> None:
    """Progress that nobody watches."""


class Plain:
    """A line whenever something new begins; for logs."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, what: str, _done: int, total: int, _loss: float | None) -> None:
        """Tell what is being done, when it is something new."""
        if what != self._last:
            self._last = what
            sys.stderr.write(f"{what} ...\n" if total <= 1 else f"{what}, {total} steps ...\n")
            sys.stderr.flush()


def _lines(what: str, done: int, total: int, loss: float | None) -> None:
    sys.stderr.write(json.dumps({"what": what, "done": done, "total": total, "loss": loss}) + "\n")
    sys.stderr.flush()


@contextmanager
def reporting(style: str) -> Iterator[Report]:
    """A function to report to: ``(what, done, total, loss or None)``."""
    if style == "json":
        yield _lines
        return
    if style == "none":
        yield _silent
        return
    if style == "auto" and not sys.stderr.isatty():
        yield Plain()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    with bars:
        tasks: dict[str, object] = {}

        def report(what: str, done: int, total: int, loss: float | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, loss="")
            bars.update(tasks[what], completed=done, total=total, loss="" if loss is None else f"loss {loss:.3f}")  # type: ignore[arg-type]

        yield report
