"""The client-only model: A straight into C, without any server. If the split does not beat it, the server gave nothing."""

from __future__ import annotations

import torch

from securesplit.client.client import Client
from securesplit.client.train import Progress
from securesplit.data.batches import Batch
from securesplit.learning import recipe_of
from securesplit.model.descent import Descent
from securesplit.model.dropout import dropping, step_key
from securesplit.model.embedding import drift_parameters
from securesplit.model.lora import adapter_parameters, set_trainable_factor
from securesplit.model.parts import Back, Front
from securesplit.protocol.job import Job


def train_alone(
    client: Client, batches: tuple[Batch, ...], held_out: tuple[Batch, ...], progress: Progress
) -> tuple[float, ...]:
    """Train A and C joined directly, from fresh adapters, for as many local steps as the job has.

    Nothing is sent and nothing is charged. The client's own adapters are replaced: save them before.

    Returns:
        Held-out loss before training and after each round's worth of steps, nats per token.
    """
    client.reset()
    return train_ends(client.front, client.back, client.job, batches, held_out, progress)


def train_ends(
    front: Front, back: Back, job: Job, batches: tuple[Batch, ...], held_out: tuple[Batch, ...], progress: Progress
) -> tuple[float, ...]:
    """The same for parts with fresh adapters of the job, wherever they come from."""
    for part in (front, back):
        set_trainable_factor(part, "both")
    parameters = [p for part in (front, back) for p in adapter_parameters(part)]
    parameters += [p for _, p in drift_parameters(front)]
    recipe, moves = recipe_of(job, "client"), 0
    schedule = job.schedule
    total, done, curve = schedule.rounds * schedule.epochs * len(batches), 0, [_evaluate(front, back, held_out)]
    for _ in range(schedule.rounds):
        descent = Descent(parameters, recipe, moves=moves)
        for _ in range(schedule.epochs):
            for batch in batches:
                with dropping((front, back), step_key(job.adapters.seed, "alone", done)):
                    loss = back(front(batch.tokens), batch.labels)
                    loss.backward()
                descent.step()
                done += 1
                progress("client-only model", done, total, float(loss.detach()))
        descent.finish()
        moves = descent.moves
        curve.append(_evaluate(front, back, held_out))
    return tuple(curve)


@torch.no_grad()
def _evaluate(front: Front, back: Back, batches: tuple[Batch, ...]) -> float:
    counts = [batch.scored for batch in batches]
    losses = [float(back(front(batch.tokens), batch.labels)) for batch in batches]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
