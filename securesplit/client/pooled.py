"""The unsplit model, trained on the texts of all clients in one place: what splitting and protecting cost is measured from here.

It takes the job's steps. In each round A and C learn what the job's mode of sharing lets them learn, with a fresh optimiser,
B learns all the time with one of its own; batches come as the clients make them, in turns, one from each. Where nothing is
summed A and C keep their optimiser and learn both factors, and in mode ``sequential`` a round has one client's batches. For
one client that is, without noise, the split's own training: equal losses at every step.

``plain`` is LoRA as one would train it without any of this: both factors of every layer, one optimiser from the first step to
the last, over the same batches in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import torch

from securesplit.client.joined import Joined
from securesplit.client.sharing import turn_in
from securesplit.client.train import Progress
from securesplit.data.batches import Batch
from securesplit.learning import recipe_of
from securesplit.model.descent import Descent
from securesplit.model.dropout import dropping, step_key
from securesplit.protocol.job import Job

__all__ = ["Fitted", "Texts", "descent_of", "one_step", "pooled", "train_pooled"]


@dataclass(frozen=True, slots=True)
class Texts:
    """One client's data as batches."""

    batches: tuple[Batch, ...]
    held_out: tuple[Batch, ...]

    @property
    def records(self) -> int:
        """How many are learnt."""
        return sum(len(batch.records) for batch in self.batches)


@dataclass(frozen=True, slots=True)
class Fitted:
    """How a training went.

    Attributes:
        losses: of every step, nats per token.
        curve: held-out, all clients' records together, before the first round and after each.
        samples: records that steps were made of, each time anew.
        bytes_up, bytes_down: what crossed the network, all clients together; 0 where nothing does.
    """

    losses: tuple[float, ...]
    curve: tuple[float, ...]
    samples: int
    bytes_up: int = 0
    bytes_down: int = 0


def train_pooled(model: Joined, job: Job, data: Sequence[Texts], progress: Progress, *, plain: bool = False) -> Fitted:
    """Train it for as many passes as the job has.

    Args:
        model: with fresh adapters; it is changed.
        job: of the split run.
        data: each client's, in the order of their names.
        progress: told of every step.
        plain: both factors of all parts learn in every round, with one optimiser.
    """
    held_out = [batch for texts in data for batch in texts.held_out]
    rounds, epochs = job.schedule.rounds, job.schedule.epochs
    turns = [_learning(job, data, number) for number in range(rounds)]
    total = epochs * sum(len(texts.batches) for turn in turns for texts in turn)
    name = "unsplit, plain LoRA" if plain else "unsplit"
    model.learn("both", "both")
    served, ends = descent_of(model.served(), job, "server"), descent_of(model.ends(), job, "client")
    losses, curve, samples = list[float](), [model.mean_loss(held_out)], 0
    for number, turn in enumerate(turns):
        if not plain and job.mode.summed:
            model.learn(turn_in(job, number).learned, "both")
            ends = descent_of(model.ends(), job, "client", moves=0 if ends is None else ends.moves)
        for batch in pooled(turn, epochs):
            losses.append(one_step(model, batch, job, len(losses), (served, ends)))
            samples += len(batch.records)
            progress(name, len(losses), total, losses[-1])
        if ends is not None:
            ends.finish()
        curve.append(model.mean_loss(held_out))
    return Fitted(tuple(losses), tuple(curve), samples)


def _learning(job: Job, data: Sequence[Texts], number: int) -> Sequence[Texts]:
    """Whose batches a round has: everybody's, or one client's, as :func:`securesplit.client.sharing.learns_in` has it."""
    return [data[number % len(data)]] if job.mode.mode == "sequential" else data


def pooled(data: Sequence[Texts], epochs: int) -> Iterator[Batch]:
    """The clients' batches in turns, pass after pass; a client that has no more is passed over."""
    for _ in range(epochs):
        for together in zip_longest(*(texts.batches for texts in data)):
            yield from (batch for batch in together if batch is not None)


def descent_of(
    parameters: list[torch.nn.Parameter], job: Job, side: Literal["client", "server"], *, moves: int = 0
) -> Descent | None:
    """The optimiser that this side uses, by the job's recipe; None where nothing learns."""
    return Descent(parameters, recipe_of(job, side), moves=moves) if parameters else None


def one_step(model: Joined, batch: Batch, job: Job, number: int, descents: Sequence[Descent | None]) -> float:
    """Forward, backward and one step of every optimiser; the loss before it, nats per token."""
    with dropping(model.parts, step_key(job.adapters.seed, "unsplit", number)):
        loss = model.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
    for descent in descents:
        if descent is not None:
            descent.step()
    return float(loss.detach())
