"""Which rounds a client has answered stage 4 for, on disk, so that a crash cannot make it answer one twice.

A second answer with another set of survivors would give the server both kinds of shares of one client, which opens that
client's update. The record is therefore durable before the answer leaves. Pass an :class:`AnswerLog` as ``persist``.

What this does not protect: against a user who deletes or restores the file, or runs one identity on two machines.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from securesplit.errors import AggregationAborted, InputError

__all__ = ["RECORD_BYTES", "AnswerLog", "record_of"]

RECORD_BYTES = 16 + 8 + 32


def record_of(session_id: bytes, round_number: int, t3: bytes) -> bytes:
    """The record: session id (16), round (8, big-endian), T3 (32)."""
    return session_id + round_number.to_bytes(8, "big") + t3


class AnswerLog:
    """An append-only file of answered rounds.

    Args:
        path: the file; made, private to the user, when absent, and locked while open. A torn last record (a crash while
            writing) is padded over: its fsync had not returned, so no answer had left.

    Raises:
        InputError: SS-1605 when the file cannot be opened or another process holds it.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file = -1
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            what = f"cannot open {self._path} for this process alone: {type(error).__name__}"
            raise InputError("SS-1605", what, hint="Name a writable file that no other client uses.") from None
        self._seen = self._load()
        # A new file's name must be as durable as its records.
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(folder)
        os.close(folder)

    def _load(self) -> set[bytes]:
        data = self._path.read_bytes()
        torn = len(data) % RECORD_BYTES
        if torn:
            os.write(self._file, bytes(RECORD_BYTES - torn))
            os.fsync(self._file)
        return {data[at : at + 24] for at in range(0, len(data), RECORD_BYTES)}

    def __call__(self, record: bytes) -> None:
        """Make a record durable.

        Raises:
            AggregationAborted: SS-6015 when this session and round is on file already, or the write fails.
        """
        if record[:24] in self._seen:
            raise AggregationAborted(
                "SS-6015", "this round was answered before", hint="Never answer a round twice; start a new one."
            )
        self._seen.add(record[:24])
        try:
            written = os.write(self._file, record)
            os.fsync(self._file)
        except OSError:
            written = 0
        if written != RECORD_BYTES or len(record) != RECORD_BYTES:
            raise AggregationAborted(
                "SS-6015",
                "the answer could not be recorded, so it is not given",
                hint="Free disk space; start a new round.",
            )

    def close(self) -> None:
        """Close the file; nothing can be recorded, and so nothing answered, afterwards."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
