"""The demo's progress on stderr: bars on a terminal, a line per phase elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from attacks.exchange import Progress as AttackProgress


class Bars:
    """Bars that appear when something is first heard of.

    Args:
        progress: where they are drawn; None prints a line when a bar begins.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID | None] = {}

    def update(self, name: str, done: float, total: float, note: str = "") -> None:
        """Set one bar."""
        if self._progress is None:
            if name not in self._tasks:
                sys.stderr.write(f"{name} ...\n")
                sys.stderr.flush()
            self._tasks[name] = None
            return
        task = self._tasks.get(name)
        if task is None:
            task = self._tasks[name] = self._progress.add_task(name, total=total, note="")
        self._progress.update(task, completed=done, total=total, note=note)

    def party(self, run: str) -> Callable[[str, str, int, int, float | None], None]:
        """For a client's progress."""

        def watch(party: str, what: str, done: int, total: int, loss: float | None) -> None:
            self.update(f"{run}: {party}, {what}", done, total, "" if loss is None else f"loss {loss:.3f}")

        return watch

    def attack(self, run: str) -> Callable[[AttackProgress], None]:
        """For an attack's progress."""

        def watch(told: AttackProgress) -> None:
            self.update(f"attack on {run}: {told.attack}", told.done, told.total)

        return watch

    def phase(self, name: str) -> Callable[[str, float], None]:
        """For work that tells a phase and a fraction."""

        def watch(phase: str, fraction: float) -> None:
            self.update(f"{name}: {phase}", round(100 * fraction), 100)

        return watch


@contextmanager
def bars() -> Iterator[Bars]:
    """Bars for the time of a with block."""
    if not sys.stderr.isatty():
        yield Bars(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bars(progress)
