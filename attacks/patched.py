"""Patched inversion (the form of PIDI): optimise the input a patch at a time, from left to right, through A.

    start from the ridge inverter -> for every patch: optimise its embeddings on its own rows, the patches before it
    being tokens already -> name tokens, each proved by a forward pass -> at the end all embeddings together

A is causal, so that a patch's rows depend on nothing after it. A long sequence becomes short problems, each of which
starts near its answer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Annotated, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.embedded import nearest, rows_of, table_of
from attacks.exchange import Recovered
from attacks.knowledge import Knowledge
from attacks.matching import invert
from attacks.threat import Threat
from attacks.view import ServerView, batches, fork
from securesplit.model.parts import Front, PartCache

__all__ = ["ATTACKS", "Settings"]


class Settings(BaseModel):
    """pidi.toml explains each value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    patch: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    joint: Annotated[int, Field(ge=0)]
    rate: Annotated[float, Field(gt=0)]
    candidates: Annotated[int, Field(ge=2)]
    starts: Annotated[int, Field(ge=1)]


def _blocked(view: ServerView, _: Threat) -> str | None:
    return None if view.sightings else "the recording holds none of the wanted sequences"


class _Inversion:
    """Some sequences of one length.

    Args:
        rows: (N, T, D), in the model's own units. sigma: of the noise in them.
    """

    def __init__(self, known: Knowledge, rows: Tensor, sigma: float, settings: Settings) -> None:
        self.known, self.rows, self.sigma, self.settings = known, rows, sigma, settings
        self.front = cast("Front", known.model.front)
        self.table = table_of(self.front)
        # A row is as important as any other, however long: the first one has many times the norm of the rest.
        spread = torch.full((rows.shape[1],), known.layer.spread_later)
        spread[0] = known.layer.spread_first
        self.spread = spread.clamp_min(1e-12)
        self.scale = float(self.table.square().mean().sqrt())
        self.steps = max(1, round(settings.steps * known.profile.steps))

    def optimised(self, embedded: Tensor, cache: PartCache, target: Tensor, spread: Tensor, steps: int) -> Tensor:
        """Move embeddings (N, n, E) until A makes the target's rows (N, n, D) of them, behind what the cache holds."""
        variable = embedded.clone().requires_grad_()
        rate = self.settings.rate * self.scale
        optimiser = torch.optim.Adam([variable], lr=rate)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = rate * (0.05 + 0.95 * math.cos(math.pi / 2 * step / steps))
            with torch.enable_grad():
                left = (rows_of(self.front, variable, cache) - target).square().sum(-1) / spread
                (variable.grad,) = torch.autograd.grad(left.sum(), variable)
            optimiser.step()
        return variable.detach()

    def named(self, embedded: Tensor, cache: PartCache, begin: int) -> tuple[Tensor, Tensor]:
        """Embeddings (N, n, E) to tokens (N, n), each the best of its neighbours by a forward pass; extends the cache.

        Without noise a token that does not explain its row is wrong: its place is optimised again by itself, behind the
        tokens that were found, from several starts.

        Returns:
            The tokens, and their rows' distances as a part of the public spread, (N, n).
        """
        chosen, distances = [], []
        everyone = torch.arange(len(self.rows))
        for place in range(embedded.shape[1]):
            position = begin + place
            near = nearest(self.table, embedded[:, place], self.settings.candidates)
            token, distance = self._best(near, cache, everyone, position)
            for starts in (self.settings.starts, 4 * self.settings.starts):
                lost = everyone[distance > self.known.search.exact] if not self.sigma else everyone[:0]
                if len(lost):
                    token[lost], distance[lost] = self._again(
                        token[lost], distance[lost], cache, lost, position, starts
                    )
            chosen.append(token)
            distances.append(distance)
            with torch.no_grad():
                self.front(token[:, None], cache=cache)
        return torch.stack(chosen, 1), torch.stack(distances, 1)

    def _best(self, near: Tensor, cache: PartCache, who: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """The best of the candidates (n, k) of the sequences ``who``, and its distance: (n,) each."""
        prior = self.known.prior
        if self.sigma:
            near = torch.cat([near, prior.favourites[: self.settings.candidates].expand(len(near), -1)], 1)
        count, width = near.shape
        with torch.no_grad():
            forked = fork(cache, who.repeat_interleave(width))
            states = self.front(near.reshape(-1, 1), cache=forked)[:, -1].float().view(count, width, -1)
        squared = (states - self.rows[who, position, None]).square().sum(-1)
        score = -squared if not self.sigma else prior.log_probability[near] - squared / (2 * self.sigma**2)
        best = score.argmax(1, keepdim=True)
        return near.gather(1, best)[:, 0], squared.gather(1, best)[:, 0] / self.spread[position]

    def _again(
        self, token: Tensor, distance: Tensor, cache: PartCache, who: Tensor, position: int, starts: int
    ) -> tuple[Tensor, Tensor]:
        """One place by itself, from several of the inverter's tokens."""
        first = self.known.inverter.propose(self.rows[who, position], position, starts)
        forked = fork(cache, who.repeat_interleave(first.shape[1]))
        target = self.rows[who, position, None].repeat_interleave(first.shape[1], 0)
        start = self.table[first.flatten()][:, None]
        found = self.optimised(start, forked, target, self.spread[position : position + 1], self.steps)
        near = nearest(self.table, found[:, 0], self.settings.candidates // 2).view(len(who), -1)
        again, closer = self._best(torch.cat([near, first], 1), cache, who, position)
        return torch.where(closer < distance, again, token), torch.minimum(closer, distance)

    def run(self, more: Callable[[int], None]) -> tuple[Tensor, Tensor]:
        """(N, T) tokens, and (N, T) distances of their rows."""
        settings, length = self.settings, self.rows.shape[1]
        with torch.inference_mode():
            start = invert(self.known, self.rows * self.known.layer.factor)
        start, cache, parts = start.clone(), self.front.new_cache(), []
        for begin in range(0, length, settings.patch):
            part = slice(begin, begin + settings.patch)
            target, spread = self.rows[:, part], self.spread[part]
            embedded = self.optimised(self.table[start[:, part]], cache, target, spread, self.steps)
            parts.append(self.named(embedded, cache, begin))
            more(target.shape[0] * target.shape[1])
        tokens, distance = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)
        joint = round(settings.joint * self.known.profile.steps)
        if joint and float(distance.max()) > self.known.search.exact:
            empty = self.front.new_cache()
            embedded = self.optimised(self.table[tokens], empty, self.rows, self.spread, joint)
            again, closer = self.named(embedded, self.front.new_cache(), 0)
            better = (closer.sum(1) < distance.sum(1))[:, None]
            tokens, distance = torch.where(better, again, tokens), torch.where(better, closer, distance)
        return tokens, distance


def _run(view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    start = time.perf_counter()
    settings = settings_of("pidi", Settings)
    total, done, unresolved = sum(len(seen.rows) for seen in view.sightings), 0, 0

    def more(count: int) -> None:
        nonlocal done
        tick(done := done + count, total)

    tokens: dict[int, tuple[int, ...]] = {}
    for indices, rows in batches(view, linked=False, most=8):
        factor = known.layer.factor
        found, distance = _Inversion(known, rows / factor, view.noise.sigma / factor, settings).run(more)
        if not view.noise.sigma:
            unresolved += int((distance > known.search.exact).sum())
        tokens.update(zip(indices, map(tuple, found.tolist()), strict=True))
    return Recovered(
        attack="patched", keys=tuple(seen.key for seen in view.sightings), unresolved=unresolved,
        tokens=tuple(tokens[i] for i in range(len(view.sightings))), seconds=time.perf_counter() - start,
    )  # fmt: skip


ATTACKS = (Attack("patched", _blocked, _run),)
