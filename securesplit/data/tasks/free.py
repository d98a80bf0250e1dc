"""A site's own data: prompts with answers, texts with a label, or texts alone.

Formats, by the name of what is given: ``.json`` and ``.jsonl`` (objects, an array or one a line), ``.csv`` (a header, then
the same fields), a folder that the ``datasets`` package saved (``save_to_disk``), and for texts alone anything else as
plain text, cut at blank lines. Columns are ``prompt`` and ``answer`` (or ``answers``), or ``input`` and ``target``;
``text`` and ``label``; ``text``. All may have ``id``, ``group`` and ``user``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Self, TypeVar

from pydantic import Field, model_validator

from securesplit.data.tasks.faults import Faults
from securesplit.data.tasks.item import Item, Parts
from securesplit.data.tasks.located import Located, json_entries, paragraphs, table_rows
from securesplit.data.tasks.saved import saved_rows
from securesplit.data.tasks.source import Line, Many, Source, Text

__all__ = ["read_labelled", "read_pairs", "read_text"]

_Name = Annotated[str, Field(min_length=1, max_length=256)] | Annotated[int, Field(ge=0, le=1 << 53)]
_JSON = frozenset({".json", ".jsonl", ".ndjson"})


class Owned(Line):
    """What any entry may say of itself."""

    id: _Name | None = None
    group: _Name | None = None
    user: Text | None = None


class Pair(Owned):
    """A prompt and what is to follow it."""

    prompt: Text | None = None
    input: Text | None = None
    answer: Text | None = None
    answers: Many[Text] | None = None
    target: Text | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.prompt is None) == (self.input is None):
            raise ValueError("needs exactly one of 'prompt' and 'input'")
        if sum(given is not None for given in (self.answer, self.answers, self.target)) > 1:
            raise ValueError("has more than one of 'answer', 'answers' and 'target'")
        return self


class Labelled(Owned):
    """A text and the name of its class."""

    text: Text
    label: Annotated[Text, Field(max_length=256)] | None = None
    pii: Many[Text] | None = None


class Plain(Owned):
    """A text to learn."""

    text: Text
    pii: Many[Text] | None = None


_Row = TypeVar("_Row", Pair, Labelled, Plain)


def read_pairs(source: Source, faults: Faults) -> Iterator[Item]:
    """Prompts with their answers."""
    for name, line, row in _rows(Pair, source, faults):
        one = row.answer or row.target
        answers = row.answers or (() if one is None else (one,))
        yield _item(name, line, row, Parts(text=row.prompt or row.input or ""), answers)


def read_labelled(source: Source, faults: Faults) -> Iterator[Item]:
    """Texts with a class."""
    for name, line, row in _rows(Labelled, source, faults):
        yield _item(name, line, row, Parts(text=row.text), () if row.label is None else (row.label,))


def read_text(source: Source, faults: Faults) -> Iterator[Item]:
    """Texts; every token of them is learnt, so each is the answer to an empty prompt."""
    for name, line, row in _rows(Plain, source, faults):
        yield _item(name, line, row, Parts(), (row.text,))


def _rows(model: type[_Row], source: Source, faults: Faults) -> Iterator[tuple[str, int, _Row]]:
    for number, entry in enumerate(_entries(model, source, faults)):
        row = faults.checked(model, entry.value, source.path, entry.line)
        if row is not None:
            yield str(number if row.id is None else row.id), entry.line, row


def _entries(model: type[Line], source: Source, faults: Faults) -> Iterator[Located]:
    suffix = source.path.suffix.lower()
    if source.path.is_dir():
        yield from saved_rows(source.path, faults)
    elif suffix == ".csv":
        yield from table_rows(source.path, faults)
    elif suffix in _JSON:
        yield from json_entries(source.path, faults)
    elif model is Plain:
        for entry in paragraphs(source.path, faults):
            yield Located(entry.line, {"text": entry.value})
    else:
        faults.add(source.path, None, "must be .jsonl, .json, .csv or a saved data set: plain text has no fields")


def _item(name: str, line: int, row: Owned, parts: Parts, answers: tuple[str, ...]) -> Item:
    return Item(name, name if row.group is None else f"group:{row.group}", parts, answers, user=row.user, line=line)
