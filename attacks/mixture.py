"""Inversion at a noise that nobody has told: sigma is read off the rows, then the inverter of that noise is used.

Adding noise raises the energy of a row by the same sigma^2 in every direction, and public text says how much energy each
direction has without it. Directions in which text has next to none are a gauge of the noise. One sequence of 48 rows holds
some 27 000 numbers of it, so that sigma is known to a percent or so, per sequence: senders may differ.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.exchange import Recovered
from attacks.inverter import Study, fitted, study_of
from attacks.knowledge import Knowledge
from attacks.threat import Threat
from attacks.view import ServerView, batches

__all__ = ["ATTACKS", "Settings", "estimated_sigma", "grouped"]

_GRID = 400
_CHUNK = 32


class Settings(BaseModel):
    """Numbers of namoe.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    experts: Annotated[int, Field(ge=1)]
    ratio: Annotated[float, Field(gt=1)]
    silent: Annotated[float, Field(gt=0, lt=1)]


def estimated_sigma(study: Study, rows: Tensor, silent: float) -> Tensor:
    """The noise of each sequence, by maximum likelihood against the public spectrum.

    With variance l_i of public rows along the i-th principal direction and mean square e_i of a sequence's rows, both about
    the public mean row, sigma^2 minimises ``sum_i log(l_i + sigma^2) + e_i / (l_i + sigma^2)``.

    Args:
        study: public rows, as clipped by the bound that the policy states.
        rows: (N, T, D), as released. Position 0 is left out, since its rows have many times the norm of the others.
        silent: sigma below this part of the public rows' rms per coordinate counts as none.

    Returns:
        (N,) standard deviations per coordinate.
    """
    public, seen = study.train.rows, rows
    if public.shape[1] > 1 and seen.shape[1] > 1:
        public, seen = public[:, 1:], seen[:, 1:]
    flat = public.flatten(0, 1)
    mean = flat.mean(0)
    centred = (flat - mean).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    # The weaker half of the directions gauges the noise; the stronger half holds what private text does differently.
    half = max(1, len(values) // 2)
    values, vectors = values[:half].clamp_min(0), vectors[:, :half].float()
    scale = float(flat.square().mean())
    grid = torch.cat([torch.zeros(1).double(), scale * torch.logspace(-8, 12, _GRID, dtype=torch.float64)])
    level = values + grid[:, None] + 1e-9 * scale
    found = []
    for part in torch.split(seen, _CHUNK):
        energy = ((part - mean) @ vectors).double().square().mean(1)
        loss = level.log().sum(1) + energy @ (1 / level).T
        found.append(grid[loss.argmin(1)].sqrt())
    sigma = torch.cat(found)
    return torch.where(sigma < silent * scale**0.5, torch.zeros_like(sigma), sigma)


def grouped(sigma: Tensor, experts: int, ratio: float) -> list[tuple[float, list[int]]]:
    """Sequences of about the same noise, at most ``experts`` groups: each with its sigma and the sequences' indices.

    Neighbours in size share a group while they are within ``ratio``; where that gives too many, the ratio grows. No noise
    is a group of its own, beside the experts for noise.
    """
    order = [index for index in torch.argsort(sigma).tolist() if sigma[index] > 0]
    silent = [(0.0, still)] if (still := [i for i in range(len(sigma)) if not sigma[i] > 0]) else []
    while True:
        groups: list[list[int]] = []
        for index in order:
            if groups and float(sigma[index]) <= ratio * float(sigma[groups[-1][0]]):
                groups[-1].append(index)
            else:
                groups.append([index])
        if len(groups) <= experts:
            return silent + [(float(sigma[group].square().mean().sqrt()), group) for group in groups]
        ratio *= ratio


def _blocked(view: ServerView, _: Threat) -> str | None:
    return None if view.sightings else "the recording holds none of the wanted sequences"


def _run(view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    start = time.perf_counter()
    settings = settings_of("namoe", Settings)
    # What the policy says of sigma is forgotten here; its clip is used.
    unaware = replace(known, noise=replace(known.noise, sigma=0.0))
    study = study_of(unaware)
    parts = batches(view, linked=False)
    sigma = torch.empty(len(view.sightings), dtype=torch.float64)
    for indices, rows in parts:
        sigma[indices] = estimated_sigma(study, rows, settings.silent)
    total, done = sum(len(seen.rows) for seen in view.sightings), 0

    def more(count: int) -> None:
        nonlocal done
        tick(done := done + count, total)

    found: dict[int, tuple[int, ...]] = {}
    for level, group in grouped(sigma, settings.experts, settings.ratio):
        inverter, members = fitted(unaware, level), set(group)
        for indices, rows in parts:
            mine = [place for place, index in enumerate(indices) if index in members]
            if mine:
                tokens = inverter.tokens(rows[mine], more).tolist()
                found.update(zip((indices[place] for place in mine), map(tuple, tokens), strict=True))
    return Recovered(
        attack="mixture", keys=tuple(seen.key for seen in view.sightings),
        tokens=tuple(found[i] for i in range(len(view.sightings))), seconds=time.perf_counter() - start,
    )  # fmt: skip


ATTACKS = (Attack("mixture", _blocked, _run),)
