"""XSum (Narayan et al. 2018): BBC articles with their first sentence as the summary.

The data set is published as a file of ids, ``{"train": [...], "validation": [...], "test": [...]}``, and one text file
for each id, ``ID.summary`` or ``ID.data``, whose sections stand between marks::

    [SN]URL[SN]  ...  [SN]TITLE[SN]  ...  [SN]FIRST-SENTENCE[SN]  ...  [SN]RESTBODY[SN]  ...

Extracts made from web archives have ``XSUM`` for ``SN`` and ``INTRODUCTION`` for ``FIRST-SENTENCE``. JSON lines with
``id``, ``document`` and ``summary`` are read, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from securesplit.data.tasks.faults import Faults
from securesplit.data.tasks.item import Item, Parts
from securesplit.data.tasks.located import json_entries, keyed_entries, whole_text
from securesplit.data.tasks.source import MAX_CHARACTERS, Line, Source, Text
from securesplit.errors import InputError

__all__ = ["read_xsum"]

_Id = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,16}$")]
_MARK = re.compile(r"\[(SN|XSUM)\]([A-Z-]+)\[\1\]")
_SUMMARY = ("FIRST-SENTENCE", "INTRODUCTION")
_BODY = "RESTBODY"
# What the pages' buttons left in the texts.
_BUTTONS = frozenset(
    {
        "Share this with", "Email", "Facebook", "Messenger", "Twitter", "Pinterest", "WhatsApp", "Linkedin", "LinkedIn", "Copy this link",
        "These are external links and will open in a new window",
    }
)  # fmt: skip


class Article(Line):
    """One JSON line."""

    id: _Id
    document: Text
    summary: Text | None = None


class Listed(Line):
    """One id of a split."""

    id: Annotated[_Id, Field()]


def read_xsum(source: Source, faults: Faults) -> Iterator[Item]:
    """One example for each article."""
    if not source.path.is_dir():
        for entry in json_entries(source.path, faults):
            row = faults.checked(Article, entry.value, source.path, entry.line)
            if row is not None:
                yield Item(
                    row.id,
                    row.id,
                    Parts(text=row.document),
                    () if row.summary is None else (row.summary,),
                    line=entry.line,
                )
        return
    if source.ids is None or source.split is None:
        faults.add(source.path, None, "is a folder of documents: name the file of ids and the split as well")
        return
    for entry in keyed_entries(source.ids, source.split, faults):
        listed = faults.checked(Listed, {"id": entry.value}, source.ids, entry.line)
        if listed is not None and (item := _document(source.path, listed.id, entry.line, faults)) is not None:
            yield item


def _document(folder: Path, name: str, line: int, faults: Faults) -> Item | None:
    path = next((p for p in (folder / f"{name}.summary", folder / f"{name}.data") if p.is_file()), None)
    if path is None:
        faults.add(folder / f"{name}.summary", None, "is missing, and so is the same name with .data")
        return None
    try:
        text = whole_text(path, faults)
    except InputError as error:
        faults.add(path, None, error.what.removeprefix(f"{path} "))
        return None
    if text is None:
        return None
    summary, body = _sections(text, path, faults)
    if summary is None or body is None:
        return None
    return Item(name, name, Parts(text=body), (summary,), line=line)


def _sections(text: str, path: Path, faults: Faults) -> tuple[str | None, str | None]:
    """Summary and body; None, with a fault, for what is not there."""
    marks = list(_MARK.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    found: dict[str, str] = {}
    for mark, end in zip(marks, ends, strict=True):
        name, line = mark.group(2), text.count("\n", 0, mark.start()) + 1
        if name in found:
            faults.add(path, line, "begins a section that was there before")
        found[name] = _clean(text[mark.end() : end])
    summary = next((found[name] for name in _SUMMARY if name in found), None)
    body = found.get(_BODY)
    for what, value in (("the first sentence", summary), ("the rest of the text", body)):
        if not value:
            faults.add(path, None if value is None else 1, f"has no section with {what}")
        elif len(value) > MAX_CHARACTERS:
            faults.add(path, None, f"{what} is over {MAX_CHARACTERS} characters")
    return summary or None, body or None


def _clean(section: str) -> str:
    lines = (line.strip() for line in section.splitlines())
    return "\n".join(line for line in lines if line and line not in _BUTTONS)
