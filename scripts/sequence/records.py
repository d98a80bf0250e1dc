"""Short texts with labels that somebody else gave, from MultiRC's files: who is private, who is public, who is tested.

The labels come from another field than the text that is classified:

* ``long``: a question; does its gold answer (the first one marked correct) have more than three words?
* ``several``: a question; is more than one of its answers marked correct?
* ``correct``: a question and one of its answers; is it marked correct? (the data set's own label)

Three words is the median over the training questions. The private records are those of train.jsonl, the tested ones those
of val.jsonl; test.jsonl has no labels and is the public text. Tested passages that share eight words in a row with a
private or public one are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from securesplit.errors import InputError

Task = Literal["long", "several", "correct"]
TASKS: tuple[Task, ...] = get_args(Task)
MEDIAN_WORDS = 3
_GRAM = 8


@dataclass(frozen=True, slots=True)
class Records:
    """Texts in the order of their passages.

    Attributes:
        texts: what the client's model reads.
        labels: +1 or -1; empty for public text.
        passages: a number per text; records of one passage stay together.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    passages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """The three parts; no passage is in two of them."""

    private: Records
    tested: Records
    public: Records


def read_corpus(folder: Path, task: Task) -> Corpus:
    """Read a task's records.

    Raises:
        InputError: SS-1201 when the folder does not hold MultiRC's three files.
    """
    try:
        train, val, test = (_passages(folder / f"{name}.jsonl") for name in ("train", "val", "test"))
        taken = {gram for passage in (*train, *test) for gram in _grams(passage["text"])}
        fresh = [passage for passage in val if not _grams(passage["text"]) & taken]
        return Corpus(_records(train, task), _records(fresh, task), _records(test, task, labelled=False))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            "SS-1201",
            f"{folder} does not hold MultiRC as train.jsonl, val.jsonl and test.jsonl: {type(error).__name__}",
            hint="Pass the folder with these files as --data.",
        ) from None


def _passages(path: Path) -> list[dict]:  # type: ignore[type-arg]  # the file's own shape, read by _records alone
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["passage"] for line in lines]


def _grams(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1)}


def _records(passages: Sequence[dict], task: Task, *, labelled: bool = True) -> Records:  # type: ignore[type-arg]
    rows = [
        (text, label, number)
        for number, passage in enumerate(passages)
        for text, label in _of_passage(passage, task, labelled=labelled)
    ]
    texts, labels, numbers = zip(*rows, strict=True)
    return Records(texts, labels if labelled else (), numbers)


def _of_passage(passage: dict, task: Task, *, labelled: bool) -> Iterator[tuple[str, int]]:  # type: ignore[type-arg]
    for question in passage["questions"]:
        answers = question["answers"]
        answer = answers[question["idx"] % len(answers)]  # One of them, by a rule that knows neither text nor label.
        text = question["question"] if task != "correct" else f"{question['question']} {answer['text']}"
        if not labelled:
            yield text, 0
            continue
        gold = [a["text"] for a in answers if a["label"]]
        if task == "correct":
            yield text, 1 if answer["label"] else -1
        elif gold:  # A question without a correct answer has no label in these two tasks.
            positive = len(gold) > 1 if task == "several" else len(gold[0].split()) > MEDIAN_WORDS
            yield text, 1 if positive else -1
