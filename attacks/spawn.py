"""Start the attack process, feed it a task, and read its events."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from attacks.exchange import EVENT, Answer, Event, Examined, Failed, Known, Progress, Skipped, Task
from securesplit import errors
from securesplit.errors import CheckFailed, SecureSplitError

_KINDS: dict[str, type[SecureSplitError]] = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SecureSplitError)
}


@dataclass(slots=True)
class Heard:
    """What an attack process said.

    Attributes:
        known: what it guesses without looking. answers: one per attack and seed. skipped: attacks that were not run.
        examined: tests of the noise.
    """

    known: Known | None = None
    answers: list[Answer] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    examined: list[Examined] = field(default_factory=list)


def run_attack(task: Task, progress: Callable[[Progress], None] | None = None) -> tuple[Known, Heard]:
    """Run a task in a process of its own.

    The process gets the task and nothing else: no path to the truth, no memory shared with the caller.

    Returns:
        What the attacker guesses without looking, and all that it said.

    Raises:
        SecureSplitError: whatever the attack process raised, as it raised it.
        CheckFailed: SS-1572 when the process ended without an answer.
    """
    heard = Heard()
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, inherited)))}
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(
            [sys.executable, "-m", "attacks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            encoding="utf-8",
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                _hand_over(process.stdin, task)
                for line in process.stdout:
                    _take(heard, _event(line), progress)
            except BaseException:
                process.kill()
                raise
        log.seek(0)
        if process.returncode or heard.known is None:
            raise CheckFailed(
                "SS-1572",
                f"the attack process ended with status {process.returncode} ({_cause(log.read())})",
                hint="A status of -9 means that memory ran out: try --profile smoke.",
            )
    return heard.known, heard


def _take(heard: Heard, event: Event, progress: Callable[[Progress], None] | None) -> None:
    match event:
        case Progress():
            if progress is not None:
                progress(event)
        case Known():
            heard.known = event
        case Skipped():
            heard.skipped.append(event)
        case Examined():
            heard.examined.append(event)
        case Failed():
            raise _KINDS.get(event.error, CheckFailed)(event.code, event.what, hint=event.hint, details=event.details)
        case _:
            heard.answers.append(event)


def _hand_over(stdin: IO[str], task: Task) -> None:
    try:
        stdin.write(task.model_dump_json() + "\n")
        stdin.close()
    except BrokenPipeError:
        return  # The process died at once; its status tells why.


def _event(line: str) -> Event:
    try:
        return EVENT.validate_json(line)
    except ValidationError:
        raise CheckFailed(
            "SS-1572", "the attack process said something unintelligible", hint="This is a defect; report it."
        ) from None


def _cause(log: bytes) -> str:
    """The class of the exception that ended the process. Never its message, which may hold anything."""
    lines = log.decode("utf-8", "replace").strip().splitlines()
    last = lines[-1].split(":", 1)[0].strip() if lines else ""
    return last if last.replace(".", "").replace("_", "").isalnum() else "no cause given"
