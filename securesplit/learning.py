"""What a job says about learning, in the model's own words; the one place where client and server read it alike."""

from __future__ import annotations

from typing import Literal

from securesplit.model.descent import Recipe
from securesplit.protocol.job import Job

__all__ = ["recipe_of"]


def recipe_of(job: Job, side: Literal["client", "server"]) -> Recipe:
    """How this side's adapters move: A and C at a client, B at the server."""
    said = job.optimiser
    rate, span = (said.client_lr, said.client_steps) if side == "client" else (said.server_lr, said.server_steps)
    return Recipe(
        learning_rate=rate, weight_decay=said.weight_decay, betas=said.betas, schedule=said.schedule,
        warmup=said.warmup_of(span), span=span or 0, accumulate=said.accumulate, max_grad_norm=said.max_grad_norm,
    )  # fmt: skip
