"""CoQA (Reddy et al. 2019): conversations about a story, as one JSON object with the stories under ``data``.

An example is one turn with all turns before it, answered as in the file. Ids: ``story/turn``. Stories are the groups, and
stand for users under that unit. The answers that other people gave, under ``additional_answers``, are gold answers as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import Field, model_validator

from securesplit.data.tasks.faults import Faults
from securesplit.data.tasks.item import Item, Parts, Turn
from securesplit.data.tasks.located import keyed_entries
from securesplit.data.tasks.source import Line, Many, Source, Text, Words

__all__ = ["read_coqa"]

_Number = Annotated[int, Field(ge=1, le=1 << 20)]
_Place = Annotated[int, Field(ge=-1, le=1 << 30)]
"""A position in the story; -1 where an answer has none there."""


class Asked(Line):
    """A question."""

    input_text: Text
    turn_id: _Number
    bad_turn: bool | Words | None = None


class Reply(Line):
    """An answer, and the piece of the story that it rests on."""

    input_text: Text
    turn_id: _Number
    span_start: _Place
    span_end: _Place
    span_text: Words
    bad_turn: bool | Words | None = None


class Story(Line):
    """One conversation."""

    id: Text
    source: Words
    story: Text
    questions: Many[Asked]
    answers: Many[Reply]
    filename: Words | None = None
    name: Words | None = None
    additional_answers: Annotated[dict[str, Many[Reply]], Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _turns(self) -> Self:
        if not self.questions:
            raise ValueError("has no questions")
        wanted = list(range(1, len(self.questions) + 1))
        if [q.turn_id for q in self.questions] != wanted:
            raise ValueError("questions: turn_id must run from 1 without a gap")
        if [a.turn_id for a in self.answers] != wanted:
            raise ValueError("answers: each question needs its answer, in order")
        if any([a.turn_id for a in more] != wanted for more in (self.additional_answers or {}).values()):
            raise ValueError("additional_answers: each list needs an answer to each question, in order")
        return self


def read_coqa(source: Source, faults: Faults) -> Iterator[Item]:
    """One example for each turn."""
    for entry in keyed_entries(source.path, "data", faults):
        story = faults.checked(Story, entry.value, source.path, entry.line)
        if story is None:
            continue
        others = tuple((story.additional_answers or {}).values())
        turns: tuple[Turn, ...] = ()
        for asked, reply in zip(story.questions, story.answers, strict=True):
            golds = (reply.input_text, *(more[asked.turn_id - 1].input_text for more in others))
            parts = Parts(text=story.story, question=asked.input_text, turns=turns)
            yield Item(f"{story.id}/{asked.turn_id}", story.id, parts, golds, user=f"story:{story.id}", line=entry.line)
            turns = (*turns, Turn(asked.input_text, reply.input_text))
