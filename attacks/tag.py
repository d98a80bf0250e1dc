"""Gradient matching as published (O3): soft labels are moved until their gradient is the released one.

    tag      from random labels, many epochs
    bisr-b   from an inverter's guess of the input, which is the labels shifted by one; few epochs

Both stand here for comparison: labels.py and leftward.py solve the same equation exactly.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.exchange import Recovered
from attacks.head import Around, Head
from attacks.knowledge import Knowledge
from attacks.labels import bare
from attacks.outputs import recorded_outputs
from attacks.threat import Threat
from attacks.view import ServerView, Sighting

__all__ = ["ATTACKS", "Settings", "matched"]

_RANKED = 64  # Of the inverter's choices, a logit each.


class Settings(BaseModel):
    """tag.toml and bisr_b.toml explain each value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    epochs: Annotated[int, Field(ge=1)]
    rate: Annotated[float, Field(gt=0)]
    squared: Annotated[float, Field(ge=0, le=1)]
    absolute: Annotated[float, Field(ge=0, le=1)]
    temperature: Annotated[float, Field(gt=0)]
    certainty: Annotated[float, Field(ge=0)]


def matched(head: Head, hidden: Tensor, gradient: Tensor, start: Tensor, scale: float, settings: Settings) -> Tensor:
    """Optimise soft labels.

    Args:
        hidden, gradient: (T, D), B's output and the released gradient at it.
        start: (T - 1, V) logits of soft labels. scale: 1 / number of labels, as the attacker counts them.

    Returns:
        (T - 1, V) logits.
    """
    around, size = Around(head, hidden), float(gradient.norm().clamp_min(1e-30))
    with torch.no_grad():
        logits = head.logits(around.states).float()[:-1]
    slope, chance = head.slope(logits), torch.softmax(logits, 1)
    variable = (start / settings.temperature).clone().requires_grad_()
    optimiser = torch.optim.AdamW([variable], lr=settings.rate)
    for _ in range(settings.epochs):
        labels = torch.softmax(variable.detach(), 1)
        weights = chance - labels if slope is None else (chance - labels) * slope
        at_head = torch.cat([weights @ head.weight, torch.zeros(1, hidden.shape[1])])
        left = (scale * around.pull(at_head) - gradient) / size
        # The loss's derivative by the soft labels, by hand: the gradient is linear in them.
        by_left = 2 * settings.squared * left + settings.absolute * left.sign() / left.numel() ** 0.5
        by_labels = -around.push(by_left)[:-1] @ head.weight.T * scale / size
        by_labels = by_labels if slope is None else by_labels * slope
        variable.grad = labels * (by_labels - (labels * by_labels).sum(1, keepdim=True))
        optimiser.step()
    return variable.detach()


def _start(attack: str, known: Knowledge, seen: Sighting, settings: Settings, generator: torch.Generator) -> Tensor:
    """(T - 1, V) logits of the first guess: random, or the ridge inverter's choices at the next position."""
    count = len(seen.rows) - 1
    if attack == "tag":
        return torch.randn(count, known.vocabulary, generator=generator)
    rows = torch.from_numpy(seen.rows.copy())[1:] / known.layer.factor
    with torch.inference_mode():
        ranked = known.inverter.propose(rows, 1, _RANKED).clone()
    falling = torch.linspace(settings.certainty, 0, ranked.shape[1] + 1)[:-1]
    return torch.zeros(count, known.vocabulary).scatter(1, ranked, falling.expand(count, -1).contiguous())


def _run(attack: str, view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    start, settings = time.perf_counter(), settings_of(attack.replace("-", "_"), Settings)
    assert known.model.back is not None
    head, generator = Head(known.model.back()), torch.Generator().manual_seed(known.seed)
    tokens: list[tuple[int, ...]] = []
    unresolved = 0
    for number, (seen, output) in enumerate(zip(view.sightings, recorded_outputs(view, known), strict=True)):
        if output is None or seen.gradient is None or len(output) < 2:
            tokens.append((-1,) * len(seen.rows))
            unresolved += len(seen.rows)
            continue
        gradient = torch.from_numpy(seen.gradient.copy())
        first = _start(attack, known, seen, settings, generator)
        scaled = settings.model_copy(update={"epochs": max(1, round(settings.epochs * known.profile.steps))})
        found = matched(head, output, gradient, first, _scale(view, seen), scaled)
        tokens.append((-1, *found.argmax(1).tolist()))
        tick(number + 1, len(view.sightings))
    return Recovered(
        attack=attack, keys=tuple(seen.key for seen in view.sightings), tokens=tuple(tokens), first=1,
        unresolved=unresolved, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _scale(view: ServerView, seen: Sighting) -> float:
    """One over the labels of the message, if no row of it were padding: what the published attacks assume."""
    if view.gradient_noise.sigma:
        return 1 / len(seen.rows)
    same = [s for s in view.sightings if (s.key.peer, s.key.step) == (seen.key.peer, seen.key.step)]
    return 1 / sum(len(s.rows) - 1 for s in same)


def _blocked(view: ServerView, threat: Threat) -> str | None:
    return bare(view, threat)


ATTACKS = (
    Attack("tag", _blocked, lambda view, known, tick: _run("tag", view, known, tick)),
    Attack("bisr-b", _blocked, lambda view, known, tick: _run("bisr-b", view, known, tick)),
)
