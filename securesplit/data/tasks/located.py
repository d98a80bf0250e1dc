"""JSON and CSV from a file, entry by entry with the line where each begins; sizes are capped before anything is parsed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from securesplit.data.tasks.faults import Faults
from securesplit.errors import InputError

__all__ = ["Located", "json_entries", "json_lines", "keyed_entries", "paragraphs", "table_rows", "whole_text"]

MAX_LINE_BYTES = 1 << 22
MAX_FILE_BYTES = 1 << 28
MAX_LINES_BYTES = 1 << 31
_GLANCE = 4096
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Located:
    """One entry.

    Attributes:
        line: where it begins, from 1.
        value: what was parsed.
    """

    line: int
    value: object


class _Twice(ValueError):
    """A key stands twice in one object."""


class _More(ValueError):
    """Something stands behind the end."""


def json_entries(path: Path, faults: Faults) -> Iterator[Located]:
    """The entries of an array, when the file is one, else one entry a line. It is opened once: it may be a pipe."""
    with _opened(path) as file:
        if file.peek(_GLANCE).removeprefix(_BOM).lstrip().startswith(b"["):
            yield from _array(_text(file, path, faults), path, None, faults)
        else:
            yield from _values(_lines_of(file, path, faults), path, faults)


def json_lines(path: Path, faults: Faults) -> Iterator[Located]:
    """One JSON value a line; blank lines are skipped."""
    yield from _values(_lines(path, faults), path, faults)


def _values(lines: Iterator[tuple[int, str]], path: Path, faults: Faults) -> Iterator[Located]:
    for number, text in lines:
        if text.strip():
            try:
                yield Located(number, _decoder().decode(text.strip()))
            except (ValueError, RecursionError) as error:
                faults.add(path, number, _complaint(error))


def keyed_entries(path: Path, key: str | None, faults: Faults) -> Iterator[Located]:
    """The entries of one array: the whole file, or the value of a key of the object that the file is.

    A file that stops being JSON somewhere is read up to there.
    """
    yield from _array(whole_text(path, faults), path, key, faults)


def _array(text: str | None, path: Path, key: str | None, faults: Faults) -> Iterator[Located]:
    if text is None:
        return
    walk = _Walk(text)
    try:
        others = set() if key is None else walk.enter(key)
        yield from walk.entries()
        walk.leave(None if key is None else {*others, key})
    except (ValueError, RecursionError, IndexError) as error:
        faults.add(path, walk.line(), _complaint(error))


def whole_text(path: Path, faults: Faults) -> str | None:
    """A file's text, without a byte order mark; None, with a fault, when it is no UTF-8.

    Raises:
        InputError: SS-1201, SS-1205.
    """
    with _opened(path) as file:
        return _text(file, path, faults)


def _text(file: BufferedReader, path: Path, faults: Faults) -> str | None:
    data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InputError("SS-1205", f"{path} is over {MAX_FILE_BYTES} bytes", hint="Use JSON lines, read one by one.")
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        faults.add(path, data.count(b"\n", 0, error.start) + 1, "is not UTF-8")
        return None


def table_rows(path: Path, faults: Faults) -> Iterator[Located]:
    """The rows of a CSV file with a header, as objects from column to text; an empty cell is left out."""
    text = whole_text(path, faults)
    if text is None:
        return
    # Lines end where CSV's do, not at every mark that Unicode calls a line's end. How long a text may be says its format.
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    bound = csv.field_size_limit(MAX_FILE_BYTES)
    try:
        yield from _rows(rows, path, faults)
    finally:
        csv.field_size_limit(bound)


def _rows(rows: Iterator[list[str]], path: Path, faults: Faults) -> Iterator[Located]:
    header: list[str] | None = None
    line = 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error:  # The next row begins with the next line.
            faults.add(path, line, "is not CSV: a quote is not closed, or something stands behind one")
            row = []
        if row is None:
            return
        if header is None:
            header = [name.strip() for name in row]
            if not header or len(set(header)) < len(header) or not all(header):
                faults.add(path, line, "is no header: columns need names, each its own")
                return
        elif len(row) not in {0, len(header)}:
            faults.add(path, line, f"has {len(row)} columns, the header has {len(header)}")
        elif row:
            yield Located(line, {name: cell for name, cell in zip(header, row, strict=True) if cell.strip()})
        line = rows.line_num + 1  # type: ignore[attr-defined]


def paragraphs(path: Path, faults: Faults) -> Iterator[Located]:
    """Plain text, cut at blank lines."""
    lines: list[str] = []
    start = 1
    for number, text in _lines(path, faults):
        if text.strip():
            start = start if lines else number
            lines.append(text.strip())
        elif lines:
            yield Located(start, "\n".join(lines))
            lines = []
    if lines:
        yield Located(start, "\n".join(lines))


class _Walk:
    """A cursor in JSON text that knows its line."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._counted = (0, 1)
        self._decode = _decoder().raw_decode

    def line(self) -> int:
        """Where the cursor stands, from 1."""
        at, line = self._counted
        self._counted = (self._at, line + self._text.count("\n", at, self._at))
        return self._counted[1]

    def enter(self, key: str) -> set[str]:
        """Into the object, up to the value of this key; the keys before it."""
        self._take("{")
        before: set[str] = set()
        while True:
            name = self._name(before)
            if name == key:
                return before
            before.add(name)
            self._value()
            self._take(",")

    def leave(self, keys: set[str] | None) -> None:
        """To the end of the text; where the array was a key's value, over the keys that are left of its object."""
        if keys is not None:
            while self._next() != "}":
                self._take(",")
                keys.add(self._name(keys))
                self._value()
            self._at += 1
        self._skip()
        if self._at < len(self._text):
            raise _More

    def entries(self) -> Iterator[Located]:
        """Each entry of the array at the cursor, which stands behind the array then."""
        self._take("[")
        if self._next() != "]":
            while True:
                self._skip()
                line = self.line()
                yield Located(line, self._value())
                if self._next() == "]":
                    break
                self._take(",")
        self._at += 1

    def _name(self, before: set[str]) -> str:
        """The next key of an object; the cursor stands behind its colon then."""
        name = self._value()
        if not isinstance(name, str):
            raise ValueError  # noqa: TRY004 - the fault is of the file, not of a caller
        if name in before:
            raise _Twice
        self._take(":")
        return name

    def _value(self) -> object:
        self._skip()
        value, self._at = self._decode(self._text, self._at)
        return value

    def _next(self) -> str:
        self._skip()
        return self._text[self._at]

    def _skip(self) -> None:
        while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
            self._at += 1

    def _take(self, mark: str) -> None:
        self._skip()
        if self._text[self._at] != mark:
            raise ValueError
        self._at += 1


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice
    return found


def _no_number(name: str) -> object:
    raise ValueError(name)


def _complaint(error: Exception) -> str:
    match error:
        case _Twice():
            return "holds a key twice in one object"
        case _More():
            return "stands behind the end of the JSON value that the file is"
        case RecursionError():
            return "is nested too deeply"
        case json.JSONDecodeError(colno=column, lineno=1):
            return f"is not JSON at column {column}"
        case _:
            return "is not JSON, or not of the shape that the format has here"


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError("SS-1201", f"cannot read {path}: {type(error).__name__}", hint="Name a readable file.") from None  # fmt: skip


def _lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    with _opened(path) as file:
        yield from _lines_of(file, path, faults)


def _lines_of(file: BufferedReader, path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    number = total = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number, total, rest = number + 1, total + len(line), line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n") and total <= MAX_LINES_BYTES:
            rest = file.readline(MAX_LINE_BYTES + 1)
            total += len(rest)
        if total > MAX_LINES_BYTES:
            raise InputError("SS-1205", f"{path} is over {MAX_LINES_BYTES} bytes", hint="Cut it into several files.")
        try:
            if len(line) <= MAX_LINE_BYTES:
                yield number, (line.removeprefix(_BOM) if number == 1 else line).decode("utf-8")
                continue
            faults.add(path, number, f"is over {MAX_LINE_BYTES} bytes")
        except UnicodeDecodeError as error:
            faults.add(path, number, f"is not UTF-8 at byte {error.start + 1}")
