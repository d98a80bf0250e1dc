"""The copies of B's adapters: one that all clients share, or one for each group, averaged now and then.

The frozen base is in memory once; a copy costs its adapters and their optimiser. Evaluation and generation of a client use its
own copy, and B itself holds the last mean.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from securesplit.model.descent import NamedTensor, Recipe
from securesplit.model.parts import Middle
from securesplit.server.learner import Learner

__all__ = ["Fleet"]

_log = logging.getLogger(__name__)


class Fleet:
    """See the module.

    Args:
        middle: B, with adapters.
        recipe: of each copy's optimiser.
        copies: names of the clients of each copy; none for one that all share.
    """

    def __init__(self, middle: Middle, recipe: Recipe, copies: tuple[tuple[str, ...], ...] = ()) -> None:
        self.common = Learner(middle, recipe)
        self._copies = tuple(Learner(middle, recipe, own=True) for _ in copies)
        self._of = {name: learner for learner, names in zip(self._copies, copies, strict=True) for name in names}
        self._learnt = [0] * len(self._copies)

    def of(self, client: str) -> Learner:
        """The copy that this client learns with; guests use the last mean."""
        return self._of.get(client, self.common)

    def computing(self, client: str, former: Sequence[Tensor] | None = None) -> AbstractContextManager[None]:
        """B computes with the copy of this client, or with the values that one had before, and learns nothing."""
        return self.of(client).installed() if former is None else self.common.lent(former)

    def values(self, clients: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
        """The adapters that each of these clients computes with now; one object for those that share a copy."""
        taken: dict[Learner, tuple[Tensor, ...]] = {}
        for learner in (self.of(client) for client in clients):
            if learner not in taken:
                taken[learner] = learner.values()
        return {client: taken[self.of(client)] for client in clients}

    @property
    def waiting(self) -> frozenset[str]:
        """Clients whose gradients are due."""
        return frozenset(client for learner in (self.common, *self._copies) for client in learner.waits_for)

    def learnt(self, client: str, sequences: int) -> None:
        """A copy has learnt from so many sequences of a client."""
        if (learner := self._of.get(client)) is not None:
            self._learnt[self._copies.index(learner)] += sequences

    def average(self, *, uniform: bool) -> None:
        """Give all copies, and B, the mean of those that have learnt since the last one.

        Means are taken in double precision and in the copies' order, so that they are the same wherever they are computed. A
        copy that holds NaN or infinity would give them to all; it has no part in the mean, and gets it.

        Args:
            uniform: each copy counts the same, instead of by the sequences it has learnt from.
        """
        sound = [all(bool(torch.isfinite(p).all()) for p in copy.parameters) for copy in self._copies]
        if not all(sound):
            _log.warning(
                "%d cop(ies) of B's adapters hold NaN or infinity and are left out of a mean", sound.count(False)
            )
        weights = [(float(n > 0) if uniform else float(n)) * ok for n, ok in zip(self._learnt, sound, strict=True)]
        if not any(weights):
            return
        total = sum(weights)
        means = []
        for values in zip(*(copy.parameters for copy in self._copies), strict=True):
            pairs = [(v, w) for v, w in zip(values, weights, strict=True) if w]
            mean = sum(((v.detach().double() * (w / total)) for v, w in pairs), torch.zeros((), dtype=torch.float64))
            means.append(mean)
        for learner in (self.common, *self._copies):
            learner.take(means)
        self._learnt = [0] * len(self._copies)

    def state(self) -> tuple[NamedTensor, ...]:
        """Everything that later steps and means depend on, without graphs."""
        kept = [NamedTensor("learnt", torch.tensor(self._learnt, dtype=torch.int64))]
        for number, learner in enumerate((self.common, *self._copies)):
            kept += [NamedTensor(f"{number}.{piece.name}", piece.value) for piece in learner.state()]
        return tuple(kept)

    def restore(self, state: Sequence[NamedTensor]) -> None:
        """Go on from what :meth:`state` gave for the same job.

        Raises:
            InputError: SS-1250 when it is of another job's adapters.
        """
        for number, learner in enumerate((self.common, *self._copies)):
            stem = f"{number}."
            learner.restore([NamedTensor(p.name.removeprefix(stem), p.value) for p in state if p.name.startswith(stem)])
        self._learnt = next(([int(n) for n in p.value] for p in state if p.name == "learnt"), self._learnt)
