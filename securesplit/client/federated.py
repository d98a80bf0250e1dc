"""Federated averaging of the whole model: every client holds A, B and C, trains on its own texts, and sends its adapters.

It is what one would do without a split, where clients can run the whole model. Each round every client starts from the mean,
takes the job's local passes with fresh optimisers, and the server averages what changed, weighted as the job's secure sums
weight. What learns and what is averaged is the job's mode of sharing, here in B as well as in A and C: with ``alternating``,
``frozen-a`` and ``core`` the mean of updates is the update of the mean model; with ``share-a`` each client keeps a B of its
own, and is judged with it; with ``naive`` the mean is no model's, as it is there.

Bytes are counted as plain float32 numbers, up and down for each client and round, without any encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from securesplit.admit import weight_cap
from securesplit.client.joined import Joined
from securesplit.client.pooled import Fitted, Texts, descent_of, one_step
from securesplit.client.sharing import turn_of
from securesplit.client.train import Progress
from securesplit.data.batches import Batch
from securesplit.model.lora import Learned
from securesplit.protocol.job import Job

__all__ = ["train_federated"]

_FLOAT = 4


def train_federated(
    model: Joined, job: Job, data: Sequence[Texts], progress: Progress, finished: Callable[[int], None]
) -> Fitted:
    """Train it for as many rounds as the job has.

    Args:
        model: with fresh adapters, alike in B (see :class:`Joined`); it is every client's in turn.
        job: of the split run.
        data: each client's.
        progress: told of every step.
        finished: called for each client by number, while ``model`` is that client's last one.
    """
    states = [model.read()] * len(data)
    weights = np.array([min(texts.records, weight_cap(job, 0.0)) for texts in data], dtype=np.float64)
    weights /= weights.sum()
    total = job.schedule.rounds * job.schedule.epochs * sum(len(texts.batches) for texts in data)
    losses, curve, sent = list[float](), [_mean(model, states, data)], 0
    moves = [0] * len(data)
    for number in range(job.schedule.rounds):
        turn = turn_of(job.adapters.shared, number)
        start = _of(model, states[0], turn.summed)
        moved = np.zeros(len(start))
        for i, texts in enumerate(data):
            model.write(states[i])
            model.learn(turn.learned, turn.learned)
            made, moves[i] = _passes(model, job, texts.batches, moves[i])
            for loss in made:
                losses.append(loss)
                progress("FedAvg of the whole model", len(losses), total, loss)
            moved += weights[i] * (model.read(turn.summed).astype(np.float64) - start)
            states[i] = model.read()
        mean = (start.astype(np.float64) + moved).astype(np.float32)
        for i, state in enumerate(states):
            model.write(state)
            model.write(mean, turn.summed)
            states[i] = model.read()
        sent += _FLOAT * len(start) * len(data)
        curve.append(_mean(model, states, data))
    for i, state in enumerate(states):
        model.write(state)
        finished(i)
    samples = job.schedule.rounds * job.schedule.epochs * sum(texts.records for texts in data)
    return Fitted(tuple(losses), tuple(curve), samples, bytes_up=sent, bytes_down=sent)


def _passes(model: Joined, job: Job, batches: Sequence[Batch], moves: int) -> tuple[list[float], int]:
    """One client's local work: the losses of its steps, and where its schedule stands then.

    As in the split, gradients that still wait at a round's end make a move of their own.
    """
    descents = (
        descent_of(model.ends(), job, "client", moves=moves),
        descent_of(model.served(), job, "server", moves=moves),
    )
    steps = (batch for _ in range(job.schedule.epochs) for batch in batches)
    losses = [one_step(model, batch, job, number, descents) for number, batch in enumerate(steps)]
    for descent in descents:
        if descent is not None:
            descent.finish()
    return losses, max((d.moves for d in descents if d is not None), default=moves)


def _of(model: Joined, state: npt.NDArray[np.float32], factor: Learned) -> npt.NDArray[np.float32]:
    model.write(state)
    return model.read(factor)


def _mean(model: Joined, states: Sequence[npt.NDArray[np.float32]], data: Sequence[Texts]) -> float:
    """Held-out loss of all clients' records, each under its own client's model."""
    total = count = 0.0
    for state, texts in zip(states, data, strict=True):
        model.write(state)
        tokens = sum(batch.scored for batch in texts.held_out)
        total += model.mean_loss(texts.held_out) * tokens
        count += tokens
    return total / count
