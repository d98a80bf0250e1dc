"""One line of a log: an event with its number, its time, and the hash that ties it to everything before.

    {"at":"2026-11-22T10:17:58.123456Z","code":"SS-3205",...,"hash":"...","index":7,"kind":"refused",...}

A line is the one canonical spelling of its content: JSON with sorted keys, no blanks, ASCII, ended by a newline. The hash of
row n is SHA-256 over ``securesplit.journal.v1 row``, a zero byte, the hash of row n-1 and the line without its hash; row 0
follows a hash of the log's random name, so that no row of one log fits into another.

A hash needs no key. By itself it finds accidents and clumsy editors; who recomputes all hashes is found by the signed heads
(seal.py) unless that one can sign as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError

from securesplit.journal.events import Event, read_event

__all__ = ["MAX_LINE", "Row", "RowError", "encode_row", "genesis", "instant", "nanoseconds", "parse_row"]

MAX_LINE = 1 << 17
"""Bytes of the longest line; the two rows with certificates are far below it."""

_DOMAIN = b"securesplit.journal.v1 row\0"
_INSTANT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class RowError(ValueError):
    """A line is not a row; the text says why in words of ours."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row that was read.

    Attributes:
        index: from 0, through all files of a log.
        at: nanoseconds since 1970, whole microseconds.
        event: what happened.
        hash: of this row, 32 bytes.
    """

    index: int
    at: int
    event: Event
    hash: bytes


def genesis(log: bytes) -> bytes:
    """What row 0 follows. ``log`` is the log's name, 16 bytes."""
    return hashlib.sha256(b"securesplit.journal.v1 log\0" + log).digest()


def instant(at: int) -> str:
    """Nanoseconds since 1970 as UTC, to the microsecond."""
    moment = _EPOCH + timedelta(microseconds=at // 1000)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond:06d}Z"


def nanoseconds(text: str) -> int:
    """The inverse of :func:`instant`.

    Raises:
        RowError: for any other spelling.
    """
    if not _INSTANT.fullmatch(text):
        raise RowError("its time is malformed")
    try:
        moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    except ValueError:
        raise RowError("its time is malformed") from None
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


def encode_row(previous: bytes, index: int, at: int, event: Event) -> tuple[bytes, bytes]:
    """A line and its hash.

    Args:
        previous: hash of the row before, or :func:`genesis`; 32 bytes.
        index: of this row.
        at: nanoseconds since 1970.
        event: what happened.

    Returns:
        The line with its newline, and its hash (32 bytes).
    """
    fields = event.model_dump()
    fields["index"] = index
    fields["at"] = instant(at)
    digest = hashlib.sha256(_DOMAIN + previous + _canonical(fields)).digest()
    fields["hash"] = digest.hex()
    return _canonical(fields) + b"\n", digest


def parse_row(line: bytes, *, previous: bytes | None, index: int) -> Row:
    """Read a line and check that it is the row that follows.

    Args:
        line: with its newline.
        previous: hash of the row before; None for a row 0, whose own event names its log.
        index: the number that it must have.

    Raises:
        RowError: when it is not canonical, not a row, or not the one that follows. Nothing else escapes.
    """
    fields = _fields(line)
    stated, number, moment = fields.pop("hash", None), fields.pop("index", None), fields.pop("at", None)
    if not isinstance(stated, str) or type(number) is not int or not isinstance(moment, str):
        raise RowError("it is not a row")
    at = nanoseconds(moment)
    try:
        event = read_event(fields)
    except ValidationError:
        raise RowError("its event breaks the schema") from None
    if number != index:
        raise RowError(f"it says that it is row {number}")
    if previous is None:
        log = getattr(event, "log", None)
        if index != 0 or not isinstance(log, str):
            raise RowError("the log does not start at its beginning")
        previous = genesis(bytes.fromhex(log))
    again, digest = encode_row(previous, index, at, event)
    if digest.hex() != stated:
        raise RowError("its hash does not follow from the row before")
    if again != line:
        raise RowError("it is not spelt as a row is")
    return Row(index, at, event, digest)


def _fields(line: bytes) -> dict[str, object]:
    if len(line) > MAX_LINE or not line.endswith(b"\n"):
        raise RowError("it is no whole line")
    try:
        value = json.loads(line.decode("ascii"))
    except (ValueError, RecursionError):
        raise RowError("it is not JSON") from None
    if not isinstance(value, dict):
        raise RowError("it is not a row")
    return value


def _canonical(fields: dict[str, object]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")
