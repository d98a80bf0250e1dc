"""SuperGLUE's two tasks with many questions to a passage: MultiRC (Khashabi et al. 2018) and ReCoRD (Zhang et al. 2018).

JSON lines, a passage each. Ids: ``passage/question/answer`` in MultiRC, ``passage/query`` in ReCoRD, by the file's ``idx``.
Passages are the groups, and stand for users under that unit: what is written about a passage is one person's. Labels and answers are missing in the test files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import model_validator

from securesplit.data.corpus import plain_passage
from securesplit.data.tasks.faults import Faults
from securesplit.data.tasks.item import Item, Parts
from securesplit.data.tasks.located import json_lines
from securesplit.data.tasks.source import Index, Line, Many, Source, Text, Words

__all__ = ["PLACEHOLDER", "read_multirc", "read_record"]

PLACEHOLDER = "@placeholder"


class Candidate(Line):
    """A candidate answer; the published files hold a few empty ones."""

    text: Words
    idx: Index
    label: Literal[0, 1] | None = None


class Question(Line):
    """A question with any number of right answers."""

    question: Text
    answers: Many[Candidate]
    idx: Index

    @model_validator(mode="after")
    def _candidates(self) -> Self:
        if not self.answers:
            raise ValueError("has no answers to judge")
        if len({a.idx for a in self.answers}) < len(self.answers):
            raise ValueError("has two answers with one idx")
        if len({a.label is None for a in self.answers}) > 1:
            raise ValueError("has a label for some answers only")
        return self


class Questioned(Line):
    """A passage, which may carry mark-up."""

    text: Text
    questions: Many[Question]

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if not self.questions:
            raise ValueError("has no questions")
        if len({q.idx for q in self.questions}) < len(self.questions):
            raise ValueError("has two questions with one idx")
        return self


class MultiRC(Line):
    """One line."""

    idx: Index
    passage: Questioned
    version: float | None = None


class Span(Line):
    """A piece of the passage, both ends included."""

    start: Index
    end: Index


class Answer(Span):
    """A piece of the passage that fills the gap."""

    text: Text


class Passage(Line):
    """A news article and the pieces that are marked in it."""

    text: Text
    entities: Many[Span]


class Query(Line):
    """A sentence with a gap."""

    query: Text
    idx: Index
    answers: Many[Answer] | None = None

    @model_validator(mode="after")
    def _gap(self) -> Self:
        if PLACEHOLDER not in self.query:
            raise ValueError(f"has no {PLACEHOLDER}")
        if self.answers is not None and not self.answers:
            raise ValueError("has an empty list of answers; leave it out where there are none")
        return self


class Record(Line):
    """One line."""

    idx: Index
    passage: Passage
    qas: Many[Query]
    source: Words | None = None

    @model_validator(mode="after")
    def _inside(self) -> Self:
        spans = [*self.passage.entities, *(a for query in self.qas for a in query.answers or ())]
        if any(not s.start <= s.end < len(self.passage.text) for s in spans):
            raise ValueError("an entity or answer does not lie in the passage")
        if len({q.idx for q in self.qas}) < len(self.qas):
            raise ValueError("has two queries with one idx")
        return self


def read_multirc(source: Source, faults: Faults) -> Iterator[Item]:
    """MultiRC: one example for each candidate answer, true or false."""
    for entry in json_lines(source.path, faults):
        row = faults.checked(MultiRC, entry.value, source.path, entry.line)
        if row is None:
            continue
        text = plain_passage(row.passage.text)
        for question in row.passage.questions:
            asked = f"{row.idx}/{question.idx}"
            for candidate in question.answers:
                truth = () if candidate.label is None else ("true" if candidate.label else "false",)
                parts = Parts(text=text, question=question.question, candidate=candidate.text)
                yield Item(
                    f"{asked}/{candidate.idx}",
                    str(row.idx),
                    parts,
                    truth,
                    question=asked,
                    user=f"passage:{row.idx}",
                    line=entry.line,
                )


def read_record(source: Source, faults: Faults) -> Iterator[Item]:
    """ReCoRD: one example for each query; ``@highlight`` marks of the passage become line breaks."""
    for entry in json_lines(source.path, faults):
        row = faults.checked(Record, entry.value, source.path, entry.line)
        if row is None:
            continue
        text = row.passage.text.replace("@highlight", "").strip()
        for query in row.qas:
            answers = tuple(dict.fromkeys(a.text for a in query.answers or ()))
            parts = Parts(text=text, question=query.query)
            yield Item(
                f"{row.idx}/{query.idx}", str(row.idx), parts, answers, user=f"passage:{row.idx}", line=entry.line
            )
