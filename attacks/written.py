"""Labels from noised gradients that read as a text (O3): labels.py's likelihoods in a beam search with a language model.

labels-lm   any cut, where gradients are noised; without noise the likelihood alone names every label
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.consistent import Shares, beam, predicted, shares_for
from attacks.exchange import Recovered
from attacks.head import Around
from attacks.knowledge import Knowledge
from attacks.labels import Labels, Opening, bare, recover, solved
from attacks.leftward import leftward
from attacks.outputs import simulated
from attacks.prepared import Settings
from attacks.threat import Threat
from attacks.view import ServerView

__all__ = ["ATTACKS"]

_PUBLIC = 4  # Public texts that the attack is tried on first.


def _blocked(view: ServerView, threat: Threat) -> str | None:
    if not view.gradient_noise.sigma:
        return "no noise is on the gradients: the likelihood alone names every label"
    return bare(view, threat)


def _run(view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    width = settings_of("labels", Settings).beam
    whole, sentinel = known.model.whole, known.model.sentinel
    shares: Shares | None = None

    def read(opening: Opening, labels: Labels) -> tuple[int, ...]:
        nonlocal shares
        if whole is None or sentinel is None:
            return tuple(labels.best)
        if shares is None:
            shares = _shares(view, known, opening, labels.found.scale)
        return beam(whole(), labels.log_likelihood, labels.log_prior, shares, sentinel=sentinel, width=width)

    return recover("labels-lm", view, known, tick, leftward, read)


def _shares(view: ServerView, known: Knowledge, opening: Opening, scale: float) -> Shares:
    """How far to trust the text found so far: public text is put through both noises, attacked, and read.

    Args:
        scale: of a victim's gradient, so that the noise is as large beside the public ones.
    """
    texts = opening.texts[:_PUBLIC]
    if known.model.middle is None or known.model.whole is None or not len(texts):
        return Shares(0.5, 0.5)
    generator = torch.Generator().manual_seed(known.seed)
    hidden, own, guesses, played = simulated(view, known, texts), [], texts.clone(), []
    for states, text in zip(hidden, texts, strict=True):
        around = Around(opening.head, states)
        chance = torch.softmax(opening.head.logits(around.states)[:-1].float(), 1)
        chance[torch.arange(len(chance)), text[1:]] -= 1
        at_head = torch.cat([chance @ opening.head.weight, torch.zeros(1, states.shape[1])])
        noise = view.gradient_noise.sigma * torch.randn(states.shape, generator=generator)
        played.append(
            replace(
                view.sightings[0],
                output=states.numpy(),
                gradient=(scale * around.pull(at_head) + noise).detach().numpy(),
            )
        )
    for number, labels in enumerate(solved(replace(view, sightings=tuple(played)), known, opening, leftward)):
        assert labels is not None
        guesses[number, 1:] = torch.tensor(labels.best)
        own.append(labels.log_prior.gather(1, texts[number, 1:, None])[:, 0])
    return shares_for(torch.cat(own), predicted(known.model.whole(), texts, guesses, known.model.sentinel))


ATTACKS = (Attack("labels-lm", _blocked, _run),)
