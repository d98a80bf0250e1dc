"""Predictions against a task's file: the task's own measures, each with an interval over whole groups.

A prediction that names no class, and an example without a prediction, are wrong; both are counted and shown. An answer of
MultiRC that is neither yes nor no is taken for the wrong one of the two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from securesplit.data.tasks.faults import Faults
from securesplit.data.tasks.item import Item
from securesplit.data.tasks.located import json_lines
from securesplit.data.tasks.registry import Task
from securesplit.data.tasks.source import Line, Words
from securesplit.errors import InputError
from securesplit.measures import classes, multirc, overlap, spans
from securesplit.measures.interval import RESAMPLES, Estimate, Value, estimate, mean

__all__ = ["Measured", "Prediction", "Scores", "read_predictions", "score"]

_MOST_CLASSES = 200


class Prediction(Line):
    """One line of a file of predictions.

    Attributes:
        id: of the example.
        prediction: what the model said; a class may be named by true, false or its number, too.
        nats, tokens: of the gold answer under the model: its negative log-likelihood, and how many tokens it has. Optional;
            perplexity is shown when every prediction has them.
    """

    id: Annotated[str, Field(min_length=1, max_length=1024)] | Annotated[int, Field(ge=0)]
    prediction: Words | bool | int | None = None
    nats: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """One measure by name; from 0 to 1, but for perplexity."""

    name: str
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Scores:
    """What a set of predictions is worth.

    Attributes:
        task: its name.
        examples: with a gold answer; all of them are scored.
        answered: of these, with a prediction.
        unparsable: of these, predictions that name no class; counted as wrong.
        groups: of examples that stand or fall together.
        measures: the first one is the task's main measure.
    """

    task: str
    examples: int
    answered: int
    unparsable: int
    groups: int
    measures: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class _Judged:
    """Rows for one family of measures, and the groups that they belong to."""

    rows: list[tuple[float, ...]]
    groups: list[str]
    values: tuple[tuple[str, Value], ...]
    unparsable: int = 0


def read_predictions(path: Path, items: Sequence[Item]) -> tuple[Prediction, ...]:
    """Predictions for these examples, each at most once.

    Raises:
        InputError: SS-1201, SS-1205; SS-1240 with every fault: a malformed line, an id that the data does not have, or one
            that stood there before.
    """
    faults = Faults('Give one JSON object a line: {"id": ..., "prediction": ...}, with the ids of the data.')
    known, seen = {item.id for item in items}, set()
    found: list[Prediction] = []
    for entry in json_lines(path, faults):
        row = faults.checked(Prediction, entry.value, path, entry.line)
        if row is None:
            continue
        name = str(row.id)
        if name not in known:
            faults.add(path, entry.line, "id: the data has no such example")
        elif name in seen:
            faults.add(path, entry.line, "id: stood there before")
        seen.add(name)
        found.append(row)
    faults.done()
    return tuple(found)


def score(
    task: Task, items: Sequence[Item], predictions: Sequence[Prediction], *, resamples: int = RESAMPLES
) -> Scores:
    """All measures of a task.

    Args:
        task: decides which.
        items: of the data; those without a gold answer are left out.
        predictions: of :func:`read_predictions`.
        resamples: draws for the intervals.

    Raises:
        InputError: SS-1245 when nothing can be scored.
    """
    golden = [item for item in items if item.answers]
    given = {str(p.id): p for p in predictions}
    judged = [] if not golden else [_perplexity(golden, given)]
    if golden and task.measure != "text":
        judged.insert(0, _JUDGES[task.measure](task, golden, _answers(predictions)))
    judged = [family for family in judged if family.rows]
    if not judged:
        raise InputError(
            "SS-1245", "there is nothing to score: the data has no gold answers, or task 'text' no likelihoods",
            hint="Use a labelled file; for texts alone give 'nats' and 'tokens' with every prediction.",
        )  # fmt: skip
    measures = tuple(
        Measured(name, estimate(family.rows, family.groups, value, resamples=resamples))
        for family in judged
        for name, value in family.values
    )
    answers = given if task.measure == "text" else _answers(predictions)
    return Scores(
        task.name, len(golden), sum(item.id in answers for item in golden), judged[0].unparsable, len({i.group for i in golden}), measures
    )  # fmt: skip


def _answers(predictions: Sequence[Prediction]) -> dict[str, str]:
    """What was said of each example; a line with likelihoods alone says nothing."""
    return {
        str(p.id): str(p.prediction).lower() if isinstance(p.prediction, bool) else str(p.prediction)
        for p in predictions
        if p.prediction is not None
    }


_MISSING = spans.Short(0.0, 0.0)
"""Not the score of an empty text: that agrees with a gold answer of which nothing is left, such as "A"."""


def _classes(task: Task, items: Sequence[Item], given: Mapping[str, str]) -> _Judged:
    labels = task.labels or tuple(classes.Label(name) for name in sorted({item.answers[0] for item in items}))
    if len(labels) > _MOST_CLASSES:
        raise InputError(
            "SS-1245", f"the data names {len(labels)} classes, more than {_MOST_CLASSES}",
            hint="Labels are names of classes, not texts; use task 'pairs' for texts.",
        )  # fmt: skip
    index = {label.name: i for i, label in enumerate(labels)}
    named = [classes.named_class(given.get(item.id, ""), labels) for item in items]
    rows = [
        classes.class_row(index[item.answers[0]], name, len(labels)) for item, name in zip(items, named, strict=True)
    ]
    silent = sum(name is None and item.id in given for item, name in zip(items, named, strict=True))
    return _Judged(rows, _groups(items), (("accuracy", classes.accuracy), ("macro_f1", classes.macro_f1)), silent)


def _multirc(task: Task, items: Sequence[Item], given: Mapping[str, str]) -> _Judged:
    questions: dict[str, list[Item]] = {}
    for item in items:
        questions.setdefault(item.question, []).append(item)
    rows: list[tuple[float, ...]] = []
    silent = 0
    for candidates in questions.values():
        gold = [item.answers[0] == "true" for item in candidates]
        named = [classes.named_class(given.get(item.id, ""), task.labels) for item in candidates]
        silent += sum(name is None and item.id in given for item, name in zip(candidates, named, strict=True))
        said = [not truth if name is None else name == 0 for truth, name in zip(gold, named, strict=True)]
        rows.append(multirc.question_row(gold, said))
    values = (("f1a", multirc.f1a), ("f1m", multirc.f1m), ("em", multirc.em0), ("em1", multirc.em1))
    return _Judged(rows, [candidates[0].group for candidates in questions.values()], values, silent)


def _spans(_task: Task, items: Sequence[Item], given: Mapping[str, str]) -> _Judged:
    found = [spans.best(item.answers, given[item.id]) if item.id in given else _MISSING for item in items]
    return _Judged([(s.f1, s.exact, 1.0) for s in found], _groups(items), (("f1", _column(0)), ("em", _column(1))))


def _turns(_task: Task, items: Sequence[Item], given: Mapping[str, str]) -> _Judged:
    found = [spans.leave_one_out(item.answers, given[item.id]) if item.id in given else _MISSING for item in items]
    return _Judged([(s.f1, s.exact, 1.0) for s in found], _groups(items), (("f1", _column(0)), ("em", _column(1))))


def _overlap(task: Task, items: Sequence[Item], given: Mapping[str, str]) -> _Judged:
    """ROUGE, BLEU-4, exact match and F1 of words; a task shows those that it is measured by."""
    rows = []
    for item in items:
        said = given.get(item.id, "")
        short = spans.best(item.answers, said) if item.id in given else _MISSING
        rows.append(
            (*overlap.bleu_row(item.answers, said, task.language), *overlap.rouge(item.answers, said, task.language), short.exact, short.f1, 1.0)
        )  # fmt: skip
    rouges = tuple((name, _column(at)) for name, at in (("rouge_1", 10), ("rouge_2", 11), ("rouge_l", 12)))
    bleu: tuple[tuple[str, Value], ...] = (("bleu_4", _bleu),)
    if task.measure == "pairs":
        short_ones = (("em", _column(13)),) if task.language == "zh" else (("em", _column(13)), ("f1", _column(14)))
        return _Judged(rows, _groups(items), (*short_ones, *rouges, *bleu))
    return _Judged(rows, _groups(items), (*bleu, *rouges) if task.language == "zh" else rouges)


def _perplexity(items: Sequence[Item], given: Mapping[str, Prediction]) -> _Judged:
    """Of the gold answers, where every one has its likelihood."""
    rows = [
        (p.nats, float(p.tokens))
        for item in items
        if (p := given.get(item.id)) is not None and p.nats is not None and p.tokens is not None
    ]
    return _Judged(list(rows) if len(rows) == len(items) else [], _groups(items), (("perplexity", overlap.perplexity),))


def _column(at: int) -> Value:
    return lambda sums: mean(sums[:, [at, -1]])


def _bleu(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return overlap.bleu(sums[:, :10])


def _groups(items: Sequence[Item]) -> list[str]:
    return [item.group for item in items]


_JUDGES = {
    "classes": _classes,
    "multirc": _multirc,
    "spans": _spans,
    "turns": _turns,
    "overlap": _overlap,
    "pairs": _overlap,
}


def as_line(prediction: Prediction) -> str:
    """The prediction as one line of a file."""
    return json.dumps(prediction.model_dump(exclude_none=True), ensure_ascii=False)
