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


def train_alone(
    client: Client, batches: tuple[Batch, ...], held_out: tuple[Batch, ...], progress: Progress
) -> tuple[float, ...]:
    """Train A and C joined directly, from fresh adapters, for as many local steps as the job has.

    Nothing is sent and nothing is charged. The client's own adapters are replaced: save them before.

    Returns:
        Held-out loss before training and after each round's worth of steps, nats per token.
    """
    client.reset()
    for part in (client.front, client.back):
        set_trainable_factor(part, "both")
    parameters = [p for part in (client.front, client.back) for p in adapter_parameters(part)]
    parameters += [p for _, p in drift_parameters(client.front)]
    recipe, moves = recipe_of(client.job, "client"), 0
    schedule = client.job.schedule
    total, done, curve = schedule.rounds * schedule.epochs * len(batches), 0, [_evaluate(client, held_out)]
    for _ in range(schedule.rounds):
        descent = Descent(parameters, recipe, moves=moves)
        for _ in range(schedule.epochs):
            for batch in batches:
                with dropping((client.front, client.back), step_key(client.job.adapters.seed, "alone", done)):
                    loss = client.back(client.front(batch.tokens), batch.labels)
                    loss.backward()
                descent.step()
                done += 1
                progress("client-only model", done, total, float(loss.detach()))
        descent.finish()
        moves = descent.moves
        curve.append(_evaluate(client, held_out))
    return tuple(curve)


@torch.no_grad()
def _evaluate(client: Client, batches: tuple[Batch, ...]) -> float:
    counts = [batch.scored for batch in batches]
    losses = [float(client.back(client.front(batch.tokens), batch.labels)) for batch in batches]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
