"""The client-only model: A straight into C, without any server. If the split does not beat it, the server gave nothing."""

from __future__ import annotations

import torch

from securesplit.client.client import Client
from securesplit.client.train import Progress
from securesplit.data.batches import Batch
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
    optimiser = torch.optim.AdamW(parameters, lr=job.optimiser.client_lr, weight_decay=0.0)
    schedule = job.schedule
    total, done, curve = schedule.rounds * schedule.epochs * len(batches), 0, [_evaluate(front, back, held_out)]
    for _ in range(schedule.rounds):
        for _ in range(schedule.epochs):
            for batch in batches:
                loss = back(front(batch.tokens), batch.labels)
                loss.backward()
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                done += 1
                progress("client-only model", done, total, float(loss.detach()))
        curve.append(_evaluate(front, back, held_out))
    return tuple(curve)


@torch.no_grad()
def _evaluate(front: Front, back: Back, batches: tuple[Batch, ...]) -> float:
    counts = [batch.scored for batch in batches]
    losses = [float(back(front(batch.tokens), batch.labels)) for batch in batches]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
