"""What a task's file holds, in numbers: examples, groups, classes, and how long they are. No text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from securesplit.data.tasks.fit import examples_of
from securesplit.data.tasks.item import Item
from securesplit.data.tasks.registry import Task
from securesplit.data.tasks.templates import Template

__all__ = ["Bin", "Survey", "survey"]


@dataclass(frozen=True, slots=True)
class Bin:
    """How many examples are longer than the bin before and at most so long."""

    most: int
    count: int


@dataclass(frozen=True, slots=True)
class Survey:
    """A file in numbers.

    Attributes:
        examples, groups: how many.
        labelled: examples with a gold answer.
        classes: of the task's own classes, how many examples each has, in the task's order.
        lengths: of prompt and answer together, by example; in the unit that was measured in.
        histogram: of ``lengths``, bins that double; empty bins at both ends are left out.
    """

    examples: int
    groups: int
    labelled: int
    classes: tuple[int, ...]
    lengths: tuple[int, ...]
    histogram: tuple[Bin, ...]


def survey(task: Task, template: Template, items: Sequence[Item], length: Callable[[str, str], int]) -> Survey:
    """Count.

    Args:
        task, template, items: what.
        length: of a prompt and an answer together, in characters or tokens.
    """
    lengths = tuple(length(e.prompt, e.answer or "") for e in examples_of(task, template, items))
    held = Counter(item.answers[0] for item in items if item.answers)
    return Survey(
        examples=len(items),
        groups=len({item.group for item in items}),
        labelled=sum(bool(item.answers) for item in items),
        classes=tuple(held[label.name] for label in task.labels),
        lengths=lengths,
        histogram=_histogram(lengths),
    )


def _histogram(lengths: Sequence[int]) -> tuple[Bin, ...]:
    """Bins up to 16, 32, 64 and so on."""
    steps = Counter(max(4, (n - 1).bit_length()) for n in lengths)
    return tuple(Bin(1 << step, steps[step]) for step in range(min(steps, default=4), max(steps, default=3) + 1))
