"""The vocabulary family as the suite runs it: ridge, nearest neighbour, posterior, and the average of fresh releases."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.certify import proofs
from attacks.exchange import Proven, Recovered
from attacks.knowledge import Knowledge
from attacks.shortlist import proposals
from attacks.threat import Threat
from attacks.view import Noise, ServerView, batches
from attacks.vocabulary import Scoring, decode

__all__ = ["ATTACKS", "invert", "scoring"]

# Positions to prove, at a profile's step factor of 1: each asks for the state of every token of the vocabulary.
_PROOFS = 4


def _any(view: ServerView, _: Threat) -> str | None:
    return None if view.sightings else "the recording holds none of the wanted sequences"


def _noised(view: ServerView, threat: Threat) -> str | None:
    """Without noise the posterior has nothing to weigh and equals the nearest neighbour."""
    return _any(view, threat) if view.noise.sigma else "there is no noise: the posterior equals the nearest neighbour"


def _repeated(view: ServerView, threat: Threat) -> str | None:
    if threat.releases < 2:
        return "the threat model grants one release"
    if not any(seen.releases > 1 for seen in view.sightings):
        return "there is nothing to average: every record has one fresh release"
    return _noised(view, threat)


def _ridge(view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    start = time.perf_counter()
    total, done = _positions(view), 0
    tokens: dict[int, tuple[int, ...]] = {}
    with torch.inference_mode():
        for indices, rows in batches(view, linked=False):
            tokens.update(zip(indices, map(tuple, invert(known, rows).tolist()), strict=True))
            tick(done := done + rows.shape[0] * rows.shape[1], total)
    return _recovered("ridge", view, tokens, start)


def _match(name: str, view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    """Tokens for every row, padding included: the true lengths are not public."""
    start = time.perf_counter()
    linked, total, done = name == "averaged-map", _positions(view), 0

    def more(count: int) -> None:
        nonlocal done
        tick(done := done + count, total)

    tokens: dict[int, tuple[int, ...]] = {}
    unresolved, budget = 0, known.profile.budget
    for indices, rows in batches(view, linked=linked):
        releases = view.sightings[indices[0]].releases if linked else 1
        noise = view.noise.averaged(releases)
        rule = replace(scoring(name, known, noise), codec=view.codec, releases=releases)
        answer = decode(
            known.model.front, rows, proposals(known, noise.sigma), rule, known.search, vocabulary=known.vocabulary,
            budget=budget, candidates=known.profile.candidates if noise.sigma else None, progress=more,
            estimate=known.inverter.estimate,
        )  # fmt: skip
        unresolved, budget = unresolved + answer.unresolved, budget - answer.spent
        tokens.update(zip(indices, map(tuple, answer.tokens.tolist()), strict=True))
    found = _recovered(name, view, tokens, start, unresolved=unresolved)
    return found if view.noise.sigma else found.model_copy(update={"certified": _proven(view, known, tokens)})


def _proven(view: ServerView, known: Knowledge, tokens: dict[int, tuple[int, ...]]) -> Proven:
    """How many of a sample of noiseless positions are proved; the time of it is not the attack's."""
    most = max(1, round(_PROOFS * known.profile.steps))
    indices, rows = max(batches(view, linked=False), key=lambda batch: batch[1][..., 0].numel())
    if view.noise.clip is not None:  # The clipping factor is not known exactly, and a proof needs it.
        return Proven(tried=0, proven=0, radius=None)
    found = proofs(
        known.model.front, rows, torch.tensor([tokens[i] for i in indices]), codec=view.codec,
        vocabulary=known.vocabulary, most=most,
    )  # fmt: skip
    return Proven(tried=len(found), proven=sum(p.proven for p in found), radius=min(p.radius for p in found))


def _recovered(
    name: str, view: ServerView, tokens: dict[int, tuple[int, ...]], start: float, *, unresolved: int = 0
) -> Recovered:
    return Recovered(
        attack=name, keys=tuple(seen.key for seen in view.sightings), unresolved=unresolved,
        tokens=tuple(tokens[i] for i in range(len(view.sightings))), seconds=time.perf_counter() - start,
    )  # fmt: skip


def _positions(view: ServerView) -> int:
    return sum(len(seen.rows) for seen in view.sightings)


def scoring(name: str, known: Knowledge, noise: Noise) -> Scoring:
    """How an attack of the family compares candidates.

    Without the posterior the favourites of the prior are still tried where there is noise: both then choose among the
    same candidates, and the difference between them is the scoring alone.
    """
    posterior = name in {"vocabulary-map", "averaged-map"} and noise.sigma > 0
    return Scoring(
        sigma=noise.sigma,
        layer=known.layer,
        log_prior=known.prior.log_probability if posterior else None,
        favourites=known.prior.favourites[: known.profile.candidates if noise.sigma else 0],
    )


def invert(known: Knowledge, rows: Tensor) -> Tensor:
    """The ridge inverter's first choice for every row: (N, T, D) to (N, T)."""
    estimate = rows / known.layer.factor
    count, length, width = rows.shape
    first = known.inverter.propose(estimate[:, 0], 0, 1)
    if length == 1:
        return first
    later = known.inverter.propose(estimate[:, 1:].reshape(-1, width), 1, 1).view(count, length - 1)
    return torch.cat((first, later), dim=1)


ATTACKS = (
    Attack("ridge", _any, _ridge),
    Attack("vocabulary-nn", _any, lambda view, known, tick: _match("vocabulary-nn", view, known, tick)),
    Attack("vocabulary-map", _noised, lambda view, known, tick: _match("vocabulary-map", view, known, tick)),
    Attack("averaged-map", _repeated, lambda view, known, tick: _match("averaged-map", view, known, tick)),
)
