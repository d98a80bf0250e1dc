"""Reads a log, row after row through all of its files, and stops at the first line that is not the row that follows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from securesplit.journal.disk import file_name, files_of
from securesplit.journal.events import Began, Continued
from securesplit.journal.faults import altered, missing
from securesplit.journal.row import MAX_LINE, Row, RowError, parse_row

__all__ = ["Line", "Place", "Tail", "last_hash", "scan", "scan_file"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a line stands.

    Attributes:
        file: number of the file, from 1.
        line: number in the file, from 1.
        end: bytes of the file up to and with this line.
    """

    file: int
    line: int
    end: int

    def __str__(self) -> str:
        return f"{file_name(self.file)} line {self.line}"


@dataclass(frozen=True, slots=True)
class Line:
    """A row and its place."""

    row: Row
    place: Place


@dataclass(frozen=True, slots=True)
class Tail:
    """An unfinished last line: bytes without a newline at the end of the last file."""

    file: int
    start: int
    bytes: int
    sha256: str


def scan(path: Path) -> Iterator[Line | Tail]:
    """All rows of a log, then its unfinished end if it has one.

    Raises:
        InputError: SS-1587 when there is no log.
        CheckFailed: SS-1580 at the first line that does not follow.
    """
    try:
        files = files_of(path)
    except OSError as error:
        raise missing(str(path), error.strerror or type(error).__name__) from None
    if not files:
        raise missing(str(path), "there is no file 000001.jsonl")
    for number, file in enumerate(files, start=1):
        if file.name != file_name(number):
            raise altered(file_name(number), "the file is missing")
    index, previous = 0, None
    for number in range(1, len(files) + 1):
        for found in scan_file(path, number, index=index, previous=previous, last=number == len(files)):
            if isinstance(found, Line):
                index, previous = found.row.index + 1, found.row.hash
            yield found


def scan_file(path: Path, number: int, *, index: int, previous: bytes | None, last: bool) -> Iterator[Line | Tail]:
    """The rows of one file.

    Args:
        path: the log's folder.
        number: of the file.
        index, previous: of the first row, and the hash before it; None at the beginning of the log.
        last: whether an unfinished line at the end may be one.

    Raises:
        CheckFailed: SS-1580. InputError: SS-1587 when the file cannot be read.
    """
    offset = count = 0
    try:
        with (path / file_name(number)).open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                count += 1
                if last and len(line) <= MAX_LINE and not line.endswith(b"\n"):
                    yield Tail(number, offset, len(line), hashlib.sha256(line).hexdigest())
                    return
                offset += len(line)
                place = Place(number, count, offset)
                try:
                    row = parse_row(line, previous=previous, index=index)
                except RowError as error:
                    raise altered(str(place), str(error)) from None
                _require_place(row, place)
                index, previous = index + 1, row.hash
                yield Line(row, place)
    except OSError as error:
        raise missing(str(path), f"{file_name(number)}: {error.strerror or type(error).__name__}") from None
    if count == 0 and not last:
        raise altered(file_name(number), "the file is empty")


def _require_place(row: Row, place: Place) -> None:
    """A log begins once, and every further file says which one it is."""
    first = place.line == 1
    if isinstance(row.event, Began) != (first and place.file == 1):
        raise altered(str(place), "a log begins once, in its first line")
    if first and place.file > 1 and not (isinstance(row.event, Continued) and row.event.file == place.file):
        raise altered(str(place), "the file does not say that it is this one")


def last_hash(path: Path, number: int) -> tuple[int, bytes]:
    """Index and hash that the last line of a whole file states; what follows shows whether they are true.

    Raises:
        CheckFailed: SS-1580. InputError: SS-1587.
    """
    name = file_name(number)
    try:
        with (path / name).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_LINE))
            line = file.read().splitlines(keepends=True)[-1:]
        fields = json.loads(line[0].decode("ascii"))
        return int(fields["index"]), bytes.fromhex(fields["hash"])
    except OSError as error:
        raise missing(str(path), f"{name}: {error.strerror or type(error).__name__}") from None
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise altered(name, "its last line is no row") from None
