"""Refining a recovered sequence: re-try the likeliest tokens of each position, given all the rows after it.

Left to right, a token is chosen before the rows after it are read, and a wrong one misleads what follows. Afterwards both
can be mended: block coordinate ascent of the joint posterior, position by position, the rest held fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.language import Reader
from attacks.likelihood import errors_of, log_evidence
from attacks.view import Front, fork
from attacks.vocabulary import Scoring
from securesplit.model.parts import PartCache

__all__ = ["Effort", "forward_window", "refine"]

_FORWARDS = 128


@dataclass(frozen=True, slots=True)
class Effort:
    """How much refining is done.

    Attributes:
        sweeps: at most; fewer when nothing changes.
        window: rows after a position that are looked at when its token changes; beyond, its trace is neglected.
        spoken: tokens after a position whose prior is looked at.
        margin: nats by which a challenger may trail before that prior is asked.
    """

    sweeps: int
    window: int
    spoken: int
    margin: float


def forward_window(front: Front, cache: PartCache, who: Tensor, fed: Tensor) -> Tensor:
    """States (M, L, D) of token windows ``fed`` (M, L) after the cached prefixes ``who`` (M,), a block at a time."""
    at_once = max(1, _FORWARDS // fed.shape[1])
    parts = zip(torch.split(who, at_once), torch.split(fed, at_once), strict=True)
    return torch.cat([front(mine, cache=fork(cache, some)).float() for some, mine in parts])


class _Sums:
    """<y_t, h_t> / v_t and |h_t|^2 / v_t for every row of every sequence: (N, T) float64 each."""

    def __init__(self, rows: Tensor, scoring: Scoring) -> None:
        self.rows, self.layer = rows, scoring.layer
        variance = errors_of(rows, scoring.sigma, scoring.codec, releases=scoring.releases).variance
        self.precision = 1 / variance.double()
        self.cross = torch.zeros(rows.shape[:2], dtype=torch.float64)
        self.energy = torch.zeros_like(self.cross)

    def of(self, states: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The two for states (N, S, L, D) of rows start..start+L: (N, S, L) each."""
        end = start + states.shape[2]
        w = self.precision[:, None, start:end]
        # In float64: a later row's trace of one token is small beside the row.
        cross = torch.einsum("nld,nsld->nsl", self.rows[:, start:end].double(), states.double()) * w
        return cross, states.double().square().sum(-1) * w

    def evidence(self, cross: Tensor, energy: Tensor, start: int) -> Tensor:
        """Log evidence (N, S) of sequences whose rows start..start+L have these sums, and the others what they had."""
        end = start + cross.shape[2]
        outside = [kept.sum(1) - kept[:, start:end].sum(1) for kept in (self.cross, self.energy)]
        return log_evidence(outside[0][:, None] + cross.sum(2), outside[1][:, None] + energy.sum(2), self.layer)


@torch.inference_mode()
def refine(
    front: Front,
    reader: Reader,
    rows: Tensor,
    tokens: Tensor,
    shortlist: Tensor,
    scoring: Scoring,
    effort: Effort,
) -> Tensor:
    """Improve a recovered sequence until a sweep changes nothing.

    Args:
        front: partition A.
        reader: the prior, of N hypotheses that have read nothing but the sentinel; left so.
        rows: (N, T, D), as received, with noise.
        tokens: (N, T), to start from.
        shortlist: (N, T, S), what else is tried.
        scoring: noise, public statistics, codec.
        effort: how much.

    Returns:
        (N, T). Neglected traces beyond the window apart, its joint posterior is not below that of ``tokens``.
    """
    tokens, sums = tokens.clone(), _Sums(rows, scoring)
    states = front(tokens).float()[:, None]
    sums.cross, sums.energy = (part[:, 0] for part in sums.of(states, 0))
    for _ in range(effort.sweeps):
        before = tokens.clone()
        _sweep(front, reader.twin(), sums, tokens, shortlist, effort)
        if torch.equal(before, tokens):
            break
    return tokens


def _sweep(front: Front, reader: Reader, sums: _Sums, tokens: Tensor, shortlist: Tensor, effort: Effort) -> None:
    """One pass from left to right; changes ``tokens`` and ``sums``."""
    count, length = tokens.shape
    cache, everyone = front.new_cache(), torch.arange(count)
    for position in range(length):
        tried = torch.cat([tokens[:, position, None], shortlist[:, position]], dim=1)
        after = tokens[:, position + 1 : position + 1 + effort.window]
        fed = torch.cat([tried[..., None], after[:, None].expand(-1, tried.shape[1], -1)], dim=2)
        states = forward_window(front, cache, everyone.repeat_interleave(tried.shape[1]), fed.flatten(0, 1))
        cross, energy = sums.of(states.view(*fed.shape, -1), position)
        evidence = sums.evidence(cross, energy, position)
        score = evidence + reader.next.gather(1, tried).double()
        score[:, 1:].masked_fill_(shortlist[:, position] == tokens[:, position, None], -torch.inf)
        rival = score[:, 1:].argmax(1) + 1
        chosen = _duel(reader, fed[:, :, : 1 + effort.spoken], evidence, score, rival, effort.margin)
        tokens[:, position] = tried[everyone, chosen]
        end = position + fed.shape[2]
        sums.cross[:, position:end], sums.energy[:, position:end] = cross[everyone, chosen], energy[everyone, chosen]
        front(tokens[:, position, None], cache=cache)
        reader.read(tokens[:, position])


def _duel(reader: Reader, fed: Tensor, evidence: Tensor, score: Tensor, rival: Tensor, margin: float) -> Tensor:
    """The place (N,) of the better of the present token, place 0, and its rival, by what they make of what follows."""
    close = (score.gather(1, rival[:, None])[:, 0] > score[:, 0] - margin).nonzero()[:, 0]
    chosen = torch.zeros_like(rival)
    if len(close):
        both = torch.cat([fed[close, 0], fed[close, rival[close]]])
        spoken = reader.continuation(close.repeat(2), both).view(2, -1)
        present, other = evidence[close, 0] + spoken[0], evidence[close, rival[close]] + spoken[1]
        chosen[close] = torch.where(other > present, rival[close], 0)
    return chosen
