"""Without any weights: rows that are equal hide equal tokens, and how often they come, and behind which, gives them away.

A cut behind the embedding alone, without noise, is a substitution cipher. Rows within a distance of each other are taken for
one token; clusters are then matched with tokens by how often both occur (a gamma-Poisson likelihood, because two texts are not
alike) and by which clusters and tokens follow each other (mean-field on the public bigrams, every token shared out among the
clusters that claim it).

With noise the distance between releases of one row is 2 D sigma^2 give or take, so that clustering goes on to work for a
while. When the number of coincidences is not that of text, the clusters mean nothing: then every row is given the commonest
token, which is the best that can be said without looking.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.config import settings_of
from attacks.exchange import Recovered
from attacks.knowledge import Knowledge
from attacks.prior import Prior
from attacks.threat import Threat
from attacks.view import Key, Noise, ServerView

__all__ = ["ATTACKS", "Settings", "clustered", "deciphered"]

_BLOCK = 256


class Settings(BaseModel):
    """Numbers of frequency.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    near: Annotated[float, Field(gt=0, lt=1)]
    rows: Annotated[int, Field(ge=1)]
    vocabulary: Annotated[int, Field(ge=1)]
    rounds: Annotated[int, Field(ge=1)]
    kinship: Annotated[float, Field(gt=0)]
    coincidences: Annotated[float, Field(gt=1)]


@dataclass(frozen=True, slots=True)
class _Public:
    """Statistics of public text over its commonest tokens.

    Attributes:
        ids: (W,) token ids. counts: (W,). total: of all tokens.
        follows: (W, W), p(column | row), smoothed by the unigram.
    """

    ids: Tensor
    counts: Tensor
    total: float
    follows: Tensor


def clustered(rows: Tensor, noise: Noise, near: float) -> Tensor:
    """Which rows are releases of one row, as far as the noise lets them be told: (N, D) to (N,) cluster numbers.

    Every cluster is led by its first row; a row joins the nearest leader that is close enough.

    Args:
        rows: as released.
        noise: of the policy.
        near: squared distance that the codec and the clip may cause, as a part of the median squared norm of a row.
    """
    width, variance = rows.shape[1], noise.sigma**2
    squared = rows.square().sum(1)
    scale = max(float(squared.median()) - width * variance, 0.0)
    # Mean and three standard deviations of sigma^2 |z - z'|^2.
    reach = 2 * width * variance + 3 * math.sqrt(8 * width) * variance + near * scale
    leaders, number = torch.empty(0, width), torch.empty(len(rows), dtype=torch.long)
    for start in range(0, len(rows), _BLOCK):
        part = rows[start : start + _BLOCK]
        mine = torch.full((len(part),), -1)
        if len(leaders):
            distance, nearest = torch.cdist(part, leaders).square().min(1)
            mine = torch.where(distance <= reach, nearest, mine)
        among = torch.cdist(part, part).square() <= reach
        for index in range(len(part)):
            if mine[index] < 0:
                mine[among[index] & (mine < 0)] = len(leaders)
                leaders = torch.cat([leaders, part[index : index + 1]])
        number[start : start + _BLOCK] = mine
    return number


def _public(prior: Prior, most: int) -> _Public:
    ids = prior.favourites[: min(most, len(prior.favourites))]
    unigram = prior.log_probability[ids].exp()
    stream = torch.tensor([token for text in prior.texts for token in (*text, -1)], dtype=torch.long)
    # Without text there are no counts: a weak belief in the rank stands in for them.
    counts, total = unigram * 1000, 1000.0
    pairs = torch.zeros(len(ids), len(ids))
    if prior.informed:
        place = torch.full((len(prior.favourites) + 1,), -1)
        place[ids] = torch.arange(len(ids))
        here = place[stream]  # -1 reads the last place, which is no token's.
        counts = torch.bincount(here[here >= 0], minlength=len(ids)).float()
        total = float((stream >= 0).sum())
        both = (here[:-1] >= 0) & (here[1:] >= 0)
        pairs.index_put_((here[:-1][both], here[1:][both]), torch.ones(int(both.sum())), accumulate=True)
    strength = 2 + pairs.sum(1, keepdim=True) * 0.1
    follows = (pairs + strength * unigram) / (pairs.sum(1, keepdim=True) + strength)
    return _Public(ids=ids, counts=counts, total=total, follows=follows.clamp_min(1e-9))


def deciphered(sequences: list[Tensor], prior: Prior, settings: Settings, tick: Tick | None = None) -> Tensor:
    """The token of every cluster.

    Args:
        sequences: cluster numbers, in the order of the text; numbers go from 0 without gaps.
        prior: public text.
        settings: of the file.
        tick: told (rounds done, rounds).

    Returns:
        (K,) token ids.
    """
    public = _public(prior, settings.vocabulary)
    flat = torch.cat(sequences)
    clusters = int(flat.max()) + 1
    sizes = torch.bincount(flat, minlength=clusters).float()
    mode = int(prior.favourites[0])
    if not _textlike(sizes, public, settings.coincidences):
        return torch.full((clusters,), mode)
    before = torch.cat([part[:-1] for part in sequences])
    after = torch.cat([part[1:] for part in sequences])
    pairs = torch.sparse_coo_tensor(
        torch.stack([before, after]), torch.ones(len(before)), (clusters, clusters), check_invariants=True
    ).coalesce()
    counted = _counted(sizes, public)
    belief = _shared(counted, sizes)
    for round_ in range(settings.rounds):
        # Low weight at first: neighbours that are themselves guesses must not shout.
        weight = settings.kinship * min(1.0, (round_ + 1) / (0.6 * settings.rounds))
        left, right = (belief @ public.follows).log(), (belief @ public.follows.T).log()
        context = torch.sparse.mm(pairs.t(), left) + torch.sparse.mm(pairs, right)
        belief = _shared(counted + weight * context, sizes)
        if tick is not None:
            tick(round_ + 1, settings.rounds)
    return public.ids[belief.argmax(1)]


def _textlike(sizes: Tensor, public: _Public, most: float) -> bool:
    """Whether equal rows are about as common as equal tokens are in public text."""
    total = float(sizes.sum())
    if total < 2:
        return False
    seen = float((sizes * (sizes - 1)).sum()) / (total * (total - 1))
    expected = float((public.counts / public.total).square().sum())
    return expected / most <= seen <= expected * most


def _counted(sizes: Tensor, public: _Public) -> Tensor:
    """(K, W) log likelihood of each cluster's size for each token: Poisson with a gamma rate."""
    # A tenth of the public counts: how often a word occurs differs between texts by far more than chance.
    shape = 0.1 * public.counts + 0.3
    rate = 0.1 * public.total / sizes.sum() + 0.3 / max(1.0, float(public.counts.mean()))
    n = sizes[:, None]
    return (
        torch.lgamma(n + shape) - torch.lgamma(shape) - torch.lgamma(n + 1)
        + shape * torch.log(rate / (rate + 1)) - n * torch.log1p(rate)
    )  # fmt: skip


def _shared(score: Tensor, sizes: Tensor) -> Tensor:
    """Beliefs (K, W) from log scores: rows sum to one, and a token that several clusters claim is shared out."""
    belief = (score - score.logsumexp(1, keepdim=True)).clamp_min(-60)
    for _ in range(8):
        # A column may hold less than one cluster, never more; large clusters, whose evidence is better, hold on longer.
        claimed = (belief + 1e-3 * sizes.log()[:, None]).logsumexp(0, keepdim=True).clamp_min(0)
        belief = belief - claimed
        belief = belief - belief.logsumexp(1, keepdim=True)
    return belief.exp()


def _blocked(view: ServerView, _: Threat) -> str | None:
    return None if view.sightings else "the recording holds none of the wanted sequences"


def _run(view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    start = time.perf_counter()
    settings = settings_of("frequency", Settings)
    everything: dict[Key, npt.NDArray[np.float32]] = {}
    for seen in view.sightings:
        everything.setdefault(seen.key, seen.rows)
    for passage in view.traffic:
        everything.setdefault(passage.key, passage.rows)
    taken, held = [], 0
    wanted = len(view.sightings)
    for number, rows in enumerate(everything.values()):
        if number >= wanted and held + len(rows) > settings.rows:
            break
        taken.append(rows)
        held += len(rows)
    # A resent release is the same bytes; it would count every one of its tokens twice.
    first: dict[bytes, int] = {}
    fresh = [first.setdefault(rows.tobytes(), place) == place for place, rows in enumerate(taken)]
    with torch.inference_mode():
        numbers = clustered(torch.from_numpy(np.concatenate(taken)), view.noise, settings.near)
        parts = list(torch.split(numbers, [len(rows) for rows in taken]))
        tokens = deciphered([part for part, new in zip(parts, fresh, strict=True) if new], known.prior, settings, tick)
    return Recovered(
        attack="frequency", keys=tuple(seen.key for seen in view.sightings),
        tokens=tuple(tuple(tokens[part].tolist()) for part in parts[:wanted]), seconds=time.perf_counter() - start,
    )  # fmt: skip


ATTACKS = (Attack("frequency", _blocked, _run),)
