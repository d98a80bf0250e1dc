"""What the trained model remembers: a planted canary among its siblings, and pieces that identify somebody (O6).

A canary is rated like every candidate; which one was planted, only the scorer knows, who turns ranks into bits of exposure
(attacks/exposure.py). Scores are of whole strings, not means per token: siblings have one format, and the exposure is
defined on the probability of the string.
"""

from __future__ import annotations

import time
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.exchange import Extracted, Rated
from attacks.extraction import Sampling, ordinary_words, prompts_of, ranked, write
from attacks.knowledge import Knowledge
from attacks.perplexity import encoded, longest, under
from attacks.threat import Threat
from attacks.view import ServerView

__all__ = ["ATTACKS"]


class Settings(BaseModel):
    """configs/canary.toml, which explains each value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    prompts: Annotated[tuple[str, ...], Field(strict=False)]
    openings: Annotated[int, Field(ge=0)]
    opening: Annotated[int, Field(ge=1)]
    samples: Annotated[int, Field(ge=0)]
    tokens: Annotated[int, Field(ge=1)]
    top: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(gt=0)]
    most: Annotated[int, Field(ge=1)]


def _trained(view: ServerView, _: Threat) -> str | None:
    if not view.trained:
        return "no trained model is at hand"
    return "the job learns classes, and the model does not write" if view.classes else None


def _canary(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Rated:
    start = time.perf_counter()
    assert known.model.trained is not None, "blocked without a trained model"
    assert known.model.whole is not None, "the worker always has the public model"
    sequences = encoded(known, known.candidates, longest(view))
    scores = [float(seen.log_probability.sum()) for seen in under(known.model.trained, sequences)]
    tick(1, 2)
    if name == "canary-reference":
        before = under(known.model.whole, sequences)
        scores = [a - float(b.log_probability.sum()) for a, b in zip(scores, before, strict=True)]
    tick(2, 2)
    return Rated(attack=name, scores=tuple(scores), seconds=time.perf_counter() - start)


def _extraction(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Extracted:
    start = time.perf_counter()
    settings, model = settings_of("canary", Settings), known.model
    assert model.trained is not None, "blocked without a trained model"
    assert model.whole is not None, "the worker always has the public model"
    assert model.encode is not None, "the worker always has the public tokenizer"
    assert model.decode is not None, "the worker always has the public tokenizer"
    sampling = Sampling(
        count=round(settings.samples * known.profile.steps), tokens=min(settings.tokens, longest(view)),
        top=settings.top, temperature=settings.temperature, seed=known.seed,
    )  # fmt: skip
    prompts = prompts_of(
        known.prior.texts, settings.openings, settings.opening, [model.encode(text) for text in settings.prompts]
    )
    trained = model.trained()
    written: list[tuple[int, ...]] = []
    for number, prompt in enumerate(prompts):
        written += write(trained, prompt, sampling, number)
        tick(number + 1, len(prompts) + 1)
    public = tuple(model.decode(text) for text in known.prior.texts)
    spans = ranked(trained, model.whole(), tuple(dict.fromkeys(written)), model.decode, public, ordinary_words(public))
    tick(len(prompts) + 1, len(prompts) + 1)
    return Extracted(attack=name, spans=spans[: settings.most], seconds=time.perf_counter() - start)


ATTACKS = (
    Attack("canary", _trained, lambda view, known, tick: _canary("canary", view, known, tick)),
    Attack("canary-reference", _trained, lambda view, known, tick: _canary("canary-reference", view, known, tick)),
    Attack("pii-extraction", _trained, lambda view, known, tick: _extraction("pii-extraction", view, known, tick)),
)
