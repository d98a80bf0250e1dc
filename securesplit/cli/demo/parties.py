"""The demo's parties: the server and the clients, each a process of its own that runs the ordinary commands."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from securesplit.errors import CheckFailed

Watch = Callable[[str, str, int, int, float | None], None]
"""(party, what, done, total, loss or None)"""


def command(*arguments: str | Path) -> list[str]:
    """A command line of this very installation."""
    return [sys.executable, "-m", "securesplit", *map(str, arguments)]


def die_with_parent() -> None:
    """In a new child: ask Linux to end it when the demo's own process ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def environment() -> Mapping[str, str]:
    """The parties' environment: threads that wait must not spin, because all parties share a few cores."""
    return {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def server(*arguments: str | Path, log: Path) -> Iterator[int]:
    """Run ``securesplit serve``, give the port, stop it in order at the end.

    Raises:
        CheckFailed: SS-1561 when it does not come up or does not end well.
    """
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command("--verbose", "serve", *arguments, "--output", "json"),
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(),
            preexec_fn=die_with_parent,  # noqa: PLW1509 (no thread of ours holds a lock across it),
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            if not line:
                process.wait()
                raise CheckFailed(
                    "SS-1561", "the demo's server did not start", hint=f"Its log is {log}: {last_line(log)}"
                )
            yield int(json.loads(line)["port"])
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if process.returncode != 0:
        raise CheckFailed(
            "SS-1561",
            f"the demo's server ended with status {process.returncode}",
            hint=f"Its log is {log}: {last_line(log)}",
        )


class Party:
    """One client process; its progress is watched in a thread.

    Args:
        name: for messages.
        arguments: of ``securesplit``.
        log: where its other stderr lines go.
        watch: told of its progress.
    """

    def __init__(self, name: str, *arguments: str | Path, log: Path, watch: Watch) -> None:
        self.name = name
        self._log = log
        self._process = subprocess.Popen(
            command(*arguments, "--output", "json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            preexec_fn=die_with_parent,  # noqa: PLW1509 (no thread of ours holds a lock across it),
            text=True,
        )
        self._thread = threading.Thread(target=self._follow, args=(watch,), daemon=True)
        self._thread.start()

    def result(self) -> Any:
        """Wait for the end; the one JSON object that it printed.

        Raises:
            CheckFailed: SS-1562 when it failed, with its own last words.
        """
        assert self._process.stdout is not None
        printed = self._process.stdout.read()
        status = self._process.wait()
        self._thread.join()
        if status != 0:
            raise CheckFailed(
                "SS-1562",
                f"{self.name} ended with status {status}",
                hint=f"Its log is {self._log}: {last_line(self._log)}",
            )
        return json.loads(printed)

    def stop(self) -> None:
        """End it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _follow(self, watch: Watch) -> None:
        assert self._process.stderr is not None
        with self._log.open("w", encoding="utf-8") as log:
            for line in self._process.stderr:
                if not line.startswith('{"what"'):
                    log.write(line)
                    continue
                told = json.loads(line)
                watch(self.name, told["what"], told["done"], told["total"], told["loss"])


def last_line(log: Path) -> str:
    """The last error line of a log; our messages hold no private text."""
    lines = [
        line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith("error[")
    ]
    return lines[-1] if lines else "it says nothing of ours"
