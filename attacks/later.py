"""Recovering a token from the rows *after* it, its own row dropped.

Behind attention a token is released as often as there are rows from it on. At an embedding cut later rows hold nothing of
it, all candidates explain them equally, and the prior alone decides.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.descend import Descent, descent_of
from attacks.exchange import Recovered
from attacks.knowledge import Knowledge
from attacks.likelihood import Errors, errors_of, log_evidence
from attacks.matching import scoring
from attacks.refine import forward_window
from attacks.threat import Threat
from attacks.view import Front, ServerView, batches
from attacks.vocabulary import Scoring, decode
from securesplit.model.parts import PartCache

__all__ = ["ATTACKS", "Settings", "from_later_rows"]

# Of a descent's end: so many nearest tokens, and as many by direction. Through attention the way is rougher than from a
# row of its own: smaller steps, more of them, and again from the best token so far.
_DESCENDED, _STEPS, _RATE = 128, 32, 0.15
_WIDER = (1024, 8192)
# Rounding of the forward passes as a part of a row's largest coordinate: what a noiseless comparison cannot resolve.
_FLOOR = 1e-5


class Settings(BaseModel):
    """configs/later.toml explains each number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    window: int = Field(ge=1)
    candidates: int = Field(ge=1)
    spoken: int = Field(ge=0)
    rounds: int = Field(ge=0)


@dataclass(slots=True)
class _Best:
    """(N,) each: the best token so far, its score, and whether it explains all the noiseless rows to rounding."""

    token: Tensor
    score: Tensor
    boxed: Tensor


class _Window:
    """The later rows of one position.

    Args:
        cache: of the prefixes. after: (N, L) the tokens that follow. rows: (N, L, D) their rows, and their errors.
        outside: (2, N) A and B of every other row but the position's own.
    """

    def __init__(
        self,
        front: Front,
        cache: PartCache,
        after: Tensor,
        rows: Tensor,
        errors: Errors,
        outside: Tensor,
        scoring: Scoring,
    ) -> None:
        self.front, self.cache, self.after, self.rows, self.errors = front, cache, after, rows, errors
        self.outside, self.scoring = outside, scoring
        floor = _FLOOR * rows.abs().amax(-1).double()
        self.precision = 1 / (errors.variance.double() + floor.square())

    def scores(self, who: Tensor, ids: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
        """Log posterior, up to a constant, of candidates (n, k) of the sequences ``who`` (n,); and whether boxed."""
        fed = torch.cat([ids[..., None], self.after[who, None].expand(-1, ids.shape[1], -1)], dim=2)
        states = forward_window(self.front, self.cache, who.repeat_interleave(ids.shape[1]), fed.flatten(0, 1))
        states = states[:, 1:].view(*ids.shape, *self.rows.shape[1:])
        rows, weight, layer = self.rows[who], self.precision[who, None], self.scoring.layer
        if not self.scoring.sigma:
            scaled = layer.factor * states
            misfit = (rows[:, None] - scaled).double().square().sum(-1)
            half, variance = self.errors.half[who], self.errors.variance[who]
            boxed = Errors(0.0, half, variance).boxed(rows, scaled.transpose(1, 2)).all(1)
            return log_prior[ids].double() - (misfit * weight).sum(-1) / 2, boxed
        cross = (torch.einsum("nld,nkld->nkl", rows.double(), states.double()) * weight).sum(-1)
        energy = (states.double().square().sum(-1) * weight).sum(-1)
        evidence = log_evidence(self.outside[0, who, None] + cross, self.outside[1, who, None] + energy, layer)
        return evidence + log_prior[ids].double(), torch.zeros_like(ids, dtype=torch.bool)

    def attempt(self, best: _Best, who: Tensor, ids: Tensor, log_prior: Tensor) -> None:
        """Try candidates (n, k) of the sequences ``who`` (n,) and keep the best."""
        score, boxed = self.scores(who, ids, log_prior)
        top = score.argmax(1, keepdim=True)
        won = score.gather(1, top)[:, 0] > best.score[who]
        best.token[who] = torch.where(won, ids.gather(1, top)[:, 0], best.token[who])
        best.score[who] = torch.where(won, score.gather(1, top)[:, 0], best.score[who])
        best.boxed[who] = torch.where(won, boxed.gather(1, top)[:, 0], best.boxed[who])

    def descended(self, guide: Descent, best: _Best, who: Tensor) -> Tensor:
        """Candidates (n, 256) that descent through the later rows ends next to."""
        factor = torch.full((len(who),), self.scoring.layer.factor)
        found = guide(
            self.cache, who, guide.table[best.token[who]], self.rows[who], factor, after=self.after[who], steps=_STEPS,
            rate=_RATE,
        )  # fmt: skip
        return torch.cat([guide.nearest(found, _DESCENDED), guide.aligned(found, _DESCENDED)], dim=1)


def from_later_rows(
    front: Front,
    rows: Tensor,
    base: Tensor,
    scoring: Scoring,
    log_prior: Tensor,
    settings: Settings,
    *,
    budget: int,
    spoken: Tensor | None = None,
) -> Tensor:
    """Name every token without its own row.

    Args:
        front: partition A with public weights.
        rows: (N, T, D), as received.
        base: (N, T), all tokens as recovered from their own rows; position t's own is never looked at for t.
        scoring: noise, statistics, codec; ``favourites`` ranks the whole vocabulary by the prior.
        log_prior: (V,).
        settings: of the family.
        budget: candidates, beyond the first and the descended, that a noiseless search may try in all.
        spoken: (N, T, k) what a language model expects at each position after the tokens before it; None for nothing.

    Returns:
        (N, T) tokens; the prior's favourite at the last position.
    """
    count, length = base.shape
    errors = errors_of(rows, scoring.sigma, scoring.codec, releases=scoring.releases)
    guide, cache, everyone = descent_of(front), front.new_cache(), torch.arange(count)
    tokens = torch.full_like(base, int(scoring.favourites[0]))
    with torch.inference_mode():
        sums = _sums(front, rows, base, errors) if scoring.sigma else torch.zeros(2, count, length)
        for t in range(length - 1):
            end = min(length, t + 1 + settings.window)
            here = Errors(errors.sigma, errors.half[:, t + 1 : end], errors.variance[:, t + 1 : end])
            outside = sums.sum(2) - sums[:, :, t:end].sum(2)
            window = _Window(front, cache, base[:, t + 1 : end], rows[:, t + 1 : end], here, outside, scoring)
            best = _Best(torch.full((count,), -1), torch.full((count,), -math.inf).double(), torch.zeros(count).bool())
            first = scoring.favourites[: settings.candidates].expand(count, -1)
            window.attempt(best, everyone, first if spoken is None else torch.cat([first, spoken[:, t]], 1), log_prior)
            for _ in range(settings.rounds if cache.past is not None and not _hopeless(scoring) else 0):
                open_ = (~best.boxed).nonzero()[:, 0]
                if guide is not None and len(open_):
                    window.attempt(best, open_, window.descended(guide, best, open_), log_prior)
            if not scoring.sigma:
                budget -= _widen(window, best, scoring.favourites, log_prior, settings.candidates, budget)
            tokens[:, t] = best.token
            front(base[:, t, None], cache=cache)
    return tokens


def _hopeless(scoring: Scoring) -> bool:
    """Whether the noise hides the spread of rows, of which a later row's trace of one token is a small part."""
    return scoring.layer.factor**2 * scoring.layer.spread_later <= scoring.sigma**2


def _sums(front: Front, rows: Tensor, base: Tensor, errors: Errors) -> Tensor:
    """A and B of every row, for the tokens that are recovered: (2, N, T) float64."""
    states = front(base).double()
    pair = torch.stack(((rows.double() * states).sum(-1), states.square().sum(-1)))
    return pair / errors.variance.double()


def _spoken(known: Knowledge, base: Tensor, most: int) -> Tensor | None:
    """What the public language model expects at each position, behind the sentinel: (N, T, k); None without one."""
    if known.model.whole is None or known.model.sentinel is None or not most:
        return None
    whole = known.model.whole()
    fed = torch.cat([torch.full_like(base[:, :1], known.model.sentinel), base[:, :-1]], dim=1)
    with torch.inference_mode():
        return torch.cat([whole(part).logits.topk(min(most, known.vocabulary)).indices for part in torch.split(fed, 4)])


def _widen(window: _Window, best: _Best, ranking: Tensor, log_prior: Tensor, done: int, budget: int) -> int:
    """Try more of the prior's ranking for sequences that nothing explains yet; what it cost."""
    spent = 0
    for rung in (*(r for r in _WIDER if done < r < len(ranking)), len(ranking)):
        open_ = (~best.boxed).nonzero()[:, 0]
        if not len(open_) or spent + len(open_) * (rung - done) > budget:
            break
        spent += len(open_) * (rung - done)
        for part in torch.split(ranking[done:rung], 1024):
            window.attempt(best, open_, part.expand(len(open_), -1), log_prior)
        done = rung
    return spent


def _run(view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    start, settings = time.perf_counter(), settings_of("later", Settings)
    total, done, budget = sum(len(seen.rows) for seen in view.sightings), 0, known.profile.budget
    tokens: dict[int, tuple[int, ...]] = {}
    for indices, rows in batches(view, linked=False):
        name = "vocabulary-map" if view.noise.sigma else "vocabulary-nn"
        how = replace(scoring(name, known, view.noise), codec=view.codec)
        base = decode(
            known.model.front, rows, known.inverter.propose, how, known.search, vocabulary=known.vocabulary,
            budget=known.profile.budget, candidates=known.profile.candidates if view.noise.sigma else None, estimate=known.inverter.estimate,
        ).tokens  # fmt: skip
        how = replace(how, favourites=known.prior.favourites)
        found = from_later_rows(
            known.model.front, rows, base, how, known.prior.log_probability, settings, budget=budget,
            spoken=_spoken(known, base, settings.spoken),
        )  # fmt: skip
        tokens.update(zip(indices, map(tuple, found.tolist()), strict=True))
        tick(done := done + found.numel(), total)
    return Recovered(
        attack="later-rows", keys=tuple(seen.key for seen in view.sightings),
        tokens=tuple(tokens[i] for i in range(len(view.sightings))), seconds=time.perf_counter() - start,
    )  # fmt: skip


def _blocked(view: ServerView, threat: Threat) -> str | None:
    del threat
    return None if view.sightings else "the recording holds none of the wanted sequences"


ATTACKS = (Attack("later-rows", _blocked, _run),)
