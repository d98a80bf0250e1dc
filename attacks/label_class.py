"""Labels of a classification from released gradients (O3). One label a record: C names the class at one public place.

    label-norm     a gradient is the longer the surer C was of another class (Li et al.)
    label-cosine   gradients of two classes point apart (Li et al.)
    label-class    every class tried: the gradient that its token would give, against the one that came

Classes are tokens, and which ones is public. So label-class is exact: without noise the right class explains the gradient
to rounding, and with noise its posterior is the best that there is. Where clients answer at random, the gradient is of
the answer, and nothing here sees behind it: a right guess of the answer is right about the label as often as the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.exchange import Labelled
from attacks.head import Around, Head, Here
from attacks.knowledge import Knowledge
from attacks.outputs import recorded_outputs
from attacks.threat import Threat
from attacks.view import ServerView

__all__ = ["ATTACKS", "Settings", "choices_of"]

_WHOLE = 64  # Of more classes the asked row alone is looked at: rows before it hold a few per cent.
_ASKED = -2  # The place that names the class: the loss compares it with the last label (securesplit/data/labelled.py).


class Settings(BaseModel):
    """label_class.toml explains each value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    trust: Annotated[float, Field(ge=0, lt=1)]
    rounds: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class _Record:
    """One record.

    Attributes:
        gradient: (n, D), as released; all rows, or the one at which the class is asked for where there are many classes.
        candidates: (K, n, D), what each class would have given with a scale of 1.
        chance: (K,), C's own distribution over the classes.
    """

    gradient: Tensor
    candidates: Tensor
    chance: Tensor


def choices_of(view: ServerView) -> tuple[int, ...]:
    """The token that stands for each class, which the job names in public; none where the view was read without."""
    return tuple(getattr(view, "choices", ()))


def _records(view: ServerView, known: Knowledge, tick: Tick) -> list[_Record | None]:
    assert known.model.back is not None
    head, choices = Head(known.model.back()), torch.tensor(choices_of(view))
    found: list[_Record | None] = []
    for number, (seen, output) in enumerate(zip(view.sightings, recorded_outputs(view, known), strict=True)):
        if output is None or seen.gradient is None:
            found.append(None)
            continue
        around = Around(head, output)
        logits = head.logits(around.states[_ASKED]).float().detach()
        slope = head.slope(logits)
        weight = head.weight if slope is None else head.weight * slope[:, None]
        at_head = torch.softmax(logits, 0) @ weight - weight[choices]
        gradient, chance = torch.from_numpy(seen.gradient.copy()), torch.softmax(logits[choices], 0)
        if len(choices) <= _WHOLE:
            place = torch.zeros(len(choices), *output.shape)
            place[:, _ASKED] = at_head
            candidates = torch.stack([around.pull(one) for one in place])
        else:
            asked = len(output) + _ASKED
            past = head.cache(output) if head.layers else None
            candidates = torch.cat(
                [Here(head, output, past, asked).pull(part) for part in torch.split(at_head, _WHOLE)]
            )[:, None]
            gradient = gradient[asked : asked + 1]
        found.append(_Record(gradient, candidates, chance))
        tick(number + 1, len(view.sightings))
    return found


def _exact(records: list[_Record | None], view: ServerView, trust: float) -> list[int]:
    """The class of the largest posterior; the smallest angle where there is no noise, since the scale is unknown then.

    Where gradients are noised, the scale follows from the class: the sum over one label, clipped at a public norm.
    """
    noise = view.gradient_noise
    labels = []
    for record in records:
        if record is None:
            labels.append(-1)
            continue
        norms = record.candidates.flatten(1).norm(dim=1).clamp_min(1e-30)
        product = (record.candidates * record.gradient).flatten(1).sum(1)
        if noise.sigma:
            scale = torch.ones_like(norms) if noise.clip is None else (noise.clip / norms).clamp_max(1.0)
            prior = (trust * record.chance + (1 - trust) / len(norms)).log()
            score = prior + (scale * product - (scale * norms).square() / 2) / noise.sigma**2
        else:
            score = product / norms
        labels.append(int(score.argmax()))
    return labels


def _norms(records: list[_Record | None], _: ServerView, rounds: int) -> list[int]:
    """Two groups of lengths. A long gradient means that C thought otherwise."""
    there = [record for record in records if record is not None]
    lengths = torch.stack([record.gradient.norm() for record in there])
    low, high = lengths.min(), lengths.max()
    for _turn in range(rounds):
        long = (lengths - low).abs() > (lengths - high).abs()
        if bool(long.all()) or not bool(long.any()):
            break
        low, high = lengths[~long].mean(), lengths[long].mean()
    return _oriented(records, (lengths - low).abs() > (lengths - high).abs())


def _cosines(records: list[_Record | None], _: ServerView, rounds: int) -> list[int]:
    """The sign along the direction in which the gradients differ most."""
    del rounds
    there = [record for record in records if record is not None]
    directions = torch.stack([record.gradient.flatten() for record in there])
    directions = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-30)
    main = torch.linalg.svd(directions, full_matrices=False).Vh[0]
    return _oriented(records, directions @ main > 0)


def _oriented(records: list[_Record | None], group: Tensor) -> list[int]:
    """Name the two groups so that C's own guesses agree better; the published attacks are given one known record."""
    there = [record for record in records if record is not None]
    own = torch.stack([record.chance for record in there])
    agreement = own.log().clamp_min(-50)
    one = agreement.gather(1, group.long()[:, None]).sum()
    other = agreement.gather(1, (~group).long()[:, None]).sum()
    named = iter((group if one >= other else ~group).long().tolist())
    return [-1 if record is None else next(named) for record in records]


def _blocked(view: ServerView, _: Threat) -> str | None:
    if not view.sightings:
        return "the recording holds none of the wanted sequences"
    if not view.classes:
        return "the job learns text, not classes"
    if all(seen.gradient is None for seen in view.sightings):
        return "no gradient crossed"
    if len(choices_of(view)) != view.classes:
        return "the tokens that stand for the classes are not known"
    return None


def _two(view: ServerView, threat: Threat) -> str | None:
    return _blocked(view, threat) or (None if view.classes == 2 else "it tells two classes apart, and there are more")


Name = Callable[[list[_Record | None], ServerView], list[int]]


def _run(attack: str, view: ServerView, known: Knowledge, tick: Tick) -> Labelled:
    start, settings = time.perf_counter(), settings_of("label_class", Settings)
    records = _records(view, known, tick)
    if attack == "label-class":
        labels = _exact(records, view, settings.trust)
    else:
        labels = (_norms if attack == "label-norm" else _cosines)(records, view, settings.rounds)
    return Labelled(
        attack=attack, keys=tuple(seen.key for seen in view.sightings), labels=tuple(labels),
        seconds=time.perf_counter() - start,
    )  # fmt: skip


ATTACKS = (
    Attack("label-norm", _two, lambda view, known, tick: _run("label-norm", view, known, tick)),
    Attack("label-cosine", _two, lambda view, known, tick: _run("label-cosine", view, known, tick)),
    Attack("label-class", _blocked, lambda view, known, tick: _run("label-class", view, known, tick)),
)
