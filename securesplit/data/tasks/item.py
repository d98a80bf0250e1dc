"""What every task's reader yields: an example's parts, its gold answers, and which examples stand or fall together."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Item", "Parts", "Turn"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One earlier turn of a conversation."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Parts:
    """The texts that a template may name. A task fills its own; the others are empty.

    Attributes:
        text: a passage, story, document, sentence, or free prompt.
        question: asked about it.
        candidate: an answer that is to be judged.
        premise, hypothesis: of an inference; ``premise`` also of COPA.
        first, second: two choices, or two sentences.
        relation: ``cause`` or ``effect``, which COPA asks for.
        word: whose sense is compared.
        noun, pronoun: of which WSC asks whether they are one.
        turns: of a conversation, before the question.
    """

    text: str = ""
    question: str = ""
    candidate: str = ""
    premise: str = ""
    hypothesis: str = ""
    first: str = ""
    second: str = ""
    relation: str = ""
    word: str = ""
    noun: str = ""
    pronoun: str = ""
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class Item:
    """One example.

    Attributes:
        id: unique in its file; predictions name it.
        group: examples of one group share a passage, a question or a conversation; intervals draw whole groups.
        parts: what a template makes a prompt of.
        answers: gold answers, a class by its name; empty where the file has none, as test sets do.
        question: examples of one question are judged together, as MultiRC does; the example's id where it stands alone.
        user: whose text it is, as the file says; None when it does not say.
        line: of the file, where it begins; 0 where a format has none.
    """

    id: str
    group: str
    parts: Parts
    answers: tuple[str, ...]
    question: str = ""
    user: str | None = None
    line: int = 0

    @property
    def label(self) -> str | None:
        """The first gold answer; of a class its name."""
        return self.answers[0] if self.answers else None
