"""Membership: was this text trained on? Six scores per candidate text, higher for yes; the scorer makes the curve (O6).

All compare *mean* log-probabilities per token, so that the length of a text does not decide. What they cannot do: they
say nothing of texts of fewer than two tokens, which get the median score; and where members and candidates that were
never seen differ in kind, a score that is not calibrated by the public model tells kinds apart and not membership.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.exchange import Rated
from attacks.knowledge import Knowledge
from attacks.perplexity import Likelihood, Numbers, Sequences, encoded, likelihoods, longest, under
from attacks.shadows import Recipe, recipe_of, shadow_models
from attacks.threat import Threat
from attacks.view import ServerView

__all__ = ["ATTACKS", "confidence", "lira", "lowest_mean", "place_means"]


class Settings(BaseModel):
    """configs/membership.toml, which explains each value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    lowest: Annotated[int, Field(ge=1, le=100)]
    calibration: Annotated[int, Field(ge=1)]
    shadows: Annotated[int, Field(ge=2)]
    rank: Annotated[int, Field(ge=1)]
    scale: Annotated[float, Field(gt=0)]
    samples: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1)]
    rate: Annotated[float, Field(gt=0)]
    shrink: Annotated[float, Field(ge=0)]


def _settings() -> Settings:
    return settings_of("membership", Settings)


def _trained(view: ServerView, _: Threat) -> str | None:
    if not view.trained:
        return "no trained model is at hand"
    return "the job learns classes, and a text's likelihood says little of them" if view.classes else None


def _with_text(view: ServerView, threat: Threat) -> str | None:
    if threat.text == "none":
        return "shadow models need public text, and the threat model grants none"
    return _trained(view, threat)


def _rated(name: str, view: ServerView, known: Knowledge, tick: Tick, score: Callable[[Sequences], Numbers]) -> Rated:
    """Score the candidates; whoever has fewer than two tokens gets the median, which says nothing."""
    start = time.perf_counter()
    sequences = encoded(known, known.candidates, longest(view))
    usable = [i for i, ids in enumerate(sequences) if len(ids) > 1]
    values = score(tuple(sequences[i] for i in usable)) if usable else np.zeros(0)
    scores = np.full(len(sequences), float(np.median(values)) if usable else 0.0)
    scores[usable] = values
    tick(1, 1)
    return Rated(attack=name, scores=tuple(map(float, scores)), seconds=time.perf_counter() - start)


def place_means(seen: Sequence[Likelihood], count: int) -> Numbers:
    """Mean log-probability by place, (count,), from public texts: bands of places that double in width, for steadiness.

    Places beyond the public texts take the last band's mean; without any text all are 0.
    """
    bands = np.floor(np.log2(np.arange(1, count + 1))).astype(int)
    means, last = np.zeros(count), 0.0
    for band in range(int(bands[-1]) + 1 if count else 0):
        low, high = 2**band - 1, 2 ** (band + 1) - 1
        values = np.concatenate([s.log_probability[low:high] for s in seen] or [np.zeros(0)])
        last = float(values.mean()) if len(values) else last
        means[bands == band] = last
    return means


def lowest_mean(values: Numbers, percent: int) -> float:
    """Mean of the lowest so many per cent of some numbers, of one at least."""
    return float(np.sort(values)[: max(1, len(values) * percent // 100)].mean())


def confidence(seen: Likelihood) -> float:
    """Logit-scaled confidence ``log(p / (1 - p))`` of a text, p the geometric mean of its tokens' probabilities."""
    log_p = min(float(seen.log_probability.mean()), -1e-12)
    return log_p - float(np.log(-np.expm1(log_p)))


def lira(own: Numbers, out: Numbers, shrink: float) -> Numbers:
    """Offline LiRA: deviations of each confidence above those of models that never saw the text (Carlini et al. 2022, 6.1).

    Args:
        own: (N,) confidences under the trained model. out: (M, N) under M shadow models, M >= 2.
        shrink: pseudo-shadows that the common variance counts for; each candidate's own counts for M - 1.
    """
    variance, degrees = out.var(axis=0, ddof=1), len(out) - 1
    shrunk = (degrees * variance + shrink * variance.mean()) / (degrees + shrink)
    return np.asarray((own - out.mean(axis=0)) / np.sqrt(shrunk + 1e-12))


def _loss(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Rated:
    trained, limit = _loader(known), longest(view)
    # A place's ease is the trained model's, measured on texts that are certainly no members.
    texts = tuple(text[:limit] for text in known.prior.texts if len(text) > 1)[: _settings().calibration]

    def score(sequences: Sequences) -> Numbers:
        means = place_means(under(trained, texts) if texts else (), limit)
        seen = under(trained, sequences)
        return np.array([float((s.log_probability - means[: len(s.log_probability)]).mean()) for s in seen])

    return _rated(name, view, known, tick, score)


def _reference(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Rated:
    trained, public = _loader(known), known.model.whole
    assert public is not None, "the worker always has the public model"

    def score(sequences: Sequences) -> Numbers:
        pairs = zip(under(trained, sequences), under(public, sequences), strict=True)
        return np.array([float((a.log_probability - b.log_probability).mean()) for a, b in pairs])

    return _rated(name, view, known, tick, score)


def _mink(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Rated:
    percent, plus = _settings().lowest, name.endswith("plus")

    def of(seen: Likelihood) -> Numbers:
        return (seen.log_probability - seen.mean) / (seen.deviation + 1e-6) if plus else seen.log_probability

    return _rated(
        name, view, known, tick,
        lambda sequences: np.array([lowest_mean(of(s), percent) for s in under(_loader(known), sequences)]),
    )  # fmt: skip


def _zlib(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Rated:
    encode = known.model.encode
    assert encode is not None, "an attack on the trained model is blocked without a tokenizer"
    limit = longest(view)
    # In the order of the texts that are scored: those of at least two tokens.
    lengths = [len(encode(text)) for text in known.candidates]
    sizes = np.array([
        len(zlib.compress(text.encode())) * min(1.0, limit / n)
        for text, n in zip(known.candidates, lengths, strict=True) if min(n, limit) > 1
    ])  # fmt: skip
    return _rated(
        name, view, known, tick,
        lambda sequences: np.array([float(s.log_probability.sum()) for s in under(_loader(known), sequences)]) / sizes,
    )  # fmt: skip


def _lira(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Rated:
    settings = _settings()
    base = Recipe(
        rank=settings.rank, scale=settings.scale, targets=(), samples=settings.samples, batch=settings.batch,
        steps=max(1, round(settings.steps * known.profile.steps)), rate=settings.rate, moved=None, limit=longest(view),
    )  # fmt: skip
    public = known.model.whole
    assert public is not None, "the worker always has the public model"
    recipe = recipe_of(_loader(known)(), public(), view, base)

    def score(sequences: Sequences) -> Numbers:
        own = np.array([confidence(s) for s in under(_loader(known), sequences)])
        out = []
        for model in shadow_models(known, recipe, settings.shadows, exclude=frozenset(sequences)):
            out.append([confidence(s) for s in likelihoods(model, sequences)])
            tick(len(out), settings.shadows + 1)
        if not out:  # Without public text the public model is the one that never saw the candidate.
            return np.asarray(own - np.array([confidence(s) for s in under(public, sequences)]))
        return lira(own, np.array(out), settings.shrink)

    return _rated(name, view, known, tick, score)


def _loader(known: Knowledge) -> Callable[[], object]:
    assert known.model.trained is not None, "blocked without a trained model"
    return known.model.trained


_Run = Callable[[str, ServerView, Knowledge, Tick], Rated]


def _attack(name: str, run: _Run, blocked: Callable[[ServerView, Threat], str | None] = _trained) -> Attack:
    return Attack(name, blocked, lambda view, known, tick: run(name, view, known, tick))


ATTACKS = (
    _attack("membership-loss", _loss),
    _attack("membership-reference", _reference),
    _attack("membership-mink", _mink),
    _attack("membership-mink-plus", _mink),
    _attack("membership-zlib", _zlib),
    _attack("membership-lira", _lira, _with_text),
)
