"""The attacks of the family on one server view, in order of cost. Pure: a view and a model in, tokens out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.config import AttackName, Profile, Search
from attacks.exchange import Progress, Recovered
from attacks.prior import Prior, public_sequences
from attacks.ridge import Inverter, Layer, fit
from attacks.view import Noise, PublicModel, ServerView, batches
from attacks.vocabulary import Scoring, decode
from securesplit.errors import InputError

Report = Callable[[Progress], None]

_PUBLIC_LENGTH = 48


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What is fitted before the traffic is looked at, and how much work may follow."""

    model: PublicModel
    prior: Prior
    inverter: Inverter
    layer: Layer
    profile: Profile
    search: Search


def learn(model: PublicModel, prior: Prior, view: ServerView, profile: Profile, search: Search) -> Knowledge:
    """Fit the inverter and the layer's statistics to public sequences as long as those that were released."""
    lengths = sorted(len(seen.rows) for seen in view.sightings)
    length = lengths[len(lengths) // 2] if lengths else _PUBLIC_LENGTH
    sequences = public_sequences(prior, profile.rows, length)
    inverter, layer = fit(model.front, model.embedding, sequences, view.noise, held_out=search.held_out)
    return Knowledge(model, prior, inverter, layer, profile, search)


def fitting(view: ServerView, wanted: Sequence[AttackName]) -> tuple[AttackName, ...]:
    """The attacks to run: those asked for, or all that can differ on this view.

    Without noise the posterior has nothing to weigh and equals the nearest neighbour.

    Raises:
        InputError: SS-1704 when averaging is asked for and no record has two fresh releases.
    """
    repeated = any(seen.releases > 1 for seen in view.sightings)
    if "averaged-map" in wanted and not repeated:
        raise InputError(
            "SS-1704",
            "there is nothing to average: every record has one fresh release",
            hint="Leave averaged-map out; repeats of memoised bytes tell the server nothing new.",
        )
    if wanted:
        return tuple(dict.fromkeys(wanted))
    if not view.noise.sigma:
        return ("ridge", "vocabulary-nn")
    return ("ridge", "vocabulary-nn", "vocabulary-map", *(("averaged-map",) if repeated else ()))


def run(name: AttackName, view: ServerView, known: Knowledge, report: Report) -> Recovered:
    """Run one attack on every sighting.

    Returns:
        Tokens for every row, padding included: the true lengths are not public.
    """
    start = time.perf_counter()
    linked = name == "averaged-map"
    total = sum(len(seen.rows) for seen in view.sightings)
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        report(Progress(attack=name, done=done, total=total))

    tokens: dict[int, tuple[int, ...]] = {}
    model, profile = known.model, known.profile
    unresolved, budget = 0, profile.budget
    for indices, rows in batches(view, linked=linked):
        noise = view.noise.averaged(view.sightings[indices[0]].releases) if linked else view.noise
        if name == "ridge":
            found = invert(known, rows)
            tick(rows.shape[0] * rows.shape[1])
        else:
            answer = decode(
                model.front, rows, known.inverter.propose, scoring(name, known, noise), known.search,
                vocabulary=len(model.embedding), budget=budget,
                candidates=profile.candidates if noise.sigma else None, progress=tick,
            )  # fmt: skip
            found, unresolved, budget = answer.tokens, unresolved + answer.unresolved, budget - answer.spent
        tokens.update(zip(indices, map(tuple, found.tolist()), strict=True))
    return Recovered(
        attack=name,
        keys=tuple(seen.key for seen in view.sightings),
        tokens=tuple(tokens[i] for i in range(len(view.sightings))),
        unresolved=unresolved,
        seconds=time.perf_counter() - start,
    )


def scoring(name: AttackName, known: Knowledge, noise: Noise) -> Scoring:
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
