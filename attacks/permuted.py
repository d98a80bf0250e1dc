"""Vocabulary matching on rows that a defence permuted (Thomas et al., ICML 2025, variants S, D and SD).

    rows      a secret order of a sequence's rows: each next token is sought among all rows that are not used yet
    columns   a secret order of the coordinates, one per sequence: sorted coordinates do not depend on it
    both      at once

Ours goes on from there: once a first token is matched by its sorted coordinates, its exact state beside its row *is* the
permutation of the columns, and the rest of the sequence is matched as if there had been none. Permutations are defences in
other systems; the shipped protocol permutes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attacks.attack import Attack, Tick
from attacks.candidates import Propose
from attacks.certify import every_state
from attacks.config import Search
from attacks.exchange import Recovered
from attacks.knowledge import Knowledge
from attacks.ridge import Layer
from attacks.threat import Threat
from attacks.view import Front, ServerView, fork
from securesplit.model.parts import PartCache

__all__ = ["ATTACKS", "Unpermuted", "decode_permuted"]

Kind = Literal["rows", "columns", "both"]
_FORWARDS = 128


@dataclass(frozen=True, slots=True)
class Unpermuted:
    """What came of one sequence.

    Attributes:
        tokens: (T,), in the order of the text.
        order: (T,), which received row each of them was matched with.
        columns: (D,), the received column of each coordinate; None where columns were in order.
        unresolved: positions without a match.
    """

    tokens: Tensor
    order: Tensor
    columns: Tensor | None
    unresolved: int


def decode_permuted(
    front: Front,
    rows: Tensor,
    propose: Propose,
    layer: Layer,
    search: Search,
    kind: Kind,
    *,
    opening: tuple[Tensor, Tensor] | None = None,
    vocabulary: int,
) -> Unpermuted:
    """Recover one noiseless sequence whose rows, columns or both were permuted.

    Args:
        front: partition A with public weights.
        rows: (T, D), as received.
        propose: ranks tokens for rows whose columns are in order.
        layer: public statistics of the cut.
        search: tolerances and the ladder.
        kind: what was permuted.
        opening: of :func:`sorted_openings`; made here when None and columns are permuted.
        vocabulary: V.
    """
    columns = None
    if kind != "rows":
        opening = opening or sorted_openings(front, vocabulary)
        columns = _columns(rows, opening, only_first=kind == "columns")
        rows = rows[:, columns]
    cache, free = front.new_cache(), torch.ones(len(rows), dtype=torch.bool)
    tokens, order, unresolved = [], [], 0
    with torch.inference_mode():
        for position in range(len(rows)):
            left = torch.tensor([position]) if kind == "columns" else free.nonzero()[:, 0]
            scale = layer.spread_later if position else layer.spread_first
            token, row, gap = _next(front, cache, rows[left], propose, search, position, scale, vocabulary)
            unresolved += gap > search.drifted * scale
            tokens.append(token)
            order.append(left[row])
            free[left[row]] = False
            front(torch.tensor([[token]]), cache=cache)
    return Unpermuted(torch.tensor(tokens), torch.stack(order), columns, int(unresolved))


def sorted_openings(front: Front, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Every token alone at position 0: its state with sorted coordinates (V, D), and the state itself (V, D)."""
    states = torch.cat([block for _, block in every_state(front, torch.empty(0, dtype=torch.long), vocabulary)])
    return states.sort(dim=1).values, states


def _columns(rows: Tensor, opening: tuple[Tensor, Tensor], *, only_first: bool) -> Tensor:
    """(D,): which received column holds each coordinate, from the row that is some token's at position 0.

    Coordinates that are equal to rounding may change places: that moves a state by no more than rounding.
    """
    ordered, states = opening
    rows = rows[:1] if only_first else rows
    distance = torch.cdist(rows.sort(dim=1).values, ordered)
    row, token = divmod(int(distance.argmin()), len(ordered))
    columns = torch.empty(rows.shape[1], dtype=torch.long)
    columns[states[token].argsort()] = rows[row].argsort()
    return columns


def _next(
    front: Front,
    cache: PartCache,
    rows: Tensor,
    propose: Propose,
    search: Search,
    position: int,
    scale: float,
    vocabulary: int,
) -> tuple[int, int, float]:
    """The token and the row (of those left, (n, D)) that agree best, and their squared distance.

    Candidates are what the inverter names for any of the rows, at the rank that the ladder has come to.
    """
    best, tried = (-1, 0, torch.inf), torch.zeros(vocabulary, dtype=torch.bool)
    for rung in (*(r for r in search.ladder if r < vocabulary), vocabulary):
        ids = torch.unique(propose(rows, position, rung))
        ids = ids[~tried[ids]]
        tried[ids] = True
        if not len(ids):
            continue
        for part in torch.split(ids, _FORWARDS):
            states = front(part[:, None], cache=fork(cache, torch.zeros_like(part)))[:, -1].float()
            gaps = (states.square().sum(1)[:, None] + rows.square().sum(1) - 2 * states @ rows.T).clamp_min(0)
            place, row = divmod(int(gaps.argmin()), len(rows))
            gap = float((states[place] - rows[row]).square().sum())
            if gap < best[2]:
                best = int(part[place]), row, gap
        if best[2] <= search.exact * scale:
            break
    return best


def _run(kind: Kind, view: ServerView, known: Knowledge, tick: Tick) -> Recovered:
    start = time.perf_counter()
    opening = None if kind == "rows" else sorted_openings(known.model.front, known.vocabulary)
    found = []
    for number, seen in enumerate(view.sightings):
        found.append(
            decode_permuted(
                known.model.front, torch.from_numpy(seen.rows), known.inverter.propose, known.layer, known.search, kind,
                opening=opening, vocabulary=known.vocabulary,
            )
        )  # fmt: skip
        tick(number + 1, len(view.sightings))
    return Recovered(
        attack=f"vocabulary-{kind}", keys=tuple(seen.key for seen in view.sightings),
        tokens=tuple(tuple(one.tokens.tolist()) for one in found), unresolved=sum(one.unresolved for one in found),
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def _blocked(kind: Kind) -> Callable[[ServerView, Threat], str | None]:
    def why(view: ServerView, threat: Threat) -> str | None:
        del threat
        if not view.permuted:
            return "nothing is permuted"
        if view.permuted != kind:
            return f"the defence permutes {view.permuted}"
        if view.noise.sigma:
            return "there is noise beside the permutation"
        return None if view.sightings else "the recording holds none of the wanted sequences"

    return why


def _attack(kind: Kind) -> Attack:
    return Attack(f"vocabulary-{kind}", _blocked(kind), lambda view, known, tick: _run(kind, view, known, tick))


ATTACKS = (_attack("rows"), _attack("columns"), _attack("both"))
