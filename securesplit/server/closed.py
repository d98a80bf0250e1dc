"""What a server remembers of the rounds of a job over its own end: which run names are closed, and the last round that had a sum.

It is on disk before any client is told the sum, or that the round is closed. So after a restart nobody has to be believed: a
client that keeps a sum which is not written down here never had it from this server. Without the file, as in the folder of a
new machine, that is unknown, and what clients claim is judged by securesplit/server/claims.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from securesplit.errors import InputError
from securesplit.pki.files import write_atomically

__all__ = ["ClosedRuns", "LastRound"]

_log = logging.getLogger(__name__)
_MOST = 4096


@dataclass(frozen=True, slots=True)
class LastRound:
    """The last round of a job that had a sum.

    Attributes:
        number: which.
        clients: who is in its sum, sorted.
        runs: names of its runs that ended with one, while it is open; none once it is closed.
    """

    number: int
    clients: tuple[str, ...] = ()
    runs: tuple[bytes, ...] = ()

    @property
    def open(self) -> bool:
        """Whether somebody may still need help with it."""
        return bool(self.runs)


class ClosedRuns:
    """Names of runs whose rounds are closed, the oldest forgotten beyond 4096, and the last round; on disk where there is a path.

    Args:
        path: a file that this alone writes; made when absent, and begun anew when it is damaged.
        job: the job's digest; the last round of another job is none.

    Attributes:
        last: the last round that had a sum; None when that is not known.
    """

    def __init__(self, path: Path | None = None, job: str = "") -> None:
        self._path, self._job = path, job
        self._runs: dict[bytes, None] = {}
        self.last: LastRound | None = None
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            fields = json.loads(path.read_bytes())
            runs, last = _names(fields["runs"]), fields.get("last")
            if last is not None and last["job"] == self._job:
                self.last = LastRound(int(last["round"]), tuple(map(str, last["clients"])), tuple(_names(last["open"])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # It only spares clients a wait: without it those who keep a sum wait for each other once more.
            _log.warning("%s is not the list of closed rounds that a server keeps; it begins anew", path)
            return
        self._runs = dict.fromkeys(runs)

    def __contains__(self, run: bytes) -> bool:
        return run in self._runs

    def summed(self, last: LastRound) -> None:
        """A run has ended with a sum. What the disk does not take is not remembered, and the round goes on."""
        self.last = last
        try:
            self._write()
        except InputError as error:
            if self._path is not None:  # What it says would be taken for the truth.
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
            _log.error(
                "the round that is open is not kept: after a restart clients have to say what they have: %s", error
            )

    def void(self) -> None:
        """Nobody keeps the last round's sum: it is as if there had been none."""
        if self.last is not None:
            self.summed(LastRound(self.last.number - 1))

    def add(self, runs: Iterable[bytes]) -> None:
        """Keep these names, durably when there is a path: the last round is closed.

        Raises:
            InputError: SS-1804 when they cannot be written.
        """
        self._runs |= dict.fromkeys(runs)
        self._runs = dict.fromkeys(list(self._runs)[-_MOST:])
        if self.last is not None:
            self.last = LastRound(self.last.number)
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        last = None
        if self.last is not None:
            last = {
                "job": self._job,
                "round": self.last.number,
                "clients": list(self.last.clients),
                "open": [run.hex() for run in self.last.runs],
            }
        text = json.dumps({"format": 2, "runs": [run.hex() for run in self._runs], "last": last})
        write_atomically(self._path, text.encode("ascii"), mode=0o600)


def _names(fields: Iterable[str]) -> list[bytes]:
    return [run for run in map(bytes.fromhex, fields) if len(run) == 16]
