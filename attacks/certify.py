"""Proofs of a recovered token: nothing else in the vocabulary explains its row (SIPIT, Nikolaou et al., Theorem 3.2).

With Delta the distance from the right token's state to that of the nearest other token after the same prefix, recovery is
exact under any error shorter than Delta / 2. Both Delta and the proof need the state of *every* token after the prefix,
V forward passes of one position: dear behind layers, so that positions are sampled; a table look-up when A is the
embedding alone.

What it does not do: it proves tokens given their prefix. A prefix with a fault in it leaves no candidate that explains the
next row, so that a whole sequence of proved positions is proved from its start on; a sampled one is proved given the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.likelihood import Errors, errors_of
from attacks.view import Front, fork

__all__ = ["Proof", "certified_radius", "every_state", "proofs", "prove"]

_FORWARDS = 128


@dataclass(frozen=True, slots=True)
class Proof:
    """One position.

    Attributes:
        radius: Delta / 2, in the units of the received row (scaled by the clipping factor).
        explains: whether the named token explains the row within the errors.
        rivals: how many other tokens do so too.
    """

    radius: float
    explains: bool
    rivals: int

    @property
    def proven(self) -> bool:
        """Whether the named token, and no other, can be the right one."""
        return self.explains and not self.rivals


def every_state(front: Front, prefix: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The state of every token after a prefix, in blocks.

    Args:
        front: partition A.
        prefix: (t,) token ids; may be empty.
        vocabulary: V.

    Yields:
        Token ids (k,) and their states (k, D) float32, in the order of the vocabulary.
    """
    cache = front.new_cache()
    with torch.inference_mode():
        if len(prefix):
            front(prefix[None], cache=cache)
        for ids in torch.split(torch.arange(vocabulary), _FORWARDS):
            yield ids, front(ids[:, None], cache=fork(cache, torch.zeros_like(ids)))[:, -1].float()


def certified_radius(front: Front, prefix: Tensor, token: int, *, vocabulary: int, factor: float = 1.0) -> float:
    """Delta / 2 of one token after a prefix, over the whole vocabulary.

    Args:
        front: partition A, public weights.
        prefix: (t,) token ids.
        token: the right token.
        vocabulary: V; costs as many forward passes of one position.
        factor: clipping factor that states are scaled by.
    """
    with torch.inference_mode():
        target = front(torch.cat([prefix, torch.tensor([token])])[None])[0, -1].float()
        nearest = min(
            float((states - target).square().sum(-1).masked_fill(ids == token, torch.inf).min())
            for ids, states in every_state(front, prefix, vocabulary)
        )
    return factor * math.sqrt(nearest) / 2


def prove(
    front: Front, prefix: Tensor, token: int, row: Tensor, errors: Errors, *, vocabulary: int, factor: float = 1.0
) -> Proof:
    """Try every token at one position.

    Args:
        front, prefix, token, vocabulary: as in :func:`certified_radius`.
        row: (D,), as received.
        errors: of this row, without other axes. With noise the ball holds the right state but once in 30 000 rows: the
            proof is then as certain as that.
        factor: the clipping factor that states are multiplied by before they are compared.
    """
    with torch.inference_mode():
        target = factor * front(torch.cat([prefix, torch.tensor([token])])[None])[0, -1].float()
        explains, rivals, nearest = bool(_within(row, target[None], errors)), 0, torch.inf
        for ids, states in every_state(front, prefix, vocabulary):
            scaled, other = factor * states, ids != token
            rivals += int((_within(row, scaled, errors) & other).sum())
            nearest = min(nearest, float((scaled - target).square().sum(-1).masked_fill(~other, torch.inf).min()))
    return Proof(radius=math.sqrt(nearest) / 2, explains=explains, rivals=rivals)


def proofs(front: Front, rows: Tensor, tokens: Tensor, *, codec: str, vocabulary: int, most: int) -> list[Proof]:
    """Proofs of a sample of recovered noiseless positions, the same places in every run.

    Args:
        front: partition A, public weights.
        rows: (N, T, D), as received, without noise and without a clip.
        tokens: (N, T), as recovered.
        codec: as in :func:`attacks.likelihood.errors_of`.
        vocabulary: V.
        most: at most so many positions; each costs V forward passes of one position.
    """
    count, length, _ = rows.shape
    errors = errors_of(rows, 0.0, codec)
    # The golden ratio spreads positions evenly, however many are drawn.
    places = dict.fromkeys((i * count // most, int(i * 0.618034 % 1 * length)) for i in range(most))
    return [
        prove(
            front, tokens[n, :t], int(tokens[n, t]), rows[n, t],
            Errors(0.0, errors.half[n, t], errors.variance[n, t]), vocabulary=vocabulary,
        )
        for n, t in places
    ]  # fmt: skip


def _within(row: Tensor, states: Tensor, errors: Errors) -> Tensor:
    """Which states (k, D) can have become the row (D,): (k,) bool."""
    if not errors.sigma:
        return errors.boxed(row, states)
    return (states - row).square().sum(-1) <= errors.ball()
