"""A sensitive attribute of a record from what crosses the cut: probes that learn from labelled public text (O1, O2).

What they do not do: learn from the victims' own labels; guess where public text has none. Sums of evidence over the
records of one person are the scorer's business, which knows who is who.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.exchange import Labelled
from attacks.knowledge import Knowledge
from attacks.probes import Ensemble, Fit, Form, Sample, choose, discriminant, token_classifier
from attacks.simulated import clean_rows, framed, padding_of
from attacks.threat import Threat
from attacks.view import ServerView, Sighting

__all__ = ["ATTACKS"]

Part = Annotated[float, Field(gt=0, lt=1)]


class Settings(BaseModel):
    """configs/attribute.toml, which explains each value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    texts: Annotated[int, Field(ge=4)]
    output_texts: Annotated[int, Field(ge=4)]
    held_out: Part
    draws: Annotated[int, Field(ge=1)]
    shrinkage: Annotated[tuple[Part, ...], Field(min_length=1, strict=False)]
    vocabulary: Annotated[int, Field(ge=2)]
    smoothing: Annotated[float, Field(gt=0)]


@dataclass(frozen=True, slots=True)
class _Group:
    """Sightings that one probe serves: of one public length, noise and gain."""

    bucket: int
    sigma: float
    gain: float


def _any(view: ServerView, threat: Threat) -> str | None:
    if threat.text == "none":
        return "a probe needs labelled public text, and the threat model grants none"
    if view.permuted:
        return "rows or columns are permuted in secret"
    return None if view.sightings else "the recording holds none of the wanted sequences"


def _repeated(view: ServerView, threat: Threat) -> str | None:
    if threat.releases < 2 or not any(seen.releases > 1 for seen in view.sightings):
        return "there is nothing to average: every record has one fresh release"
    return _any(view, threat)


def _answered(view: ServerView, threat: Threat) -> str | None:
    if not any(seen.output is not None for seen in view.sightings):
        return "the server answered none of the wanted sequences"
    return _any(view, threat)


def _attribute(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Labelled:
    start = time.perf_counter()
    averaged = name == "attribute-averaged"
    groups: dict[_Group, list[int]] = {}
    for index, seen in enumerate(view.sightings):
        noise = known.noise.averaged(seen.releases) if averaged else known.noise
        groups.setdefault(_Group(len(seen.rows), noise.sigma, seen.gain), []).append(index)
    labels = [-1] * len(view.sightings)
    with torch.no_grad():
        for number, (shape, indices) in enumerate(groups.items()):
            sample = _sample(known, shape.bucket, classes=view.classes > 0)
            if sample is not None:
                seen_here = [view.sightings[i] for i in indices]
                for index, label in zip(indices, _classes(name, seen_here, sample, shape, known), strict=True):
                    labels[index] = label
            tick(number + 1, len(groups))
    return Labelled(
        attack=name, keys=tuple(seen.key for seen in view.sightings), labels=tuple(labels),
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def _settings() -> Settings:
    return settings_of("attribute", Settings)


def _sample(known: Knowledge, bucket: int, *, classes: bool) -> Sample | None:
    """Labelled public text as a client would send it in this bucket; None where two labels are not to be had."""
    pairs = [
        (text[: bucket - classes], label)
        for text, label in zip(known.prior.texts, known.attributes, strict=False)
        if label >= 0 and len(text) > 1
    ]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(known.seed)).tolist()
    pairs = [pairs[i] for i in order[: _settings().texts]]
    if len({label for _, label in pairs}) < 2 or len(pairs) < 4:
        return None
    ids = framed([text for text, _ in pairs], bucket, padding_of(known), classes=classes)
    labels = torch.tensor([label for _, label in pairs])
    return Sample(clean_rows(known, ids), ids, labels, max(known.attributes) + 1)


def _classes(name: str, seen: Sequence[Sighting], sample: Sample, shape: _Group, known: Knowledge) -> list[int]:
    """The likeliest class of each sighting of a group."""
    rows = torch.stack([torch.tensor(one.linked if name == "attribute-averaged" else one.rows) for one in seen])
    ensemble = _chosen(sample, shape.sigma, known.seed)
    scores = ensemble(rows)
    if name == "attribute-output":
        scores = _with_output(seen, scores, sample, shape, known, ensemble)
    return [int(label) for label in scores.argmax(1)]


def _chosen(sample: Sample, sigma: float, seed: int) -> Ensemble:
    """The forms that do best on a held-out part with the noise on, fitted to all of a sample."""
    settings = _settings()
    generator = torch.Generator().manual_seed(seed)
    held = max(1, round(len(sample.labels) * settings.held_out))
    order = torch.randperm(len(sample.labels), generator=generator)
    train, judged = sample.part(order[held:]), sample.part(order[:held])
    clean = judged.rows.repeat(settings.draws, 1, 1)
    noised = clean + sigma * torch.randn(clean.shape, generator=generator)  # A simulation; no release.
    return choose(_fits(sigma, settings), train, judged, noised, sample)


def _fits(sigma: float, settings: Settings) -> list[Fit]:
    """Every form, each at the noise."""
    linear = [
        partial(discriminant, sigma=sigma, last=last, shrinkage=shrinkage)
        for last in (False, True)
        for shrinkage in settings.shrinkage
    ]
    tokens = partial(token_classifier, sigma=sigma, vocabulary=settings.vocabulary, smoothing=settings.smoothing)
    return [*linear, tokens]


def _with_output(
    seen: Sequence[Sighting], scores: Tensor, sample: Sample, shape: _Group, known: Knowledge, final: Form
) -> Tensor:
    """Scores with the evidence of B's output: probes of it compete with the one of the rows, and join it.

    The noise has gone through B, so that it is drawn, in training as well, and not put into formulae.
    """
    settings = _settings()
    assert known.model.middle is not None, "the worker always has the public model"
    middle = known.model.middle()
    having = [i for i, one in enumerate(seen) if one.output is not None]
    few = sample.part(torch.arange(min(settings.output_texts, len(sample.labels))))
    if not having or middle.width != sample.rows.shape[-1]:
        return scores
    noise = torch.randn(few.rows.shape, generator=torch.Generator().manual_seed(known.seed + 1))
    released = few.rows + shape.sigma * noise
    outputs = torch.cat([middle(part * shape.gain).float() for part in torch.split(released, 32)])
    held = max(1, round(len(few.labels) * settings.held_out))
    index, width = torch.arange(len(few.labels)), outputs.shape[-1]
    # Who judges must not have been learnt from: a probe of the rows without the held-out texts stands in for the final one.
    honest = _chosen(sample.part(torch.arange(held, len(sample.labels))), shape.sigma, known.seed)

    def of_rows(part: Sample) -> Form:
        form = final if len(part.labels) == len(few.labels) else honest
        return lambda both: form(both[..., width:])

    def of_output(fit: Fit) -> Fit:
        def fitted(part: Sample) -> Form:
            form = fit(part)
            return lambda both: form(both[..., :width])

        return fitted

    wide = Sample(outputs, few.ids, few.labels, few.classes)
    forms = [of_rows, *(of_output(fit) for fit in _fits(0.0, settings)[:-1])]
    judged = torch.cat((outputs, released), -1)[:held]
    joined = choose(forms, wide.part(index[held:]), wide.part(index[:held]), judged, wide)
    return _joined(joined, seen, having, scores)


def _joined(joined: Ensemble, seen: Sequence[Sighting], having: Sequence[int], scores: Tensor) -> Tensor:
    both = torch.stack([torch.cat((torch.tensor(seen[i].output), torch.tensor(seen[i].rows)), -1) for i in having])
    found = scores.clone()
    found[list(having)] = joined(both)
    return found


_Run = Callable[[str, ServerView, Knowledge, Tick], Labelled]


def _attack(name: str, blocked: Callable[[ServerView, Threat], str | None]) -> Attack:
    return Attack(name, blocked, lambda view, known, tick: _attribute(name, view, known, tick))


ATTACKS = (
    _attack("attribute", _any),
    _attack("attribute-averaged", _repeated),
    _attack("attribute-output", _answered),
)
