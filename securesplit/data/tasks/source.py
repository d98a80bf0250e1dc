"""Where a task's examples lie, the strict shape of their fields, and what a reader is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from securesplit.data.tasks.faults import Faults
from securesplit.data.tasks.item import Item

__all__ = ["Index", "Line", "Many", "Reader", "Source", "Text", "Words"]

MAX_CHARACTERS = 1 << 20
MAX_ENTRIES = 1 << 16

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Source:
    """Local files.

    Attributes:
        path: a file, or a folder where the format is one.
        ids: for formats that keep texts and splits apart, the file of splits.
        split: which split of ``ids``.
    """

    path: Path
    ids: Path | None = None
    split: str | None = None


Reader = Callable[[Source, Faults], Iterator[Item]]
"""Yields the good entries, notes the faults of the others, raises only for files that cannot be read at all."""


class Line(BaseModel):
    """One entry of a file: known keys, exact types, nothing converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("holds no text")
    return text


Words = Annotated[str, StringConstraints(max_length=MAX_CHARACTERS)]
"""A text that may be empty."""
Text = Annotated[Words, AfterValidator(_not_blank)]
"""A text that may not."""
Index = Annotated[int, Field(ge=0, le=1 << 53)]
Many = Annotated[tuple[_T, ...], Field(strict=False, max_length=MAX_ENTRIES)]
"""A JSON array."""
