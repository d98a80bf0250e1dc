"""A task and a template, chosen by name, and the file that they are for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from securesplit.data.corpus import Record
from securesplit.data.tasks.fit import examples_of
from securesplit.data.tasks.item import Item
from securesplit.data.tasks.registry import Task, read_task, task_named
from securesplit.data.tasks.source import Source
from securesplit.data.tasks.templates import Template, template_named

__all__ = ["Chosen", "Tasked", "read_tasked"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a user chooses by name.

    Attributes:
        task, template: names.
        ids, split: for formats that keep texts and splits apart.
        kept: folder for tokenised data, or None.
    """

    task: str
    template: str = "plain"
    ids: Path | None = None
    split: str | None = None
    kept: Path | None = None


@dataclass(frozen=True, slots=True)
class Tasked:
    """A task's file, read.

    Attributes:
        task, template: what was chosen.
        items: in the file's order.
        kept: folder for tokenised data, or None.
    """

    task: Task
    template: Template
    items: tuple[Item, ...]
    kept: Path | None

    @property
    def records(self) -> tuple[Record, ...]:
        """Prompt and answer of each example as one text, uncut; for what is noted on this site."""
        examples = examples_of(self.task, self.template, self.items)
        return tuple(
            Record(e.prompt + (e.answer or ""), user=e.user, label=i.label)
            for i, e in zip(self.items, examples, strict=True)
        )


def read_tasked(chosen: Chosen, path: Path, limit: int | None) -> Tasked:
    """Read a task's file.

    Raises:
        InputError: SS-1241, SS-1242 for names; SS-1201, SS-1205, SS-1207, SS-1240, SS-1243 as
            :func:`securesplit.data.tasks.registry.read_task`.
    """
    task = task_named(chosen.task)
    template = template_named(chosen.template, task)
    return Tasked(task, template, read_task(task, Source(path, chosen.ids, chosen.split), limit), chosen.kept)
