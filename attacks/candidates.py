"""The candidates of a search: how they are ranked before they are tried, and which is the best of those that were."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Best", "Estimate", "Propose", "Ranked", "Scored"]

# (rows (N,D), position, count) -> (N, count) token ids, best first.
Propose = Callable[[Tensor, int, int], Tensor]
# (rows (N,D), position) -> (N, E) embeddings.
Estimate = Callable[[Tensor, int], Tensor]


class Ranked:
    """Proposals for all rows, ranked in one go as far as every search looks; deeper only for rows that need it."""

    def __init__(
        self, propose: Propose, rows: Tensor, factor: float, depth: int, estimate: Estimate | None = None
    ) -> None:
        self.estimate = estimate
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

    def estimated(self, position: int, who: Tensor) -> Tensor | None:
        """(n, E) embeddings that the rows of the sequences ``who`` point to; None without an inverter that says."""
        return None if self.estimate is None else self.estimate(self.rows[who, position], position)


@dataclass(frozen=True, slots=True)
class Scored:
    """Candidates (n, k): score, squared distance, |h|^2, and whether they explain a noiseless row to rounding."""

    score: Tensor
    distance: Tensor
    size: Tensor
    boxed: Tensor


@dataclass(slots=True)
class Best:
    """The best candidate of every sequence at one position, while the search widens.

    ``near`` is that candidate's squared distance, ``next`` the smallest distance of any other token, ``size`` its
    |h|^2, ``boxed`` whether it explains a noiseless row in every coordinate.
    """

    token: Tensor
    score: Tensor
    near: Tensor
    next: Tensor
    size: Tensor
    boxed: Tensor

    @classmethod
    def none(cls, count: int) -> Best:
        """Nothing tried yet."""
        far = torch.full((count,), math.inf)
        return cls(
            torch.full((count,), -1), -far, far.clone(), far.clone(), torch.zeros(count), torch.zeros(count).bool()
        )

    def take(self, who: Tensor, ids: Tensor, scored: Scored) -> None:
        """Merge candidates (n, k) of the sequences ``who`` (n,)."""
        score, distance = scored.score, scored.distance
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
        self.size[who] = torch.where(won, scored.size.gather(1, top)[:, 0], self.size[who])
        self.boxed[who] = torch.where(won, scored.boxed.gather(1, top)[:, 0], self.boxed[who])
