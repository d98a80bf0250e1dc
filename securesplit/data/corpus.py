"""Read private text from local files: JSON lines, one JSON array, or plain text.

What a JSON object may look like, tried in this order:

* ``{"text": ...}``, with an optional list ``"pii"`` of the pieces of the text that identify somebody;
* ``{"passage": {"text": ...}}``, as MultiRC has it; mark-up tags inside the passage are removed;
* ``{"question": ..., "answer": ...}``, as Huatuo has it; joined by a line break;
* anything else: every text value at its top level, joined by line breaks.

An object may name whose text it is, ``{"user": "..."}``; policies with unit ``user`` need that of every record. The name
never leaves the site: the ledger keeps a keyed hash of it. It may name its class, ``{"label": "..."}``, which is no part of
the text; jobs with a ``[task]`` need that of every record. A label that is not a text counts as none.

A plain text file is cut at blank lines. Equal texts are all kept: leaving one out would tell by
the number of messages that it equals another. Messages name a file and a line or item, never what stands there.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from securesplit.errors import InputError

__all__ = ["Record", "plain_passage", "read_corpus"]

_MAX_LINE_BYTES = 1 << 22
_MAX_ARRAY_BYTES = 1 << 28
_MAX_TEXT_CHARACTERS = 1 << 20
_JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})

# Only names of real mark-up, so that "BP < 90 and P > 120" survives.
_TAG = re.compile(
    r"</?(?:b|i|u|p|br|em|strong|span|div|sup|sub|li|ul|ol|a|font|h[1-6])(?:\s[^<>]{0,200})?/?>", re.IGNORECASE
)
_SENTENCE_MARK = re.compile(r"<b>\s*Sent(?:ence)?\s+\d+:\s*</b>", re.IGNORECASE)
_SPACES = re.compile(r"[ \t\u00a0]+")


@dataclass(frozen=True, slots=True)
class Record:
    """One unit of privacy: a text, and the pieces of it that identify somebody.

    Attributes:
        text: not empty, without surrounding blanks.
        pii: labelled pieces, each a part of ``text``; empty when the source carries no labels.
        user: whose text it is, as the source says; None when it does not say.
        label: the name of its class, as the source says; None when it does not say.
    """

    text: str
    pii: tuple[str, ...] = ()
    user: str | None = None
    label: str | None = None


def read_corpus(path: Path, limit: int | None = None) -> tuple[Record, ...]:
    """Read the records of one file, in its order.

    Args:
        path: a file; ``.json``, ``.jsonl`` and ``.ndjson`` are JSON (an array or one object a line), others plain text.
        limit: stop after this many records; None reads all.

    Raises:
        InputError: SS-1201 cannot be read, SS-1202 not UTF-8, SS-1203 not JSON, SS-1204 a record without usable text,
            SS-1205 a line, text or array over its cap, SS-1206 no record at all, SS-1207 a limit below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(
            "SS-1207", f"a limit of {limit} records leaves nothing to read", hint="Use a limit of at least 1."
        )
    found: list[Record] = []
    try:
        with path.open("rb") as file:
            for record in _records(file, path):
                found.append(record)
                if len(found) == limit:
                    break
    except OSError as error:
        raise InputError(
            "SS-1201", f"cannot read {path}: {type(error).__name__}", hint="Name a readable file."
        ) from None
    if not found:
        raise InputError("SS-1206", f"{path} holds no text", hint="Give JSON lines with a 'text' field, or plain text.")
    return tuple(found)


def _records(file: IO[bytes], path: Path) -> Iterator[Record]:
    if path.suffix.lower() not in _JSON_SUFFIXES:
        yield from _paragraphs(file, path)
    elif _starts_array(file):
        yield from _array(file, path)
    else:
        for number, line in _lines(file, path):
            if line.strip():
                where = f"line {number} of {path}"
                yield _record(_parse(line.strip(), where), where)


def _starts_array(file: IO[bytes]) -> bool:
    head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    return head.startswith(b"[")


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1; the longest acceptable line bounds the memory."""
    number = 0
    while line := file.readline(_MAX_LINE_BYTES + 1):
        number += 1
        where = f"line {number} of {path}"
        if len(line) > _MAX_LINE_BYTES:
            raise InputError("SS-1205", f"{where} is over {_MAX_LINE_BYTES} bytes", hint="Give one record a line.")
        yield number, _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, where)


def _paragraphs(file: IO[bytes], path: Path) -> Iterator[Record]:
    lines: list[str] = []
    characters = start = 0
    for number, line in _lines(file, path):
        if line.strip():
            start = start if lines else number
            characters += len(line)
            lines.append(line.strip())
            if characters > _MAX_TEXT_CHARACTERS:
                raise _too_long(f"the paragraph at line {start} of {path}")
        elif lines:
            yield Record(" ".join(lines))
            lines, characters = [], 0
    if lines:
        yield Record(" ".join(lines))


def _array(file: IO[bytes], path: Path) -> Iterator[Record]:
    data = file.read(_MAX_ARRAY_BYTES + 1)
    if len(data) > _MAX_ARRAY_BYTES:
        raise InputError(
            "SS-1205",
            f"the array in {path} is over {_MAX_ARRAY_BYTES} bytes",
            hint="Use JSON lines, which are read one by one.",
        )
    items = _parse(_decode(data.removeprefix(b"\xef\xbb\xbf"), str(path)), str(path))
    assert isinstance(items, list)  # It starts with a bracket.
    for number, item in enumerate(items, 1):
        where = f"item {number} of {path}"
        yield _record(item, where)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "SS-1202", f"{where} is not UTF-8 at byte {error.start}", hint="Convert the file to UTF-8."
        ) from None


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"its line {error.lineno}, column {error.colno}"
        raise InputError(
            "SS-1203", f"{where} is not JSON at {place}", hint="Give one JSON object a line, or one array."
        ) from None
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or thousands of nested brackets.
        raise InputError(
            "SS-1203", f"{where} is not usable JSON: {type(error).__name__}", hint="Give one flat JSON object a line."
        ) from None


def _record(item: object, where: str) -> Record:
    fields = {key: value for key, value in item.items() if isinstance(key, str)} if isinstance(item, dict) else {}
    text = (item if isinstance(item, str) else _text(fields)).strip()
    if not text:
        raise InputError(
            "SS-1204", f"{where} holds no text", hint="Give it a 'text' field, or 'question' and 'answer'."
        )
    if len(text) > _MAX_TEXT_CHARACTERS:
        raise _too_long(where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            "SS-1204",
            f"{where} holds half of a surrogate pair, which is no text",
            hint="Repair the file's \\u escapes.",
        ) from None
    user = fields.get("user")
    if user is not None and not (isinstance(user, str) and user.strip()):
        raise InputError("SS-1204", f"the 'user' of {where} is not a name", hint="Give a text, or leave 'user' out.")
    label = fields.get("label")
    return Record(text, _pii(fields, text, where), user, label if isinstance(label, str) else None)


def _text(fields: dict[str, object]) -> str:
    passage = fields.get("passage")
    if isinstance(direct := fields.get("text"), str):
        return direct
    if isinstance(passage, dict) and isinstance(inner := passage.get("text"), str):
        return plain_passage(inner)
    if isinstance(question := fields.get("question"), str) and isinstance(answer := fields.get("answer"), str):
        return f"{question.strip()}\n{answer.strip()}"
    # A label among the words would be sent with them, past all that is paid for it.
    texts = (value for key, value in fields.items() if key not in {"user", "label"})
    return "\n".join(value.strip() for value in texts if isinstance(value, str) and value.strip())


def plain_passage(markup: str) -> str:
    """A MultiRC passage without its tags, sentence marks and character references."""
    text = html.unescape(_TAG.sub(" ", _SENTENCE_MARK.sub(" ", markup)))
    return _SPACES.sub(" ", text)


def _pii(fields: dict[str, object], text: str, where: str) -> tuple[str, ...]:
    labels = fields.get("pii", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) and label and label in text for label in labels):
        raise InputError(
            "SS-1204",
            f"the 'pii' of {where} is not a list of pieces of its text",
            hint="Copy each piece exactly, or leave 'pii' out.",
        )
    return tuple(dict.fromkeys(labels))


def _too_long(where: str) -> InputError:
    return InputError(
        "SS-1205",
        f"{where} is over {_MAX_TEXT_CHARACTERS} characters",
        hint="Cut it into records; one record is one unit of privacy.",
    )
