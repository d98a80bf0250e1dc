"""Prompts that fit: where one is too long its passage is shortened from the end; the question and the answer stay whole.

The cut is made in the text, so that training and generation see the same prompt. What cannot be helped by a shorter
passage, as in a long conversation, loses its beginning instead. An answer is never cut: one that does not fit is refused.
Texts alone, which have no prompt, are cut at their end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from securesplit.data.tasks.item import Item, Parts
from securesplit.data.tasks.registry import Task
from securesplit.data.tasks.templates import Template, answer_of, prompt_of
from securesplit.errors import InputError

__all__ = ["Example", "examples_of", "fitted"]


@dataclass(frozen=True, slots=True)
class Example:
    """An example as text.

    Attributes:
        id, group, user: as the item's.
        prompt: what the model is given.
        answer: what it is to learn, with what leads to it; None where the file has none.
    """

    id: str
    group: str
    prompt: str
    answer: str | None
    user: str | None


def examples_of(task: Task, template: Template, items: Sequence[Item]) -> tuple[Example, ...]:
    """Every item as text, uncut."""
    return tuple(
        Example(item.id, item.group, prompt_of(template, item.parts), answer_of(template, task, item), item.user)
        for item in items
    )


def fitted(
    task: Task,
    template: Template,
    items: Sequence[Item],
    *,
    prompt_length: Callable[[str], int],
    most: int,
    answer_length: Callable[[str], int] | None = None,
) -> tuple[Example, ...]:
    """Every item as text that fits.

    Args:
        task, template, items: what and how.
        prompt_length: tokens of a prompt, special tokens of the model's own included.
        most: the longest sequence, in tokens.
        answer_length: tokens of an answer, with what ends it; None keeps no room for answers.

    Raises:
        InputError: SS-1244 when answers leave no room for one token of a prompt; the message counts them.
    """
    made: list[Example] = []
    refused = 0
    for item, example in zip(items, examples_of(task, template, items), strict=True):
        left = most - (0 if answer_length is None or example.answer is None else answer_length(example.answer))
        if not example.prompt:
            made.append(replace(example, answer=_start(example.answer or "", prompt_length, most)))
        elif left < 1:
            refused += 1
        elif prompt_length(example.prompt) <= left:
            made.append(example)
        else:
            made.append(replace(example, prompt=_shortened(template, item.parts, prompt_length, left)))
    if refused:
        raise InputError(
            "SS-1244", f"{refused} answer(s) leave no room for their prompt in {most} tokens",
            hint="Raise --max-tokens or the policy's largest bucket, or leave these examples out.",
        )  # fmt: skip
    return tuple(made)


def _start(text: str, length: Callable[[str], int], most: int) -> str:
    """The longest start of a text alone that fits with the token that ends it."""
    return text[: _largest(len(text), lambda count: length(text[:count]) + 1 <= most)]


def _shortened(template: Template, parts: Parts, length: Callable[[str], int], most: int) -> str:
    """The longest start of the long part with which the prompt fits, found by halving; without it, the prompt's end."""
    whole = str(getattr(parts, template.long))

    def with_long(count: int) -> str:
        return prompt_of(template, replace(parts, **{template.long: whole[:count].rstrip()}))  # type: ignore[arg-type]

    if length(with_long(0)) <= most:
        return with_long(_largest(len(whole), lambda count: length(with_long(count)) <= most))
    bare = with_long(0)
    return bare[len(bare) - _largest(len(bare), lambda count: length(bare[len(bare) - count :]) <= most) :]


def _largest(top: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``top`` that fits, if 0 does and fitting falls; else some number that fits, or 0."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
