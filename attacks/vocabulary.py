"""Vocabulary matching (Thomas et al., ICML 2025): find, position by position, the token whose forward state is the row.

    propose -> run partition A on prefix + candidate, exactly -> compare with the row -> accept, or widen the search

Without noise the right token's state equals the row to rounding, so a match proves itself, and the search widens
(8, 64, 1024, 8192, everything) until there is one. With noise nothing proves itself: a candidate is scored by distance,
or by its posterior. The search then widens only when no candidate is as close as the noise allows.

The posterior is exact but for being greedy. A sequence is released as ``y = s h + sigma z``, its clipping factor s
unknown. With ``s ~ N(s0, tau^2)`` from public text, ``A = <y, h>`` and ``B = |h|^2`` over the prefix and the candidate,
and ``lambda = sigma^2 / tau^2``, integrating s out leaves, up to a constant,

    log p(y | h) = (A + lambda s0)^2 / (2 sigma^2 (B + lambda)) - log(B + lambda) / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.config import Search
from attacks.ridge import Layer
from attacks.view import Front, fork
from securesplit.model.parts import PartCache

# (rows (N,D), position, count) -> (N, count) token ids, best first.
Propose = Callable[[Tensor, int, int], Tensor]

_FORWARDS = 128  # Candidates in one forward pass: copied caches stay small, which is what makes them fast.
_FREE = 64  # Candidates per position that the escalation budget does not count.


@dataclass(frozen=True, slots=True)
class Scoring:
    """How candidates are compared.

    Attributes:
        sigma: noise per coordinate of the rows, 0 for none.
        layer: public statistics of the cut.
        log_prior: (V,) for the posterior; None for the nearest neighbour.
        favourites: (K,) tokens that are tried at every position because the prior likes them; may be empty.
    """

    sigma: float
    layer: Layer
    log_prior: Tensor | None
    favourites: Tensor


@dataclass(frozen=True, slots=True)
class Decoded:
    """What was recovered.

    Attributes:
        tokens: (N, T).
        unresolved: positions where no candidate was as close as it should have been; 0 proves a noiseless recovery.
        spent: candidate evaluations that were charged to the budget.
    """

    tokens: Tensor
    unresolved: int
    spent: int


class _Ranked:
    """Proposals for all rows, ranked in one go as far as every search looks; deeper only for rows that need it."""

    def __init__(self, propose: Propose, rows: Tensor, factor: float, depth: int) -> None:
        self.propose, self.rows, self.factor, self.depth = propose, rows / factor, factor, depth
        count, length, width = rows.shape
        table = [propose(self.rows[:, 0], 0, depth)[:, None]]
        if length > 1:
            later = propose(self.rows[:, 1:].reshape(-1, width), 1, depth)
            table.append(later.view(count, length - 1, -1))
        self.table = torch.cat(table, dim=1)

    def at(self, position: int, who: Tensor, count: int) -> Tensor:
        """(n, count) token ids for the rows of the sequences ``who`` at one position, best first."""
        if count <= self.depth:
            return self.table[who, position, :count]
        return self.propose(self.rows[who, position], position, count)


@dataclass(slots=True)
class _Best:
    """The best candidate of every sequence at one position, while the search widens.

    ``near`` is that candidate's squared distance, ``next`` the smallest distance of any other token, ``size`` its |h|^2.
    """

    token: Tensor
    score: Tensor
    near: Tensor
    next: Tensor
    size: Tensor

    @classmethod
    def none(cls, count: int) -> _Best:
        far = torch.full((count,), math.inf)
        return cls(torch.full((count,), -1), -far, far.clone(), far.clone(), torch.zeros(count))

    def take(self, who: Tensor, ids: Tensor, score: Tensor, distance: Tensor, size: Tensor) -> None:
        """Merge candidates (n, k) of the sequences ``who`` (n,)."""
        top = score.argmax(1, keepdim=True)
        token, best = ids.gather(1, top)[:, 0], score.gather(1, top)[:, 0]
        near = distance.gather(1, top)[:, 0]
        other = distance.masked_fill(ids == token[:, None], math.inf).amin(1)
        won = best > self.score[who]
        old_token, old_near, old_next = self.token[who], self.near[who], self.next[who]
        # The loser of this comparison is a candidate for second place, unless it is the same token.
        loser = torch.where(won, old_near, near).masked_fill(old_token == token, math.inf)
        self.next[who] = torch.minimum(torch.minimum(old_next, other), loser)
        self.token[who] = torch.where(won, token, old_token)
        self.score[who] = torch.where(won, best, self.score[who])
        self.near[who] = torch.where(won, near, old_near)
        self.size[who] = torch.where(won, size.gather(1, top)[:, 0], self.size[who])


class _Match:
    """One position: its rows, the prefix they continue, and the posterior of the clipping factor so far.

    Args:
        rows: (N, D). seen: (2, N), A and B over the prefix. propose: ranks tokens for some of the rows.
        position: of the text; the cache may hold a public sentinel besides.
    """

    def __init__(
        self,
        front: Front,
        cache: PartCache,
        rows: Tensor,
        scoring: Scoring,
        *,
        seen: Tensor,
        propose: _Ranked,
        position: int,
    ) -> None:
        self.front, self.cache, self.rows, self.scoring, self.propose = front, cache, rows, scoring, propose
        self.position = position
        layer = scoring.layer
        self.sigma2 = scoring.sigma**2
        self.shrink = self.sigma2 / layer.factor_std**2  # lambda
        self.cross, self.energy = seen[0], seen[1]  # A and B over the prefix
        if self.sigma2:
            self.factor = (self.cross + self.shrink * layer.factor) / (self.energy + self.shrink)
            self.factor_variance = self.sigma2 / (self.energy + self.shrink)
        else:
            self.factor = torch.full_like(self.cross, layer.factor)
            self.factor_variance = torch.zeros_like(self.cross)
        self.spread = layer.spread_later if position else layer.spread_first

    def scores(self, who: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score, squared distance and |h|^2 of candidates ``ids`` (n, k) of the sequences ``who`` (n,)."""
        count, width = ids.shape
        spread_out = fork(self.cache, who.repeat_interleave(width))
        states = self.front(ids.reshape(-1, 1), cache=spread_out)[:, -1].float().view(count, width, -1)
        y, factor = self.rows[who], self.factor[who].float()
        distance = (y[:, None] - factor[:, None, None] * states).square().sum(-1)
        size = states.square().sum(-1)
        if self.scoring.log_prior is None or not self.sigma2:
            return -distance, distance, size
        cross = (
            self.cross[who, None]
            + torch.einsum("nd,nkd->nk", y, states).double()
            + self.shrink * self.scoring.layer.factor
        )
        energy = self.energy[who, None] + size + self.shrink
        # The constant A^2 / B of the prefix alone is subtracted before rounding to float32 eats the difference.
        base = (self.cross[who] + self.shrink * self.scoring.layer.factor).square() / (self.energy[who] + self.shrink)
        likelihood = (cross.square() / energy - base[:, None]) / (2 * self.sigma2) - energy.log() / 2
        return (likelihood + self.scoring.log_prior[ids].double()).float(), distance, size

    def accepted(self, best: _Best, search: Search) -> Tensor:
        """Which sequences have a candidate as close as the right token would be: (N,) bool."""
        scale = self.factor.float().square() * self.spread
        if not self.sigma2:
            close = best.near <= search.exact * scale
            return close | ((best.near <= search.drifted * scale) & (best.near <= search.ratio * best.next))
        width = self.rows.shape[1]
        # Where the noise hides the whole spread of rows, a poor match is chance and widening cannot mend it.
        hopeless = scale <= 4 * math.sqrt(2 * width) * self.sigma2
        # Four standard deviations of sigma^2 chi^2_D, three of the clipping factor, and the drift of adapters.
        noise = self.sigma2 * (width + 4 * math.sqrt(2 * width))
        return hopeless | (best.near <= noise + 9 * self.factor_variance.float() * best.size + search.exact * scale)


def _search(
    match: _Match, rungs: Iterable[int], search: Search, *, lost: Tensor, budget: int
) -> tuple[_Best, Tensor, int]:
    """Widen the search until every sequence is accepted, the vocabulary or the budget is at its end.

    Sequences that are ``lost``, (N,) bool, are given the free candidates only: after a position without a match their
    prefix is wrong, or the weights are others, and a wider search would find no match either.

    Returns:
        The best candidates; which sequences have no match, (N,) bool; and what was charged to the budget.
    """
    count = len(match.rows)
    best, spent, done = _Best.none(count), 0, 0
    open_ = torch.arange(count)
    for rung in rungs:
        if done >= _FREE:
            open_ = open_[~lost[open_]]
            if not len(open_) or spent + len(open_) * (rung - done) > budget:
                break
        ids = match.propose.at(match.position, open_, rung)[:, done:]
        if done == 0 and len(match.scoring.favourites):
            ids = torch.cat([ids, match.scoring.favourites.expand(len(open_), -1)], dim=1)
        # Few sequences by many candidates, or many by few: a block is one forward pass.
        rows_at_once = max(1, _FORWARDS // ids.shape[1])
        for who, mine in zip(torch.split(open_, rows_at_once), torch.split(ids, rows_at_once), strict=True):
            for part in torch.split(mine, _FORWARDS, dim=1):
                best.take(who, part, *match.scores(who, part))
        spent += len(open_) * max(0, rung - max(done, _FREE))
        done = rung
        accepted = match.accepted(best, search)
        open_ = open_[~accepted[open_]]
        if not len(open_):
            break
    return best, ~match.accepted(best, search), spent


def decode(
    front: Front,
    rows: Tensor,
    propose: Propose,
    scoring: Scoring,
    search: Search,
    *,
    vocabulary: int,
    budget: int,
    candidates: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Decoded:
    """Recover the tokens of N released sequences of one length.

    Args:
        front: partition A with public weights.
        rows: (N, T, D) float32, as received.
        propose: ranks tokens for rows.
        scoring: how candidates are compared.
        search: tolerances and the ladder.
        vocabulary: V, the last rung.
        budget: candidate evaluations beyond the first 64 per position; when they are spent, the best so far is taken.
        candidates: the first rung; the ladder's own when None.
        progress: told the number of sequences times positions done.

    Not attempted: the rows after a position say more about its token; beam search; tokens fed back while decoding.
    """
    count, length, _ = rows.shape
    ladder = search.ladder if candidates is None else (candidates, *(r for r in search.ladder if r > candidates))
    rungs = (*(r for r in ladder if r < vocabulary), vocabulary)
    cache = front.new_cache()
    cross, energy = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    tokens = torch.empty((count, length), dtype=torch.long)
    unresolved = spent = 0
    lost = torch.zeros(count, dtype=torch.bool)
    ranked = _Ranked(propose, rows, scoring.layer.factor, min(max(_FREE, candidates or 0), vocabulary))
    with torch.inference_mode():
        for position in range(length):
            y = rows[:, position]
            seen = torch.stack((cross, energy))
            match = _Match(front, cache, y, scoring, seen=seen, propose=ranked, position=position)
            best, missed, cost = _search(match, rungs, search, lost=lost, budget=budget - spent)
            lost |= missed
            unresolved += int(missed.sum())
            spent += cost
            tokens[:, position] = best.token
            state = front(best.token[:, None], cache=cache)[:, -1].float()
            cross = cross + (y.double() * state.double()).sum(1)
            energy = energy + state.double().square().sum(1)
            if progress is not None:
                progress(count)
    return Decoded(tokens=tokens, unresolved=unresolved, spent=spent)
