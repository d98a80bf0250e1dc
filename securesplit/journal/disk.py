"""The files of an audit log: ``000001.jsonl``, ``000002.jsonl``, ..., beside ``head`` and ``lock``.

One process writes. A write that the disk takes only in part is taken back, so that a full disk leaves whole lines.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from securesplit.journal.faults import held, unwritable

__all__ = ["Files", "file_name", "files_of"]

_SUFFIX = ".jsonl"


def file_name(number: int) -> str:
    """Of a file, from 1."""
    return f"{number:06d}{_SUFFIX}"


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of a log in their order, whether or not their numbers follow one another.

    Raises:
        OSError: when the folder cannot be read.
    """
    return tuple(sorted(_named(path)))


def _named(path: Path) -> Iterator[Path]:
    for entry in path.iterdir():
        stem = entry.name.removesuffix(_SUFFIX)
        if entry.name.endswith(_SUFFIX) and stem.isascii() and stem.isdigit() and len(stem) == 6:
            yield entry


class Files:
    """The open end of a log.

    Attributes:
        number: of the file that is written, from 1; 0 before there is one.
    """

    def __init__(self, path: Path, lock: int, *, file_bytes: int) -> None:
        self._path = path
        self._lock = lock
        self._most = file_bytes
        self._handle: int | None = None
        self._size = 0
        self.number = 0

    @classmethod
    def open(cls, path: Path, *, file_bytes: int) -> Files:
        """Take the folder for this process.

        Raises:
            InputError: SS-1586 when another process has it. CheckFailed: SS-1585.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise unwritable(error.strerror or type(error).__name__) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
                raise held(str(path)) from None
            raise unwritable(error.strerror or type(error).__name__) from None
        return cls(path, lock, file_bytes=file_bytes)

    @property
    def full(self) -> bool:
        """Whether the next row belongs into a new file."""
        return self._size >= self._most

    def begin(self, number: int) -> None:
        """Go on in a new file. What was written before is on disk when this returns. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(self._path / file_name(number), flags, 0o600)
        try:
            self._sync_folder()
            if self._handle is not None:
                os.fsync(self._handle)
        except OSError:
            os.close(handle)
            (self._path / file_name(number)).unlink(missing_ok=True)
            raise
        if self._handle is not None:
            os.close(self._handle)
        self._handle, self._size, self.number = handle, 0, number

    def resume(self, number: int, size: int) -> None:
        """Go on in a file that is there, after its first ``size`` bytes; what follows them is taken out. Raises OSError."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._handle = os.open(self._path / file_name(number), flags)
        os.ftruncate(self._handle, size)
        self._size, self.number = size, number

    def write(self, line: bytes) -> None:
        """Append a line, whole or not at all. Raises OSError."""
        assert self._handle is not None
        done = 0
        try:
            while done < len(line):
                done += os.write(self._handle, line[done:])
        except OSError:
            if done:
                os.ftruncate(self._handle, self._size)
            raise
        self._size += len(line)

    def duplicate(self) -> int:
        """A handle of the open file, for who waits for the disk while others write and files change. Raises OSError."""
        assert self._handle is not None
        return os.dup(self._handle)

    def close(self) -> None:
        """Close the file and let go of the folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        with suppress(OSError):
            os.close(self._lock)

    def _sync_folder(self) -> None:
        folder = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
