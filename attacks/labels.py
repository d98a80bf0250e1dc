"""Labels from released gradients (O3), in closed form: see attacks/head.py for the equation.

    labels-closed   C is norm and head alone: row t of the gradient knows label t + 1 and nothing else

Every word of the vocabulary is tested, by its exact likelihood under the policy's noise; the prior is C's own
distribution on what B answered, mixed with a unigram. Noise on the activations changes nothing of it: whatever B was
given, the server knows what it answered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.evidence import Evidence, Fit, Mechanism, fit, improve
from attacks.exchange import Recovered
from attacks.head import Head
from attacks.knowledge import Knowledge
from attacks.outputs import Outlook, outlook_for, public_texts, recorded_outputs
from attacks.prepared import Prepared, Settings, reference_for
from attacks.threat import Threat
from attacks.view import ServerView, Sighting

__all__ = ["ATTACKS", "Labels", "Prepared", "Settings", "bare", "closed", "judged", "mechanism_of", "recover"]


@dataclass(frozen=True, slots=True)
class Labels:
    """What was found of one sequence.

    Attributes:
        log_likelihood: (T - 1, V), up to a constant of the row; row t is of label t + 1.
        log_prior: (T - 1, V), what was known before the gradient.
        found: scale, variance and number of labelled rows.
        unresolved: labelled rows that no label explains.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    found: Fit
    unresolved: int

    @property
    def best(self) -> list[int]:
        """The likeliest label of every row."""
        return (self.log_likelihood + self.log_prior).argmax(1).tolist()


def mechanism_of(view: ServerView, ready: Prepared) -> Mechanism:
    """The policy's noise, and the scale that its clip and the public number of labels let one expect.

    Where gradients are noised, the loss is a sum over records divided by the public length (client/step.py), and each
    record's gradient is clipped: s = min(1, C / norm) / T, and the norm is what C's own distribution lets one expect.
    """
    noise, count = view.gradient_noise, len(ready.hidden)
    if not noise.sigma or noise.clip is None:
        return Mechanism(noise.sigma)
    return Mechanism(noise.sigma, expected=min(1 / count, noise.clip / max(ready.expected_norm(), 1e-30)))


def closed(ready: Prepared, outlook: Outlook, mechanism: Mechanism) -> Labels:
    """Every row by itself, as if later labels did not reach it; exact where C has no layers."""
    log_prior = outlook.log_prior(ready.logits[:-1])
    found = fit(ready.alone(log_prior, None), log_prior, mechanism)
    evidence = ready.alone(log_prior, found)
    return judged(evidence, log_prior, improve(evidence, log_prior, found, mechanism), ready.settings)


def judged(evidence: Evidence, log_prior: Tensor, found: Fit, settings: Settings) -> Labels:
    """The likelihood of every row, and how many labelled rows nothing explains."""
    residual = evidence.residual(found.scale)
    least = residual.amin(1)
    left = least[: found.labelled]
    # Four standard deviations of v chi^2_D; and what rounding and drift may leave.
    most = found.variance * (evidence.width + 4 * (2 * evidence.width) ** 0.5)
    open_ = left > most + settings.unexplained * evidence.row[: found.labelled]
    likelihood = (least[:, None] - residual) / (2 * found.variance)
    return Labels(likelihood, log_prior, found, int(open_.sum()))


Solve = Callable[[Prepared, Outlook, Mechanism], Labels]
Read = Callable[["Opening", Labels], tuple[int, ...]]


def bare(view: ServerView, _: Threat) -> str | None:
    """What keeps every attack on gradients from running."""
    if not view.sightings:
        return "the recording holds none of the wanted sequences"
    if view.classes:
        return "the labels are classes, and say nothing of the text"
    if all(seen.gradient is None for seen in view.sightings):
        return "no gradient crossed"
    return None


@dataclass(frozen=True, slots=True)
class Opening:
    """What an attack on gradients knows before it looks at one.

    Attributes:
        head: C. texts: (n, T) public ids that the prior was fitted on. outlook: the prior.
    """

    head: Head
    texts: Tensor
    outlook: Outlook


def opening_for(view: ServerView, known: Knowledge) -> Opening:
    """Fit the prior. Without noise on the gradients it decides nothing, and takes no text."""
    assert known.model.back is not None
    head = Head(known.model.back())
    count = settings_of("labels", Settings).texts
    texts = public_texts(known, count if view.gradient_noise.sigma else 0)
    return Opening(head, texts, outlook_for(view, known, head, texts))


def solved(view: ServerView, known: Knowledge, opening: Opening, solve: Solve) -> Iterator[Labels | None]:
    """Attack every sequence, in the view's order; None where it has no gradient or B's output is not to be had."""
    settings, reference = _affordable(view, known), None
    for seen, output in zip(view.sightings, recorded_outputs(view, known), strict=True):
        if output is None or seen.gradient is None or len(output) < 2:
            yield None
            continue
        if reference is None:
            reference = reference_for(opening.head, output, settings)
        ready = Prepared(opening.head, output, _gradient(seen), reference, settings)
        if not bool(ready.gradient.any()):  # The gate sends zeros in place of what is not finite.
            log_prior = opening.outlook.log_prior(ready.logits[:-1])
            yield Labels(torch.zeros_like(log_prior), log_prior, Fit(1.0, 1.0, 0), 0)
            continue
        yield solve(ready, opening.outlook, mechanism_of(view, ready))


def _affordable(view: ServerView, known: Knowledge) -> Settings:
    """The settings, with passes by the profile; under noise a size that is some per cent off decides nothing."""
    settings, steps = settings_of("labels", Settings), known.profile.steps
    return settings.model_copy(
        update={
            "passes": max(1, min(settings.passes, round(settings.passes * steps))),
            "sweeps": min(settings.sweeps, round(settings.sweeps * steps)),
            "widenings": 1 if view.gradient_noise.sigma else settings.widenings,
        }
    )


def recover(
    name: str, view: ServerView, known: Knowledge, tick: Tick, solve: Solve, read: Read | None = None
) -> Recovered:
    """Attack every sequence that has a gradient: token t + 1 from row t of the gradient.

    Args:
        read: turns what was found of a sequence into its tokens 1, 2, ...; by default the likeliest at each row.
    """
    start = time.perf_counter()
    opening, unresolved = opening_for(view, known), 0
    tokens: list[tuple[int, ...]] = []
    for number, labels in enumerate(solved(view, known, opening, solve)):
        if labels is None:
            tokens.append((-1,) * len(view.sightings[number].rows))
            unresolved += len(tokens[-1])
            continue
        found = tuple(labels.best) if read is None else read(opening, labels)
        tokens.append((-1, *found))
        unresolved += labels.unresolved
        tick(number + 1, len(view.sightings))
    return Recovered(
        attack=name, keys=tuple(seen.key for seen in view.sightings), tokens=tuple(tokens), first=1,
        unresolved=unresolved, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _gradient(seen: Sighting) -> Tensor:
    assert seen.gradient is not None
    return torch.from_numpy(seen.gradient.copy())


def _closed_blocked(view: ServerView, threat: Threat) -> str | None:
    if view.cut is not None and view.cut[1]:
        return "C has layers, which mix the labels of later positions into a row"
    return bare(view, threat)


ATTACKS = (
    Attack(
        "labels-closed", _closed_blocked,
        lambda view, known, tick: recover("labels-closed", view, known, tick, closed),
    ),
)  # fmt: skip
