"""The last rows of a log, and what is added while somebody watches. Nothing is verified here; verify.py does that."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from securesplit.journal.disk import file_name, files_of
from securesplit.journal.faults import missing

__all__ = ["Seen", "described", "follow", "last_lines"]


@dataclass(frozen=True, slots=True)
class Seen:
    """The last whole lines of a log, oldest first, and where they end: byte ``end`` of file ``file``."""

    lines: tuple[str, ...]
    file: int
    end: int


def last_lines(path: Path, count: int) -> Seen:
    """Read the last whole lines; of the last two files, which hold tens of thousands.

    Raises:
        InputError: SS-1587.
    """
    kept: deque[str] = deque(maxlen=count)
    end = 0
    try:
        files = files_of(path)
        for file in files[-2:]:
            end = 0
            with file.open("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):
                        end += len(line)
                        kept.append(_text(line))
    except OSError as error:
        raise missing(str(path), error.strerror or type(error).__name__) from None
    if not files:
        raise missing(str(path), "there is no file 000001.jsonl")
    return Seen(tuple(kept), len(files), end)


def follow(path: Path, seen: Seen, wait: Callable[[], bool]) -> Iterator[str]:
    """Lines that are added after those that were seen, through all files.

    Args:
        path: the log's folder.
        seen: from :func:`last_lines`.
        wait: called when there is nothing new; False ends it.

    Raises:
        InputError: SS-1587.
    """
    number, place = seen.file, seen.end
    try:
        while True:
            # Looked at before the file is read: a file that is followed by another gets no more lines.
            followed = (path / file_name(number + 1)).exists()
            with (path / file_name(number)).open("rb") as file:
                file.seek(place)
                while (line := file.readline()).endswith(b"\n"):
                    place += len(line)
                    yield _text(line)
            if followed:
                number, place = number + 1, 0
            elif not wait():
                return
    except OSError as error:
        raise missing(str(path), error.strerror or type(error).__name__) from None


def _text(line: bytes) -> str:
    return line.decode("ascii", errors="replace").rstrip("\n")


def described(line: str) -> str:
    """A line for people: number, time, kind, then what its fields say; hashes and certificates are left to the JSON."""
    try:
        row = json.loads(line)
        index, at, kind = row.pop("index"), row.pop("at"), row.pop("kind")
        row.pop("hash", None)
        rest = " ".join(
            f"{k}={_short(v)}" for k, v in row.items() if v not in {"", 0} and k not in {"certificate", "signature"}
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "(not a row)"
    return f"{index:>8} {at} {kind:<11} {rest}".rstrip()


def _short(value: object) -> str:
    text = str(value)
    return (
        text if len(text) <= 64 and not (len(text) >= 32 and all(c in "0123456789abcdef" for c in text)) else text[:16]
    )
