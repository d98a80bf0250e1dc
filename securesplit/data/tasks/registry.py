"""The tasks by name: how each is read, which classes it has, and how it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from securesplit.data.tasks.comprehension import read_multirc, read_record
from securesplit.data.tasks.coqa import read_coqa
from securesplit.data.tasks.faults import Faults
from securesplit.data.tasks.free import read_labelled, read_pairs, read_text
from securesplit.data.tasks.huatuo import read_huatuo
from securesplit.data.tasks.inference import read_boolq, read_cb, read_copa, read_rte, read_wic, read_wsc
from securesplit.data.tasks.item import Item
from securesplit.data.tasks.source import Reader, Source
from securesplit.data.tasks.xsum import read_xsum
from securesplit.errors import InputError
from securesplit.measures.classes import Label
from securesplit.measures.overlap import Language

__all__ = ["TASKS", "Measure", "Task", "read_task", "task_named"]

Measure = Literal["classes", "multirc", "spans", "turns", "overlap", "pairs", "text"]

_TRUTH = (Label("true", ("yes", "1")), Label("false", ("no", "0")))


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: chosen by it.
        about: in a few words.
        format: what is read.
        measure: which measures count; securesplit/data/tasks/score.py.
        read: its reader.
        labels: its classes; empty where there are none, or where the data names them.
        language: decides what a word is in ROUGE and BLEU.
    """

    name: str
    about: str
    format: str
    measure: Measure
    read: Reader
    labels: tuple[Label, ...] = ()
    language: Language = "en"


_LINES = "JSON lines of SuperGLUE"
_FREE = ".jsonl, .json, .csv, or a folder of datasets' save_to_disk"

TASKS = (
    Task("boolq", "a passage, a yes or no question", _LINES, "classes", read_boolq, _TRUTH),
    Task(
        "cb", "entailment, contradiction or neither", _LINES, "classes", read_cb,
        (Label("entailment", ("yes", "true", "0")), Label("contradiction", ("no", "false", "1")), Label("neutral", ("maybe", "2"))),
    ),
    Task(
        "copa", "which of two is the cause or the effect", _LINES, "classes", read_copa,
        (Label("0", ("a", "choice1", "choice 1")), Label("1", ("b", "choice2", "choice 2"))),
    ),
    Task("multirc", "which candidate answers are right", _LINES, "multirc", read_multirc, _TRUTH),
    Task("record", "fill a gap from a news article", _LINES, "spans", read_record),
    Task(
        "rte", "does one sentence follow from another", _LINES, "classes", read_rte,
        (Label("entailment", ("yes", "true", "0")), Label("not_entailment", ("no", "false", "1"))),
    ),
    Task("wic", "has a word the same sense twice", _LINES, "classes", read_wic, _TRUTH),
    Task("wsc", "what does a pronoun stand for", _LINES, "classes", read_wsc, _TRUTH),
    Task("coqa", "conversations about a story", "the published JSON file", "turns", read_coqa),
    Task("xsum", "a news article in one sentence", "a folder of texts with --ids and --split, or JSON lines", "overlap", read_xsum),
    Task("huatuo", "Chinese medical questions", "JSON array or lines", "overlap", read_huatuo, language="zh"),
    Task("pairs", "your own prompts and answers", _FREE, "pairs", read_pairs),
    Task("pairs-zh", "the same in Chinese", _FREE, "pairs", read_pairs, language="zh"),
    Task("labels", "your own texts with a class", _FREE, "classes", read_labelled),
    Task("text", "your own texts, every token learnt", f"{_FREE}, or plain text", "text", read_text),
)  # fmt: skip
"""In the order in which they are listed."""


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        InputError: SS-1241 when there is none.
    """
    for task in TASKS:
        if task.name == name:
            return task
    raise InputError(
        "SS-1241", f"there is no task {name[:40]!r}", hint=f"Tasks are {', '.join(task.name for task in TASKS)}."
    )


def read_task(task: Task, source: Source, limit: int | None = None) -> tuple[Item, ...]:
    """All examples of a file, in its order. The whole file is checked, whatever the limit.

    Args:
        task: which format to expect.
        source: where.
        limit: keep so many examples, the first ones.

    Raises:
        InputError: SS-1201 cannot be read, SS-1205 over a cap, SS-1207 a limit below 1, SS-1240 with every fault of the
            content, SS-1243 a saved data set without the package that reads it.
    """
    if limit is not None and limit < 1:
        raise InputError("SS-1207", f"a limit of {limit} leaves nothing to read", hint="Use a limit of at least 1.")
    faults = Faults(f"Task '{task.name}' reads {task.format}; docs/tasks.md shows an example of each format.")
    if (source.ids or source.split) and not (task.read is read_xsum and source.path.is_dir()):
        faults.add(
            source.path, None, "is no folder of documents of task 'xsum': leave the file of ids and the split out"
        )
    items: list[Item] = []
    seen: set[str] = set()
    for item in task.read(source, faults):
        if item.id in seen:
            faults.add(source.ids or source.path, item.line or None, "has an id that stood there before")
        seen.add(item.id)
        items.append(item)
    faults.done()
    if not items:
        faults.add(source.path, None, "holds no example")
        faults.done()
    return tuple(items if limit is None else items[:limit])
