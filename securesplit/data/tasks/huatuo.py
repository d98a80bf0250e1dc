"""Huatuo: Chinese medical questions with answers, as the seeds' files have them: ``[{"question": ..., "answer": ...}]``.

One JSON array, or JSON lines. An id is the entry's number, from 0.
"""

from __future__ import annotations

from collections.abc import Iterator

from securesplit.data.tasks.faults import Faults
from securesplit.data.tasks.item import Item, Parts
from securesplit.data.tasks.located import json_entries
from securesplit.data.tasks.source import Line, Source, Text

__all__ = ["read_huatuo"]


class Consultation(Line):
    """One entry."""

    question: Text
    answer: Text | None = None


def read_huatuo(source: Source, faults: Faults) -> Iterator[Item]:
    """One example for each question."""
    for number, entry in enumerate(json_entries(source.path, faults)):
        row = faults.checked(Consultation, entry.value, source.path, entry.line)
        if row is not None:
            answers = () if row.answer is None else (row.answer,)
            yield Item(str(number), str(number), Parts(question=row.question), answers, line=entry.line)
