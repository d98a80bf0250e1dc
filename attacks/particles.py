"""Noise-aware beam search with a language model as its prior (BeamClean, Kale et al., 2025), behind any cut.

    hypotheses -> candidates (inverter, language model, favourites) -> exact states of A -> joint posterior -> keep some

A hypothesis's score is its exact joint log posterior over all rows so far, the clipping factor integrated out: at the
end every hypothesis has been scored on the whole sequence. What is kept is chosen as Fearnhead and Clifford (2003) choose
particles: all heavy hypotheses, and a fair sample of the light ones. With little noise that is a beam; with much it is a
sample of the prior, so that sums over the list are marginals, where the modes of a language model are loops.

Several answers come out: the best hypothesis; the marginal of each position; the best hypothesis refined by later rows
(attacks/refine.py); and the greedy answer of vocabulary-map. Which one names the most tokens depends on the noise, and the
attacker finds out on public text with the noise on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.candidates import Propose, Ranked
from attacks.language import Reader
from attacks.likelihood import errors_of, log_evidence
from attacks.view import Front, fork
from attacks.vocabulary import Scoring
from securesplit.model.parts import PartCache

__all__ = ["Breadth", "Found", "kept", "search"]

_FORWARDS = 128  # Candidates in one forward pass.


@dataclass(frozen=True, slots=True)
class Breadth:
    """How wide a search is.

    Attributes:
        hypotheses: K, kept at every position.
        inverter, language, favourites: candidates by each of the three, ranked under the leading hypothesis.
        narrow: candidates that every hypothesis tries exactly, chosen by the leader's likelihood and its own prior.
        shortlist: candidates of each position that are kept for refining.
    """

    hypotheses: int
    inverter: int
    language: int
    favourites: int
    narrow: int
    shortlist: int


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        best: (N, T), the hypothesis with the largest joint posterior.
        marginal: (N, T), at each position the token with the most posterior weight, given the rows up to it.
        joint: (N,), the best hypothesis's log posterior up to a constant of the rows.
        shortlist: (N, T, S), the likeliest tokens of each position, best first.
    """

    best: Tensor
    marginal: Tensor
    joint: Tensor
    shortlist: Tensor


@dataclass(slots=True)
class _Beam:
    """N K hypotheses: their caches, A and B over all rows so far, log prior, and log weight (-inf for an empty place)."""

    cache: PartCache
    reader: Reader
    tokens: Tensor
    cross: Tensor
    energy: Tensor
    prior: Tensor
    weight: Tensor


@dataclass(frozen=True, slots=True)
class _Pool:
    """Extensions (N, K M) of all hypotheses: parent, place in the candidates, token, and the sums they would have."""

    parent: Tensor
    place: Tensor
    token: Tensor
    cross: Tensor
    energy: Tensor
    prior: Tensor
    weight: Tensor


def search(
    front: Front,
    reader: Reader,
    rows: Tensor,
    propose: Propose,
    scoring: Scoring,
    breadth: Breadth,
    *,
    hints: Tensor,
    generator: torch.Generator,
) -> Found:
    """Decode N released sequences of one length.

    Args:
        front: partition A with public weights.
        reader: the prior, of N K hypotheses.
        rows: (N, T, D) float32, as received, with noise.
        propose: ranks tokens for rows.
        scoring: noise, public statistics, codec; its ``log_prior`` is not used.
        breadth: how wide.
        hints: (N, T) tokens that are tried besides: another decoder's answer.
        generator: which light hypotheses are kept.
    """
    count, length, _ = rows.shape
    errors = errors_of(rows, scoring.sigma, scoring.codec, releases=scoring.releases)
    precision = 1 / errors.variance.double()
    ranked = Ranked(propose, rows, scoring.layer.factor, breadth.inverter)
    beam = _opened(front, reader, count, breadth.hypotheses)
    marginal, shortlist = [], []
    with torch.inference_mode():
        for position in range(length):
            y, w = rows[:, position], precision[:, position]
            ids = torch.cat([_candidates(beam, ranked, scoring, breadth, position), hints[:, position, None]], dim=1)
            pool = _extended(front, beam, ids, y, w, scoring, breadth.narrow)
            share = torch.zeros(ids.shape, dtype=torch.float64)
            share.scatter_add_(1, pool.place, torch.softmax(pool.weight, dim=1))
            order = share.topk(min(breadth.shortlist, ids.shape[1]), dim=1).indices
            shortlist.append(ids.gather(1, order))
            marginal.append(shortlist[-1][:, 0])
            _advance(front, beam, pool, breadth.hypotheses, generator)
        joint = log_evidence(beam.cross, beam.energy, scoring.layer) + beam.prior
        joint = joint.masked_fill(beam.weight.isneginf(), -math.inf)
        best = joint.argmax(1)
        tokens = beam.tokens[torch.arange(count), best]
    return Found(tokens, torch.stack(marginal, 1), joint.amax(1), torch.stack(shortlist, 1))


def _opened(front: Front, reader: Reader, count: int, width: int) -> _Beam:
    zero = torch.zeros(count, width, dtype=torch.float64)
    weight = zero.clone()
    weight[:, 1:] = -math.inf  # The empty prefix is one hypothesis, not K equal ones.
    return _Beam(
        cache=front.new_cache(), reader=reader, tokens=torch.empty(count, width, 0, dtype=torch.long), cross=zero,
        energy=zero, prior=zero, weight=weight,
    )  # fmt: skip


def _candidates(beam: _Beam, ranked: Ranked, scoring: Scoring, breadth: Breadth, position: int) -> Tensor:
    """(N, C) tokens to try at a position; a token may occur twice, and its second place is then never used."""
    count, width = beam.weight.shape
    expected = torch.zeros(count, beam.reader.next.shape[1])
    given = beam.reader.next.view(count, width, -1)
    for k, share in enumerate(torch.softmax(beam.weight, dim=1).float().T):
        expected += share[:, None] * given[:, k].exp()
    liked = expected.topk(min(breadth.language, expected.shape[1]), dim=1).indices
    often = scoring.favourites[: breadth.favourites].expand(count, -1)
    return torch.cat([ranked.at(position, torch.arange(count), breadth.inverter), liked, often], dim=1)


def _states(front: Front, cache: PartCache, who: Tensor, ids: Tensor) -> Tensor:
    """States (M, D) of tokens ``ids`` (M,) after the cached prefixes ``who`` (M,)."""
    parts = zip(torch.split(who, _FORWARDS), torch.split(ids, _FORWARDS), strict=True)
    return torch.cat([front(mine[:, None], cache=fork(cache, some))[:, -1].float() for some, mine in parts])


def _extended(front: Front, beam: _Beam, ids: Tensor, y: Tensor, w: Tensor, scoring: Scoring, narrow: int) -> _Pool:
    """Every hypothesis with its likeliest candidates.

    Args:
        ids: (N, C) candidates. y: (N, D) rows. w: (N,) float64, 1 / variance of a coordinate.
    """
    (count, width), tried = beam.weight.shape, ids.shape[1]
    place = torch.arange(count)[:, None]
    evidence = log_evidence(beam.cross, beam.energy, scoring.layer)
    leader = beam.weight.argmax(1, keepdim=True)

    def sums(who: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of hypotheses ``who`` with tokens, both (N, M)."""
        flat = (place * width + who).reshape(-1)
        states = _states(front, beam.cache, flat, tokens.reshape(-1)).view(*tokens.shape, -1)
        return (
            beam.cross.gather(1, who) + w[:, None] * torch.einsum("nd,nmd->nm", y, states).double(),
            beam.energy.gather(1, who) + w[:, None] * states.square().sum(-1).double(),
        )

    lead = log_evidence(*sums(leader.expand(-1, tried), ids), scoring.layer) - evidence.gather(1, leader)
    # A token's second place among the candidates never wins.
    again = ((ids[:, :, None] == ids[:, None]) & torch.ones(tried, tried, dtype=torch.bool).tril(-1)).any(-1)
    lead = lead.masked_fill(again, -math.inf)
    given = beam.reader.next.view(count, width, -1).gather(2, ids[:, None].expand(-1, width, -1)).double()
    chosen = (lead[:, None] + given).topk(min(narrow, tried), dim=2).indices.flatten(1)
    parent = torch.arange(width).repeat_interleave(min(narrow, tried)).expand(count, -1)
    token = ids.gather(1, chosen)
    cross, energy = sums(parent, token)
    prior = given.flatten(1).gather(1, parent * tried + chosen)
    grown = log_evidence(cross, energy, scoring.layer) - evidence.gather(1, parent) + prior
    weight = (beam.weight.gather(1, parent) + grown).masked_fill(again.gather(1, chosen), -math.inf)
    return _Pool(parent, chosen, token, cross, energy, beam.prior.gather(1, parent) + prior, weight)


def _advance(front: Front, beam: _Beam, pool: _Pool, width: int, generator: torch.Generator) -> None:
    """Keep some extensions and read their tokens; a pool smaller than the list leaves places empty."""
    index, weight = kept(pool.weight, width, generator)
    count = len(index)
    parent, token = pool.parent.gather(1, index), pool.token.gather(1, index)
    flat = (parent + torch.arange(count)[:, None] * width).reshape(-1)
    beam.tokens = torch.cat(
        [beam.tokens.gather(1, parent[..., None].expand(-1, -1, beam.tokens.shape[2])), token[..., None]], 2
    )
    beam.cross, beam.energy = pool.cross.gather(1, index), pool.energy.gather(1, index)
    beam.prior, beam.weight = pool.prior.gather(1, index), weight
    if beam.tokens.shape[2] > 1:
        beam.cache = fork(beam.cache, flat)
    beam.reader.keep(flat)
    front(token.reshape(-1, 1), cache=beam.cache)
    beam.reader.read(token.reshape(-1))


def kept(weight: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of M weighted items to keep, so that sums over the kept ones are unbiased (Fearnhead and Clifford, 2003).

    With c so that ``sum_i min(1, c w_i) = count``, items of ``c w_i >= 1`` are kept with their weights; of the others as
    many as there are places left, by systematic sampling, each with weight 1 / c.

    Args:
        weight: (N, M) log weights; -inf for none.
        count: K.
        generator: of the sample.

    Returns:
        Indices (N, K), heaviest first, and normalised log weights (N, K); -inf for a place that is not filled.
    """
    p, order = torch.softmax(weight.double(), dim=1).sort(dim=1, descending=True)
    if p.shape[1] <= count:
        short = count - p.shape[1]
        padded = torch.nn.functional.pad(p, (0, short)).log()
        return torch.nn.functional.pad(order, (0, short)), padded
    # With the h heaviest kept for certain, c = (count - h) / (weight of the rest); the least h for which no other is certain.
    rest = p.flip(1).cumsum(1).flip(1)[:, :count]
    inverse = rest / (count - torch.arange(count))
    heavy = (p[:, :count] >= inverse).cumprod(1).sum(1, keepdim=True)
    scale = inverse.gather(1, heavy.clamp_max(count - 1))
    place = torch.arange(p.shape[1])
    light = (p / scale.clamp_min(1e-300)).masked_fill(place < heavy, 0.0)
    start = torch.rand(len(p), 1, dtype=torch.float64, generator=generator)
    steps = (light.cumsum(1) + start).floor()
    drawn = (torch.diff(steps, dim=1, prepend=start.floor()) > 0) | (place < heavy)
    # Rounding may draw one too many or too few; the heaviest of the rest make it even.
    rank = (drawn.double() * 2 + p).masked_fill(place < heavy, 4.0) - place * 1e-12
    index = rank.topk(count, dim=1).indices
    value = torch.where(index < heavy, p.gather(1, index), scale).masked_fill(p.gather(1, index) == 0, 0.0)
    return order.gather(1, index), (value / value.sum(1, keepdim=True)).log()
