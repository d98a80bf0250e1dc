"""The six tasks of SuperGLUE whose example is one line: BoolQ, CB, COPA, RTE, WiC and WSC (Wang et al. 2019).

JSON lines as the benchmark's archive has them; ``label`` is missing in its test files. An id is the line's ``idx``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self, TypeVar

from pydantic import model_validator

from securesplit.data.tasks.faults import Faults
from securesplit.data.tasks.item import Item, Parts
from securesplit.data.tasks.located import json_lines
from securesplit.data.tasks.source import Index, Line, Source, Text

__all__ = ["read_boolq", "read_cb", "read_copa", "read_rte", "read_wic", "read_wsc"]


class BoolQ(Line):
    """A passage and a question that is answered by yes or no."""

    question: Text
    passage: Text
    idx: Index
    label: bool | None = None


class CB(Line):
    """CommitmentBank: does the speaker of the premise stand behind the hypothesis?"""

    premise: Text
    hypothesis: Text
    idx: Index
    label: Literal["entailment", "contradiction", "neutral"] | None = None


class Copa(Line):
    """A premise and two alternatives, one of which is its cause or its effect."""

    premise: Text
    choice1: Text
    choice2: Text
    question: Literal["cause", "effect"]
    idx: Index
    label: Literal[0, 1] | None = None


class Rte(Line):
    """Does the premise entail the hypothesis?"""

    premise: Text
    hypothesis: Text
    idx: Index
    label: Literal["entailment", "not_entailment"] | None = None


class Wic(Line):
    """Has a word the same sense in two sentences? ``start`` and ``end`` are positions of characters."""

    word: Text
    sentence1: Text
    sentence2: Text
    start1: Index
    end1: Index
    start2: Index
    end2: Index
    idx: Index
    label: bool | None = None
    version: float | None = None

    @model_validator(mode="after")
    def _inside(self) -> Self:
        for sentence, start, end in (
            (self.sentence1, self.start1, self.end1),
            (self.sentence2, self.start2, self.end2),
        ):
            if not start < end <= len(sentence):
                raise ValueError("start and end of the word do not lie in its sentence")
        return self


class Target(Line):
    """Two pieces of WSC's sentence; an index counts words that blanks part, from 0."""

    span1_index: Index
    span1_text: Text
    span2_index: Index
    span2_text: Text


class Wsc(Line):
    """Does the pronoun (span 2) stand for the noun (span 1)?"""

    text: Text
    target: Target
    idx: Index
    label: bool | None = None

    @model_validator(mode="after")
    def _inside(self) -> Self:
        count = len(self.text.split())
        if max(self.target.span1_index, self.target.span2_index) >= count:
            raise ValueError("an index of the target is beyond the last word of the text")
        return self


_Row = TypeVar("_Row", BoolQ, CB, Copa, Rte, Wic, Wsc)


def read_boolq(source: Source, faults: Faults) -> Iterator[Item]:
    """BoolQ; questions about one passage are a group."""
    for line, row in _rows(BoolQ, source, faults):
        yield Item(
            str(row.idx), row.passage, Parts(text=row.passage, question=row.question), _truth(row.label), line=line
        )


def read_cb(source: Source, faults: Faults) -> Iterator[Item]:
    """CommitmentBank."""
    for line, row in _rows(CB, source, faults):
        yield Item(
            str(row.idx),
            row.premise,
            Parts(premise=row.premise, hypothesis=row.hypothesis),
            _named(row.label),
            line=line,
        )


def read_copa(source: Source, faults: Faults) -> Iterator[Item]:
    """COPA; the classes are the numbers of the choices, from 0."""
    for line, row in _rows(Copa, source, faults):
        parts = Parts(premise=row.premise, first=row.choice1, second=row.choice2, relation=row.question)
        yield Item(str(row.idx), str(row.idx), parts, () if row.label is None else (str(row.label),), line=line)


def read_rte(source: Source, faults: Faults) -> Iterator[Item]:
    """RTE; hypotheses about one premise are a group."""
    for line, row in _rows(Rte, source, faults):
        yield Item(
            str(row.idx),
            row.premise,
            Parts(premise=row.premise, hypothesis=row.hypothesis),
            _named(row.label),
            line=line,
        )


def read_wic(source: Source, faults: Faults) -> Iterator[Item]:
    """WiC; sentences about one word are a group."""
    for line, row in _rows(Wic, source, faults):
        parts = Parts(word=row.word, first=row.sentence1, second=row.sentence2)
        yield Item(str(row.idx), row.word, parts, _truth(row.label), line=line)


def read_wsc(source: Source, faults: Faults) -> Iterator[Item]:
    """WSC; questions about one sentence are a group."""
    for line, row in _rows(Wsc, source, faults):
        parts = Parts(text=row.text, noun=row.target.span1_text, pronoun=row.target.span2_text)
        yield Item(str(row.idx), row.text, parts, _truth(row.label), line=line)


def _rows(model: type[_Row], source: Source, faults: Faults) -> Iterator[tuple[int, _Row]]:
    for entry in json_lines(source.path, faults):
        row = faults.checked(model, entry.value, source.path, entry.line)
        if row is not None:
            yield entry.line, row


def _truth(label: bool | None) -> tuple[str, ...]:  # noqa: FBT001 (the data's own type)
    return () if label is None else (str(label).lower(),)


def _named(label: str | None) -> tuple[str, ...]:
    return () if label is None else (label,)
