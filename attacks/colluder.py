"""A client who sides with the server: its text beside what it sent teaches the server what the other clients' rows mean.

What a colluder adds to public weights is what the weights do not say: how the clients' adapters have moved the rows, how
rows vary on this very text, and which words are common in it. So the inverter of public weights is adapted: its mean rows by
a linear map, held near the identity while the pairs are few, its covariance by that of the colluder's own rows, noise
included as released, its prior by the colluder's words. What the adaption is worth is tried on pairs that were held out, and
without worth it is not used.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.discriminant import Discriminant, Scorer, calibrated, gaussian_scorer, variation_of
from attacks.exchange import Recovered
from attacks.inverter import Inverted, Study, fitted, study_of
from attacks.knowledge import Knowledge, Pair
from attacks.threat import Threat
from attacks.view import Key, ServerView, batches

__all__ = ["ATTACKS", "Settings", "Taught", "adapted", "taught"]


class Settings(BaseModel):
    """Numbers of seed_decoder.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    held_out: Annotated[float, Field(gt=0, lt=1)]
    ties: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, strict=False)]
    words: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class Taught:
    """Rows of a colluder, apart from position 0, with their tokens: (N, D) as released, and (N,)."""

    rows: Tensor
    tokens: Tensor


def taught(view: ServerView, pairs: tuple[Pair, ...]) -> Taught | None:
    """What the traffic holds of the colluder's sequences; None when it holds nothing."""
    wanted = {pair.key: pair.tokens for pair in pairs}
    victims: set[Key] = {seen.key for seen in view.sightings}
    rows, tokens = [], []
    for seen in view.traffic:
        told = wanted.get(seen.key, ())
        # A victim's own text is never a lesson, whatever the task says.
        if len(told) > 1 and seen.key not in victims:
            end = min(len(told), len(seen.rows))
            rows.append(torch.from_numpy(seen.rows[1:end].copy()))
            tokens.append(torch.tensor(told[1:end]))
    return Taught(torch.cat(rows), torch.cat(tokens)) if rows else None


@torch.no_grad()
def adapted(public: Discriminant, study: Study, lesson: Taught, sigma: float, settings: Settings) -> Discriminant:
    """The public reader, adapted to a colluder's rows as far as that names more of its held-out rows.

    Args:
        public: the inverter of public weights at this noise.
        study: of the cut.
        lesson: the colluder's rows; the last part is held out.
        sigma: noise per coordinate, as released.
        settings: of the file.
    """
    vocabulary, factor = len(public.log_prior), public.factor
    cut = len(lesson.tokens) - max(1, round(settings.held_out * len(lesson.tokens)))
    train = Taught(lesson.rows[:cut] / factor, lesson.tokens[:cut])
    test = Taught(lesson.rows[cut:] / factor, lesson.tokens[cut:])
    share = cut / (cut + settings.words)
    counts = torch.bincount(train.tokens, minlength=vocabulary).float()
    prior = ((1 - share) * public.log_prior.softmax(-1) + share * counts / counts.sum().clamp_min(1)).log()
    book = study.codebook
    means = book.linear + book.offset
    clean = study.train.rows[:, 1:].flatten(0, 1) / factor
    _, within = variation_of(means, study.train.tokens[:, 1:].flatten(), clean)
    within += (sigma / factor) ** 2 * torch.eye(len(within), dtype=torch.float64)
    candidates: list[Scorer] = [public.later]
    if cut > 1:
        candidates += [_moved(means, train, within, tie) for tie in settings.ties]
    best, record = public, (-1.0, 0.0)
    for scorer in candidates:
        belief, trust, hits, loss = calibrated(scorer, test.rows, test.tokens, prior)
        if (hits, -loss) > record:
            record = hits, -loss
            form = public.form if scorer is public.later else "adapted"
            best = replace(
                public, later=scorer, belief=belief, trust=trust, log_prior=prior, form=form, hits=hits
            )  # fmt: skip
    return best


def _moved(means: Tensor, train: Taught, within: Tensor, tie: float) -> Scorer:
    """Mean rows under the map of least squares, tied to the identity, with the covariance of the colluder's rows mixed in."""
    inputs = means[train.tokens]
    middle_in, middle_out = inputs.mean(0), train.rows.mean(0)
    X, Y = (inputs - middle_in).double(), (train.rows - middle_out).double()
    gram, identity = X.T @ X, torch.eye(X.shape[1], dtype=torch.float64)
    # The tie counts in noise: a direction is moved as far as its signal stands out from the variation.
    penalty = tie * float(within.diagonal().median()) / (float(gram.diagonal().mean()) / len(X) + 1e-12)
    penalty = penalty * float(gram.diagonal().mean()) + 1e-12
    change = torch.linalg.solve(gram + penalty * identity, X.T @ (Y - X)).float()
    mapped = means - middle_in + (means - middle_in) @ change + middle_out
    shift, own = variation_of(mapped, train.tokens, train.rows)
    share = len(X) / (len(X) + 2 * X.shape[1])
    return gaussian_scorer(mapped + shift, middle_out + shift, share * own + (1 - share) * within)


def _blocked(view: ServerView, threat: Threat) -> str | None:
    if threat.text != "colluder":
        return "the threat model has no colluding client"
    if not view.traffic:
        return "the recording holds no traffic besides the wanted sequences"
    return None if view.sightings else "the recording holds none of the wanted sequences"


def _run(view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    start = time.perf_counter()
    total, done = sum(len(seen.rows) for seen in view.sightings), 0

    def more(count: int) -> None:
        nonlocal done
        tick(done := done + count, total)

    inverter: Inverted = fitted(known, view.noise.sigma)
    lesson = taught(view, known.colluder)
    if lesson is not None:
        reader = adapted(
            inverter.reader, study_of(known), lesson, view.noise.sigma, settings_of("seed_decoder", Settings)
        )
        # The network was trained to correct the other reader.
        inverter = replace(inverter, reader=reader, ear=None)
    found: dict[int, tuple[int, ...]] = {}
    for indices, rows in batches(view, linked=False):
        found.update(zip(indices, map(tuple, inverter.tokens(rows, more).tolist()), strict=True))
    return Recovered(
        attack="colluder", keys=tuple(seen.key for seen in view.sightings),
        tokens=tuple(found[i] for i in range(len(view.sightings))), seconds=time.perf_counter() - start,
    )  # fmt: skip


ATTACKS = (Attack("colluder", _blocked, _run),)
