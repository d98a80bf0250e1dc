"""Vocabulary matching (Thomas et al., ICML 2025): find, position by position, the token whose forward state is the row.

    propose -> run partition A on prefix + candidate, exactly -> compare with the row -> accept, or widen the search

Without noise the right token's state equals the row to the codec's rounding, so a match proves itself, and the search
widens (8, 64, a descent by gradients, 1024, 8192, everything) until there is one. With noise nothing proves itself: a candidate is scored by
distance, or by its posterior. The search then widens only when no candidate is as close as the noise allows.

The posterior (attacks/likelihood.py) is exact but for being greedy: each candidate is weighed with its whole prefix, and
with the clipping factor integrated out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.candidates import Best, Estimate, Propose, Ranked, Scored
from attacks.config import Search
from attacks.descend import STEPS, Descent, descent_of
from attacks.likelihood import Errors, errors_of, factor_of, log_evidence
from attacks.ridge import Layer
from attacks.view import Front, fork
from securesplit.model.parts import PartCache

_FORWARDS = 128  # Candidates in one forward pass: copied caches stay small, which is what makes them fast.
_FREE = 64  # Candidates per position that the escalation budget does not count.
_DESCENT = _FREE + 3 * STEPS  # What a descent and its proposals cost, in candidates: a backward pass costs two forward.


@dataclass(frozen=True, slots=True)
class Scoring:
    """How candidates are compared.

    Attributes:
        sigma: noise per coordinate of the rows, 0 for none.
        layer: public statistics of the cut.
        log_prior: (V,) for the posterior; None for the nearest neighbour.
        favourites: (K,) tokens that are tried at every position because the prior likes them; may be empty.
        codec: how the rows crossed: f32, bf16 or int8.
        releases: of how many releases the rows are the mean; sigma is what is left of the noise.
    """

    sigma: float
    layer: Layer
    log_prior: Tensor | None
    favourites: Tensor
    codec: str = "f32"
    releases: int = 1


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


class _Match:
    """One position: its rows, the prefix they continue, and the posterior of the clipping factor so far.

    Args:
        rows: (N, D). errors: of these rows. seen: (2, N), A and B over the prefix. propose: ranks tokens for some of the
            rows. position: of the text; the cache may hold a public sentinel besides.
    """

    def __init__(
        self,
        front: Front,
        cache: PartCache,
        rows: Tensor,
        scoring: Scoring,
        *,
        errors: Errors,
        seen: Tensor,
        propose: Ranked,
        position: int,
    ) -> None:
        self.front, self.cache, self.rows, self.scoring, self.propose = front, cache, rows, scoring, propose
        self.position, self.errors, self.seen = position, errors, seen
        layer = scoring.layer
        if scoring.sigma:
            self.weight = 1 / errors.variance.double()
            self.factor, self.factor_variance = factor_of(seen[0], seen[1], layer)
        else:
            self.factor, self.factor_variance = torch.full_like(seen[0], layer.factor), torch.zeros_like(seen[0])
        self.spread = layer.spread_later if position else layer.spread_first

    def scores(self, who: Tensor, ids: Tensor) -> Scored:
        """Weigh candidates ``ids`` (n, k) of the sequences ``who`` (n,)."""
        count, width = ids.shape
        spread_out = fork(self.cache, who.repeat_interleave(width))
        states = self.front(ids.reshape(-1, 1), cache=spread_out)[:, -1].float().view(count, width, -1)
        y, scaled = self.rows[who], self.factor[who].float()[:, None, None] * states
        distance, size = (y[:, None] - scaled).square().sum(-1), states.square().sum(-1)
        if not self.scoring.sigma:
            errors = Errors(0.0, self.errors.half[who], self.errors.variance[who])
            return Scored(-distance, distance, size, errors.boxed(y, scaled))
        nowhere = torch.zeros_like(distance, dtype=torch.bool)
        if self.scoring.log_prior is None:
            return Scored(-distance, distance, size, nowhere)
        weight = self.weight[who, None]
        cross = self.seen[0, who, None] + weight * torch.einsum("nd,nkd->nk", y, states).double()
        energy = self.seen[1, who, None] + weight * size.double()
        # What the prefix alone says is subtracted before rounding to float32 eats the difference.
        base = log_evidence(self.seen[0, who], self.seen[1, who], self.scoring.layer)
        likelihood = log_evidence(cross, energy, self.scoring.layer) - base[:, None]
        return Scored((likelihood + self.scoring.log_prior[ids].double()).float(), distance, size, nowhere)

    def attempt(self, best: Best, who: Tensor, ids: Tensor) -> None:
        """Weigh candidates ``ids`` (n, k) of the sequences ``who`` (n,), a block at a time, and keep the best.

        Few sequences by many candidates, or many by few: a block is one forward pass.
        """
        rows_at_once = max(1, _FORWARDS // ids.shape[1])
        for some, mine in zip(torch.split(who, rows_at_once), torch.split(ids, rows_at_once), strict=True):
            for part in torch.split(mine, _FORWARDS, dim=1):
                best.take(some, part, self.scores(some, part))

    def descended(self, guide: Descent, best: Best, who: Tensor) -> Tensor:
        """Candidates (n, 64) that gradient descent from the inverter's estimate, or the best so far, ends next to."""
        start = self.propose.estimated(self.position, who)
        start = guide.table[best.token[who]] if start is None else start
        found = guide(self.cache, who, start, self.rows[who, None], self.factor[who])
        return guide.nearest(found, _FREE)

    def accepted(self, best: Best, search: Search) -> Tensor:
        """Which sequences have a candidate as close as the right token would be: (N,) bool."""
        scale = self.factor.float().square() * self.spread
        ball = self.errors.ball()
        if not self.scoring.sigma:
            close = best.boxed | (best.near <= search.exact * scale)
            # Adapters drift while they are trained: no match then, but still far closer than anything else.
            mean = self.errors.half.square().sum(-1) / 3
            return close | (
                (best.near <= search.drifted * scale + ball) & (best.near - mean <= search.ratio * best.next)
            )
        width = self.rows.shape[1]
        # Where the noise hides the whole spread of rows, a poor match is chance and widening cannot mend it.
        hopeless = scale <= 4 * math.sqrt(2 * width) * self.errors.variance
        # Three standard deviations of the clipping factor, and the drift of adapters.
        return hopeless | (best.near <= ball + 9 * self.factor_variance.float() * best.size + search.exact * scale)


def _search(
    match: _Match, rungs: Iterable[int], search: Search, guide: Descent | None, *, lost: Tensor, budget: int
) -> tuple[Best, Tensor, int]:
    """Widen the search until every sequence is accepted, the vocabulary or the budget is at its end.

    Sequences that are ``lost``, (N,) bool, are given the free candidates only: after a position without a match their
    prefix is wrong, or the weights are others, and a wider search would find no match either.

    Returns:
        The best candidates; which sequences have no match, (N,) bool; and what was charged to the budget.
    """
    best, spent, done = Best.none(len(match.rows)), 0, 0
    open_ = torch.arange(len(match.rows))
    for rung in rungs:
        if done >= _FREE:
            open_ = open_[~lost[open_]]
            cost = len(open_) * _DESCENT
            if guide is not None and len(open_) and spent + cost <= budget:
                match.attempt(best, open_, match.descended(guide, best, open_))
                open_, spent = open_[~match.accepted(best, search)[open_]], spent + cost
            guide = None
            if not len(open_) or spent + len(open_) * (rung - done) > budget:
                break
        ids = match.propose.at(match.position, open_, rung)[:, done:]
        if done == 0 and len(match.scoring.favourites):
            ids = torch.cat([ids, match.scoring.favourites.expand(len(open_), -1)], dim=1)
        match.attempt(best, open_, ids)
        spent += len(open_) * max(0, rung - max(done, _FREE))
        done = rung
        open_ = open_[~match.accepted(best, search)[open_]]
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
    estimate: Estimate | None = None,
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
        estimate: where gradient descent starts; the best candidate when None, which is a worse place.
        progress: told the number of sequences times positions done.

    Not attempted: the rows after a position say more about its token; beam search; tokens fed back while decoding.
    """
    count, length, _ = rows.shape
    ladder = search.ladder if candidates is None else (candidates, *(r for r in search.ladder if r > candidates))
    rungs = (*(r for r in ladder if r < vocabulary), vocabulary)
    cache = front.new_cache()
    errors = errors_of(rows, scoring.sigma, scoring.codec, releases=scoring.releases)
    seen = torch.zeros(2, count, dtype=torch.float64)
    tokens = torch.empty((count, length), dtype=torch.long)
    unresolved = spent = 0
    lost = torch.zeros(count, dtype=torch.bool)
    ranked = Ranked(propose, rows, scoring.layer.factor, min(max(_FREE, candidates or 0), vocabulary), estimate)
    guide = descent_of(front)
    with torch.inference_mode():
        for position in range(length):
            y, here = rows[:, position], errors.at(position)
            match = _Match(
                front, cache, y, scoring, errors=here, seen=seen, propose=ranked, position=position
            )  # fmt: skip
            best, missed, cost = _search(match, rungs, search, guide, lost=lost, budget=budget - spent)
            lost |= missed
            unresolved += int(missed.sum())
            spent += cost
            tokens[:, position] = best.token
            state = front(best.token[:, None], cache=cache)[:, -1].float()
            if scoring.sigma:
                pair = torch.stack(((y.double() * state.double()).sum(1), state.double().square().sum(1)))
                seen = seen + pair / here.variance.double()
            if progress is not None:
                progress(count)
    return Decoded(tokens=tokens, unresolved=unresolved, spent=spent)
