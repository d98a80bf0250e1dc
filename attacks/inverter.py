"""The learned inverter: which token is behind each row, at the noise of the run, from public weights and public text.

    rehearse the clients on public text -> measure the mean row of every token -> fit a discriminant at the run's noise
    -> where tokens stay open, let the public language model put its findings into sentences, or train a network on the
       rows around each one; whichever names more held-out tokens

Nothing proves a guess by a forward pass, as vocabulary matching does; so it costs next to nothing per row, and a wrong
guess misleads no later one. Every choice is made on held-out public rows with fresh noise.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.codebook import Codebook, codebook_of
from attacks.config import settings_of
from attacks.discriminant import Discriminant, fit_discriminant
from attacks.ear import Ear, EarSettings, train_ear
from attacks.exchange import Recovered
from attacks.knowledge import Knowledge
from attacks.listening import heard
from attacks.rehearsal import Rehearsal, rehearse, released, windows
from attacks.threat import Threat
from attacks.view import ServerView, batches

__all__ = ["ATTACKS", "Inverted", "Settings", "Study", "better", "fitted", "study_of"]

# Public text and public weights are studied once, whatever the run's seed.
_SEED = 20261123


class Settings(BaseModel):
    """Numbers of inverter.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    runs: Annotated[float, Field(gt=0)]
    shares: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)]
    listened: Annotated[int, Field(ge=1)]
    plain: Annotated[float, Field(gt=0, le=1)]
    ear: EarSettings


@dataclass(frozen=True, slots=True)
class Study:
    """What is learnt of the cut before any noise: public rows, a fifth of them held out, and the codebook."""

    train: Rehearsal
    test: Rehearsal
    codebook: Codebook


@dataclass(frozen=True, slots=True)
class Inverted:
    """An inverter, fitted at a noise.

    Attributes:
        reader: the discriminant.
        ear: a network that corrects it from neighbouring rows; None where it is not used.
        model: the public language model, used with ``share``; None where it is not used.
        sentinel: what the language model reads before a text.
        share: of the unigram in its expectation.
    """

    reader: Discriminant
    ear: Ear | None = None
    model: Any = None
    sentinel: int = 0
    share: float = 1.0

    @property
    def form(self) -> str:
        """Which form it is, in a word."""
        return "language model" if self.model is not None else "ear" if self.ear is not None else "reader"

    def tokens(self, rows: Tensor, tick: Callable[[int], None] | None = None) -> Tensor:
        """(N, T, D) released rows to (N, T) tokens; ``tick`` is told how many positions are done."""
        if self.model is not None:
            return heard(self.model, self.sentinel, self.reader, rows, share=self.share, tick=tick)
        with torch.inference_mode():
            found = self.reader.tokens(rows) if self.ear is None else self.ear.tokens(rows)
        if tick is not None:
            tick(found.numel())
        return found


_latest: list[tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple[object, ...], Study]] = []


def study_of(known: Knowledge) -> Study:
    """Study the cut; the latest study is kept, because several attacks of a run, and its repeats, ask for the same."""
    embedding, prior = known.model.embedding, known.prior.log_probability
    rest = (id(known.model.front), known.length, known.profile.rows, known.noise.clip)
    for kept_embedding, kept_prior, kept_rest, study in _latest:
        if kept_embedding() is embedding and kept_prior() is prior and kept_rest == rest:
            return study
    _latest.clear()
    settings = settings_of("inverter", Settings)
    generator = torch.Generator().manual_seed(_SEED)
    public = windows(known.prior, known.profile.rows, known.length, generator)
    train, test = rehearse(known.model.front, public, known.noise)
    book = codebook_of(
        known.model.front, embedding, train.tokens, known.prior.favourites,
        round(settings.runs * min(1.0, 2 * known.profile.steps) * known.profile.rows), generator,
    )  # fmt: skip
    study = Study(train=train, test=test, codebook=book)
    _latest.append((weakref.ref(embedding), weakref.ref(prior), rest, study))
    return study


def fitted(known: Knowledge, sigma: float) -> Inverted:
    """The inverter at a noise of ``sigma`` per coordinate, as released.

    Under a profile for which slow attacks are left out it is the discriminant alone.
    """
    settings, study = settings_of("inverter", Settings), study_of(known)
    generator = torch.Generator().manual_seed(_SEED + 1 + known.seed)
    log_prior = known.prior.log_probability
    reader = fit_discriminant(study.codebook, study.train, study.test, log_prior, sigma, generator)
    best = Inverted(reader)
    if reader.hits >= settings.plain or not known.profile.slow:
        return best
    held_out = study.test.part(0, settings.listened)
    rows, truth = released(held_out.rows, sigma, generator), held_out.tokens
    if known.model.whole is not None and known.model.sentinel is not None:
        model, sentinel = known.model.whole(), known.model.sentinel
        forms = [Inverted(reader, model=model, sentinel=sentinel, share=share) for share in settings.shares]
        best = better([best, *forms], rows, truth)
        # Where the language model helps, a network that has read a few public pages has nothing to add.
        if best.model is not None:
            return best
    ear = train_ear(
        reader, known.model.embedding, study.train, study.test, sigma, settings.ear, steps=known.profile.steps,
        seed=known.seed,
    )  # fmt: skip
    return better([best, Inverted(reader, ear=ear)], rows, truth)


def better(forms: Sequence[Inverted], rows: Tensor, truth: Tensor) -> Inverted:
    """The form that names most of the held-out rows, where it is better than those before by more than chance would be.

    Args:
        forms: to choose among, the simplest first.
        rows: (N, T, D) held-out rows with the noise on; truth: (N, T).
    """
    best, hits = forms[0], forms[0].tokens(rows) == truth
    for form in forms[1:]:
        others = form.tokens(rows) == truth
        won, lost = int((others & ~hits).sum()), int((hits & ~others).sum())
        # One standard error of the difference, on the same rows.
        if won - lost > math.sqrt(won + lost):
            best, hits = form, others
    return best


def _blocked(view: ServerView, _: Threat) -> str | None:
    return None if view.sightings else "the recording holds none of the wanted sequences"


def _run(view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    start = time.perf_counter()
    total, done = sum(len(seen.rows) for seen in view.sightings), 0

    def more(count: int) -> None:
        nonlocal done
        tick(done := done + count, total)

    inverter = fitted(known, view.noise.sigma)
    found: dict[int, tuple[int, ...]] = {}
    for indices, rows in batches(view, linked=False):
        found.update(zip(indices, map(tuple, inverter.tokens(rows, more).tolist()), strict=True))
    return Recovered(
        attack="inverter", keys=tuple(seen.key for seen in view.sightings),
        tokens=tuple(found[i] for i in range(len(view.sightings))), seconds=time.perf_counter() - start,
    )  # fmt: skip


ATTACKS = (Attack("inverter", _blocked, _run),)
