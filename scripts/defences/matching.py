"""Exact matching where the defence has no noise: the candidate whose defended state *is* the row.

A defence without coins is a public function, and a public function that separates tokens can be searched (Thomas et al.,
ICML 2025; SIPIT). A secret permutation of columns leaves the sorted values as they are; a secret permutation of rows leaves
the set of rows, and the prefix says which of them can come next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attacks.view import fork
from scripts.defences.attacker import Codebook
from scripts.defences.defence import Defence
from scripts.defences.world import Opened, World, with_sentinel
from securesplit.model.parts import Front, PartCache

_FORWARDS = 512


@dataclass(frozen=True, slots=True)
class Search:
    """When a match is believed, and how far the search goes without one.

    Attributes:
        ladder: candidates per row, rising; the whole vocabulary comes last.
        exact: squared distance, as a part of the rows' public spread, below which a candidate is taken at once.
        ratio: or it is so many times closer than the next token: rounding may flip in another order of summation.
        deep: how many positions, all sequences together, may try the whole vocabulary.
    """

    ladder: tuple[int, ...] = (64, 1024, 8192)
    exact: float = 1e-6
    ratio: float = 0.15
    deep: int = 16


@dataclass(frozen=True, slots=True)
class Matched:
    """(N, T) tokens, and the positions where nothing matched."""

    tokens: Tensor
    unresolved: int


@torch.inference_mode()
def match(
    world: World,
    front: Front,
    defence: Defence,
    rows: Tensor,
    codebook: Codebook,
    search: Search,
    progress: Callable[[float], None],
) -> Matched:
    """Recover texts from canonical rows (N, T, k), one sequence at a time, the rows in any order if the defence says so.

    Args:
        world: the public model. front: A as the clients have it. defence: one without noise. rows: what was seen.
        codebook: proposes tokens for a row. search: how far it goes.
        progress: told the share that is done.
    """
    spread = float((rows - rows.flatten(0, 1).mean(0)).square().sum(-1).median())
    tokens, unresolved, deep = [], 0, search.deep
    for sequence in rows:
        ranked = (codebook.scores(sequence) + world.log_unigram).argsort(dim=-1, descending=True)
        one = _Sequence(world.whole, Opened(front), defence, sequence, ranked=ranked, search=search, spread=spread)
        tokens.append(one.run(deep))
        unresolved += one.unresolved
        deep -= one.deep
        progress(len(tokens) / len(rows))
    return Matched(torch.stack(tokens), unresolved)


class _Sequence:
    """One text: its rows, what each row's likeliest tokens are, and which rows are used up."""

    def __init__(
        self,
        whole: Any,
        front: Opened,
        defence: Defence,
        rows: Tensor,
        *,
        ranked: Tensor,
        search: Search,
        spread: float,
    ) -> None:
        self.whole, self.front, self.defence, self.rows, self.ranked = whole, front, defence, rows, ranked
        self.search, self.spread = search, spread
        self.unresolved = self.deep = 0

    def run(self, deep: int) -> Tensor:
        """(T,) tokens; ``deep`` positions may try everything."""
        cache, left = self.front.new_cache(), list(range(len(self.rows)))
        found: list[int] = []
        vocabulary = self.ranked.shape[1]
        for position in range(len(self.rows)):
            open_ = left if not self.defence.ordered else [position]
            best: tuple[float, int, int] = (torch.inf, -1, -1)
            second, tried, expected = torch.inf, torch.zeros(vocabulary, dtype=torch.bool), None
            for rung in (*(r for r in self.search.ladder if r < vocabulary), vocabulary):
                if rung == vocabulary and vocabulary > self.search.ladder[-1]:
                    if self.deep >= deep:
                        break
                    self.deep += 1
                # With shuffled rows every unused row proposes, so that each may propose the fewer.
                each = max(8, rung // len(open_)) if rung < vocabulary else vocabulary
                ids = self.ranked[open_, :each].flatten()
                if tried.any() and rung < vocabulary:
                    # The rows alone did not suffice: what the language model expects next is tried as well.
                    expected = self._expected(found) if expected is None else expected
                    ids = torch.cat([ids, expected[:rung]])
                ids = torch.unique(ids)
                ids = ids[~tried[ids]]
                tried[ids] = True
                best, second = self._try(cache, ids, open_, best, second)
                if self._believed(best[0], second):
                    break
            self.unresolved += not self._believed(best[0], second)
            _, token, row = best
            found.append(token)
            left.remove(row)
            self.front(torch.tensor([[token]]), cache=cache)
        return torch.tensor(found)

    def _expected(self, found: list[int]) -> Tensor:
        """(V,) tokens, the likeliest after the prefix first."""
        logits = self.whole(with_sentinel(torch.tensor([found], dtype=torch.long).view(1, -1))).logits[0, -1]
        ranks: Tensor = logits.float().argsort(descending=True)
        return ranks

    def _believed(self, near: float, second: float) -> bool:
        return near <= self.search.exact * self.spread or near <= self.search.ratio * second

    def _try(
        self, cache: PartCache, ids: Tensor, open_: list[int], best: tuple[float, int, int], second: float
    ) -> tuple[tuple[float, int, int], float]:
        """The nearest pair of a candidate and an open row, and the distance of the next *token*."""
        for part in torch.split(ids, _FORWARDS):
            forked = fork(cache, torch.zeros(len(part), dtype=torch.long))
            hidden = self.front(part[:, None], cache=forked)[:, -1].float()
            shown = self.defence.expected(hidden)
            # By differences, not by products: a distance of 0 must come out as 0.
            apart = torch.cdist(self.rows[open_], shown, compute_mode="donot_use_mm_for_euclid_dist").square()
            near, which = apart.min(0)
            for place in near.topk(min(2, len(part)), largest=False).indices.tolist():
                value = float(near[place])
                if value < best[0]:
                    best, second = (value, int(part[place]), open_[int(which[place])]), best[0]
                else:
                    second = min(second, value)
        return best, second
