"""Which checkpoint is best on a part of the data, and what it is worth on all of it; stopped and started again at will.

Every checkpoint predicts the same part, whole groups drawn by a public hash. The one with the best main measure then
predicts the rest. Each prediction is on disk before the next is asked for, so a run that was stopped goes on where it was;
a folder of another evaluation, or a checkpoint that changed meanwhile, is refused. Predictions are private: files 0600.

The best of many on a part is chosen because it is the best there: only its figure on all of the data, which the part is a
small share of, may be told as a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from securesplit.data.tasks.fit import examples_of
from securesplit.data.tasks.item import Item
from securesplit.data.tasks.registry import Task
from securesplit.data.tasks.score import Prediction, Scores, as_line, read_predictions, score
from securesplit.data.tasks.templates import Template
from securesplit.errors import InputError
from securesplit.pki.files import write_atomically

__all__ = ["Plan", "Predictor", "Selected", "drawn", "matching", "select"]

Predictor = Callable[[Path, Sequence[Item]], Iterator[Prediction]]
"""A checkpoint's folder and examples, to predictions, each once and as soon as it is made; in any order, because each names its example."""
Progress = Callable[[str, int, int, float | None], None]
_NUMBER = re.compile(r"(\d+)")
_OF_A_CLIENT = "adapter-back.safetensors"
_LOWER_IS_BETTER = frozenset({"perplexity"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What is evaluated.

    Attributes:
        task: decides the measures.
        items: with gold answers.
        template: how they are asked.
        settings: all else that predictions depend on, such as how many tokens are generated.
        subset: about so many examples choose the checkpoint; None lets all of them.
    """

    task: Task
    items: tuple[Item, ...]
    template: Template
    settings: str
    subset: int | None


@dataclass(frozen=True, slots=True)
class Selected:
    """The outcome.

    Attributes:
        best: the chosen checkpoint.
        tried: each checkpoint with its scores on the part.
        scores: of the best, on all of the data.
    """

    best: Path
    tried: tuple[tuple[Path, Scores], ...]
    scores: Scores


def matching(pattern: str) -> tuple[Path, ...]:
    """The checkpoints that a pattern such as ``run/round-*`` names, numbers in their names counted as numbers.

    What holds no adapters of a client, such as a server's folder or this command's own, is none: it would end the evaluation
    when its turn comes, after others have been paid for.

    Raises:
        InputError: SS-1248 when there is none.
    """
    path = Path(pattern)
    base = Path(path.anchor) if path.is_absolute() else Path()
    names = str(path.relative_to(base)) if path.is_absolute() else pattern
    found = [folder for folder in base.glob(names) if folder.is_dir()] if names not in {"", "."} else []
    if not found:
        raise InputError("SS-1248", "no folder matches --checkpoints", hint="Quote the pattern: --checkpoints 'run/*'.")
    # A name with a dot in front is what a crash has left half done.
    whole = [folder for folder in found if (folder / _OF_A_CLIENT).is_file() and not folder.name.startswith(".")]
    count, found = len(found), whole
    if not found:
        raise InputError(
            "SS-1248", f"none of the {count} folder(s) that match --checkpoints holds adapters of a client",
            hint="Name --out folders of `securesplit train`, or what is in them, as 'runs/alice/best'.",
        )  # fmt: skip
    return tuple(sorted(found, key=_natural))


def drawn(items: Sequence[Item], count: int) -> tuple[int, ...]:
    """Indices of about ``count`` items: whole groups, in the order of a public hash of their names, until there are enough.

    Raises:
        InputError: SS-1248 for a count below 1.
    """
    if count < 1:
        raise InputError("SS-1248", f"a subset of {count} examples chooses nothing", hint="Use at least 1.")
    members: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        members.setdefault(item.group, []).append(index)
    found: list[int] = []
    for group in sorted(members, key=lambda name: hashlib.sha256(b"subset:" + name.encode()).digest()):
        if len(found) >= count:
            break
        found += members[group]
    return tuple(sorted(found))


def select(plan: Plan, checkpoints: Sequence[Path], predict: Predictor, folder: Path, progress: Progress) -> Selected:
    """Choose on a part, evaluate in full.

    Args:
        plan: what.
        checkpoints: at least one, each a folder.
        predict: asks the model.
        folder: for predictions and the plan; made if it is not there.
        progress: told of every prediction.

    Raises:
        InputError: SS-1247 when the folder belongs to another evaluation or cannot be used; SS-1245, SS-1248, SS-1804.
    """
    _claim(plan, checkpoints, folder)
    part = tuple(range(len(plan.items))) if plan.subset is None else drawn(plan.items, plan.subset)
    tried = []
    for number, checkpoint in enumerate(checkpoints):
        what = f"{checkpoint.name} on {len(part)} of {len(plan.items)}"
        made = _predicted(plan, checkpoint, part, predict, folder / f"{number}.jsonl", what, progress)
        tried.append((checkpoint, _scored(plan, part, made)))
    best = max(range(len(tried)), key=lambda i: (_worth(tried[i][1]), -i))
    whole = tuple(range(len(plan.items)))
    what = f"{checkpoints[best].name} on all"
    made = _predicted(plan, checkpoints[best], whole, predict, folder / f"{best}.jsonl", what, progress)
    return Selected(checkpoints[best], tuple(tried), _scored(plan, whole, made))


def _worth(scores: Scores) -> float:
    main = scores.measures[0]
    return -main.estimate.value if main.name in _LOWER_IS_BETTER else main.estimate.value


def _scored(plan: Plan, part: Sequence[int], made: Sequence[Prediction]) -> Scores:
    return score(plan.task, [plan.items[i] for i in part], made)


def _predicted(
    plan: Plan, checkpoint: Path, part: Sequence[int], predict: Predictor, path: Path, what: str, progress: Progress
) -> list[Prediction]:
    """The predictions for a part, of which those on disk are not asked for again."""
    wanted = {plan.items[i].id for i in part}
    known = [p for p in _resumed(path, plan.items) if str(p.id) in wanted]
    done = {str(p.id) for p in known}
    missing = [plan.items[i] for i in part if plan.items[i].id not in done]
    progress(what, len(known), len(part), None)
    if not missing:
        return known
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "a", encoding="utf-8") as file:
        for prediction in predict(checkpoint, missing):
            file.write(as_line(prediction) + "\n")
            file.flush()
            os.fsync(file.fileno())
            known.append(prediction)
            progress(what, len(known), len(part), None)
    return known


def _resumed(path: Path, items: Sequence[Item]) -> tuple[Prediction, ...]:
    """What is on disk; the last line is cut off if it was not written whole."""
    if not path.is_file():
        return ()
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return read_predictions(path, items)


def _claim(plan: Plan, checkpoints: Sequence[Path], folder: Path) -> None:
    """The folder is this evaluation's, now or already."""
    if not checkpoints:
        raise InputError("SS-1248", "there is no checkpoint to evaluate", hint="Name at least one folder.")
    text = json.dumps({"plan": _identity(plan), "checkpoints": [_content(path) for path in checkpoints]}, indent=1)
    path = folder / "plan.json"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.is_file():
            if any(folder.glob("*.jsonl")):
                raise _another(folder)
            write_atomically(path, text.encode(), mode=0o600)
        elif path.read_text(encoding="utf-8") != text:
            raise _another(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "SS-1247", f"the folder {folder} cannot be used: {type(error).__name__}", hint="Name another --out."
        ) from None


def _another(folder: Path) -> InputError:
    return InputError(
        "SS-1247", f"{folder} holds another evaluation: other data, settings or checkpoints",
        hint="Name another --out; to go on with that one, give the same arguments and unchanged checkpoints.",
    )  # fmt: skip


def _identity(plan: Plan) -> str:
    """SHA-256 over all that predictions depend on, but for the model."""
    digest = hashlib.sha256()
    parts = [plan.task.name, plan.settings, str(plan.subset)]
    for item, example in zip(plan.items, examples_of(plan.task, plan.template, plan.items), strict=True):
        parts += [item.id, item.group, example.prompt, json.dumps(item.answers)]
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _content(checkpoint: Path) -> str:
    """SHA-256 over a checkpoint's weights, with their names."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _natural(path: Path) -> tuple[tuple[int, int | str], ...]:
    return tuple((0, int(piece)) if piece.isdigit() else (1, piece) for piece in _NUMBER.split(str(path)) if piece)
