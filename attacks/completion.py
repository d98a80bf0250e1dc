"""What B's output foretells (O2): the public C on it names every next token, and needs no attack on the input.

    completion      C's likeliest next token at every row, with temperature and unigram fitted to the noise
    completion-lm   the same in a beam search with the public language model, so that the text agrees with itself

The server computed B's output itself; noise on the activations is all that protects it.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.consistent import Shares, beam, predicted, shares_for
from attacks.exchange import Recovered
from attacks.head import Head
from attacks.knowledge import Knowledge
from attacks.outputs import Outlook, outlook_for, public_texts, recorded_outputs, simulated
from attacks.threat import Threat
from attacks.view import ServerView

__all__ = ["ATTACKS", "language_shares"]


class Settings(BaseModel):
    """completion.toml explains each value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    texts: Annotated[int, Field(ge=0)]
    width: Annotated[int, Field(ge=1)]


def _blocked(view: ServerView, _: Threat) -> str | None:
    return None if view.sightings else "the recording holds none of the wanted sequences"


def _consistent_blocked(view: ServerView, threat: Threat) -> str | None:
    if not view.noise.sigma:
        return "there is no noise: C's own prediction is the language model's already"
    return _blocked(view, threat)


def _run(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    start = time.perf_counter()
    settings = settings_of("completion", Settings)
    assert known.model.back is not None
    head = Head(known.model.back())
    texts = public_texts(known, settings.texts)
    outlook = outlook_for(view, known, head, texts)
    lm = name == "completion-lm" and known.model.whole is not None and known.model.sentinel is not None
    shares = language_shares(view, known, head, outlook, texts) if lm else None
    tokens: list[tuple[int, ...]] = []
    unresolved = 0
    for number, output in enumerate(recorded_outputs(view, known)):
        if output is None or len(output) < 2:
            tokens.append((-1,) * len(view.sightings[number].rows))
            unresolved += len(tokens[-1])
            continue
        with torch.no_grad():
            log_prior = outlook.log_prior(head.logits(head.states(output[None])[0, :-1]))
        found = tuple(log_prior.argmax(1).tolist()) if shares is None else _read(known, log_prior, shares, settings)
        tokens.append((-1, *found))
        tick(number + 1, len(view.sightings))
    return Recovered(
        attack=name, keys=tuple(seen.key for seen in view.sightings), tokens=tuple(tokens), first=1,
        unresolved=unresolved, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _read(known: Knowledge, log_prior: Tensor, shares: Shares, settings: Settings) -> tuple[int, ...]:
    assert known.model.whole is not None
    assert known.model.sentinel is not None
    return beam(
        known.model.whole(), torch.zeros_like(log_prior), log_prior, shares, sentinel=known.model.sentinel,
        width=settings.width,
    )  # fmt: skip


def language_shares(view: ServerView, known: Knowledge, head: Head, outlook: Outlook, texts: Tensor) -> Shares:
    """How far to trust the text found so far, from public text under this run's noise; even shares without text.

    What is found of public text is what ``completion`` finds of it.
    """
    if known.model.middle is None or known.model.whole is None or not len(texts) or texts.shape[1] < 2:
        return Shares(0.5, 0.5)
    hidden, own, guesses = simulated(view, known, texts), [], texts.clone()
    for number, (states, text) in enumerate(zip(hidden, texts, strict=True)):
        with torch.no_grad():
            log_prior = outlook.log_prior(head.logits(head.states(states[None])[0, :-1]))
        guesses[number, 1:] = log_prior.argmax(1)
        own.append(log_prior.gather(1, text[1:, None])[:, 0])
    return shares_for(torch.cat(own), predicted(known.model.whole(), texts, guesses, known.model.sentinel))


ATTACKS = (
    Attack("completion", _blocked, lambda view, known, tick: _run("completion", view, known, tick)),
    Attack("completion-lm", _consistent_blocked, lambda view, known, tick: _run("completion-lm", view, known, tick)),
)
