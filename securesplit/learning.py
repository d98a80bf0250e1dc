"""What a job says about learning, in the model's own words; the one place where client and server read it alike."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import torch

from securesplit.model.descent import Recipe
from securesplit.model.lora import Layout, add_adapters, add_prefixes
from securesplit.model.parts import Part
from securesplit.model.precision import LossScale, cast_base
from securesplit.model.quantised import quantise_base
from securesplit.model.recompute import recompute_layers
from securesplit.protocol.adapters import Adapters, PartName
from securesplit.protocol.job import Job

__all__ = ["prepare", "recipe_of", "table_of", "tune"]

_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def tune(model: Any, adapters: Adapters, part: PartName) -> Layout:
    """Put what the job says of one part on it, or on an unsplit model that stands for it; see ``lora.add_adapters``.

    Raises:
        InputError: SS-1410 for targets that the part has not, SS-1411 where there are adapters already.
    """
    own = adapters.of(part)
    if own.method == "prefix":
        assert own.prefix_length is not None, "the job's own rule"
        return add_prefixes(model, own.prefix_length, seed=own.seed)
    return add_adapters(
        model, own.rank, own.alpha, own.targets, seed=own.seed, core=own.sharing == "core" and part != "middle",
        dropout=own.dropout, rslora=own.rslora, dora=own.dora, embedding=own.embedding and part == "front",
    )  # fmt: skip


def prepare(part: Part, job: Job) -> None:
    """Make a fresh part what the job says: its precision, its adapters, what of it is computed again.

    Raises:
        InputError: as :func:`tune`; SS-1251 where the base shall be quantised and cannot be.
    """
    kind = None if job.precision is None else job.precision.of(part.role)
    if kind in ("int8", "nf4"):
        quantise_base(part, kind)
    elif kind is not None:
        cast_base(part.module, _TYPES[kind])
    tune(part, job.adapters, part.role)
    if job.memory is not None and part.role in job.memory.checkpointing:
        recompute_layers(part)
    if kind == "f16":
        part.scale = LossScale()


def table_of(job: Job) -> str:
    """SHA-256 in hex of all that a job says of adapters; parts of one table fit together."""
    table = job.adapters.model_dump(mode="json", exclude_none=True)
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def recipe_of(job: Job, side: Literal["client", "server"]) -> Recipe:
    """How this side's adapters move: A and C at a client, B at the server."""
    said = job.optimiser
    rate, span = (said.client_lr, said.client_steps) if side == "client" else (said.server_lr, said.server_steps)
    return Recipe(
        learning_rate=rate, weight_decay=said.weight_decay, betas=said.betas, schedule=said.schedule,
        warmup=said.warmup_of(span), span=span or 0, accumulate=said.accumulate, max_grad_norm=said.max_grad_norm,
        seed=job.adapters.seed,
    )  # fmt: skip
