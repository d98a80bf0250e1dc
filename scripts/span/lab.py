"""Clients whose updates are attacked in the laboratory: real parts of a model, real AdamW, the ring of the secure sum.

It stands in for a whole job where one would take too long: B is the public one and does not learn, nothing crosses a wire,
and there may be one client or two, whom no secure sum would take. What is attacked is what a server would open: the same
numbers in the same rounding. Noise is torch's seeded generator: nothing private is trained on, and nothing is released.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attacks.sums import RecordedSum
from securesplit.aggregate.config import largest_scale
from securesplit.aggregate.fixedpoint import Aggregate, quantise
from securesplit.data.batches import IGNORED
from securesplit.model.lora import (
    Layout,
    adapter_layout,
    adapter_parameters,
    add_adapters,
    read_adapters,
    set_trainable_factor,
    write_adapters,
)
from securesplit.model.parts import Back, Front, Middle
from securesplit.protocol.job import Job
from securesplit.server.recording import summed

__all__ = ["How", "Lab", "Noised", "job_of"]

How = Literal["gradient", "steps", "clipped"]
"""``gradient``: the textbook's, in float32; ``steps``: what clients send after local AdamW; ``clipped``: per-record
gradients, clipped, summed and noised, as in regime ``round``."""

Record = Sequence[int]


@dataclass(frozen=True, slots=True)
class Noised:
    """Clip C of a record's gradient, and the noise's deviation in one client's sum."""

    clip: float
    sigma: float


def job_of(
    *, rank: int, cut: tuple[int, int], targets: tuple[str, ...], rate: float = 2e-3, epochs: int = 1, batch: int = 4,
    alpha: float | None = None, weights: str | None = None, sharing: str = "alternating", clients: int = 3,
) -> Job:  # fmt: skip
    """A job with these numbers and otherwise those of examples/job.toml."""
    return Job.model_validate(
        {
            "name": "lab", "model": "lab", "cut": {"front": cut[0], "back": cut[1]},
            "adapters": {"rank": rank, "alpha": alpha or 2.0 * rank, "targets": targets, "seed": 7, "sharing": sharing},
            "optimiser": {"client_lr": rate, "server_lr": 1e-3},
            "schedule": {"rounds": 4, "epochs": epochs, "batch": batch},
            "sums": {
                "roster": tuple(f"c{i}" for i in range(max(3, clients))), "threshold": max(3, clients), "clip": 1.0,
                "blind": False, "weights": weights,
            },
        }
    )  # fmt: skip


class Lab:
    """The clients of a job, all at the round's common start.

    Args:
        front, middle, back: the public parts, fresh; they get the job's adapters here.
        job: what is run.
    """

    def __init__(self, front: Front, middle: Middle, back: Back, job: Job) -> None:
        self.job, self._middle, self._parts = job, middle, (front, back)
        adapters = job.adapters
        for part in self._parts:
            add_adapters(
                part,
                adapters.rank,
                adapters.alpha,
                adapters.targets,
                seed=adapters.seed,
                core=adapters.sharing == "core",
            )
        for parameter in middle.parameters():
            parameter.requires_grad_(False)  # noqa: FBT003 - torch's own signature

    def round(
        self, clients: Sequence[Sequence[Record]], number: int, how: How, noise: Noised | None = None
    ) -> RecordedSum:
        """What the server opens after one round of these clients, each with its records."""
        if how == "steps":
            updates = [self._moved(records, number) for records in clients]
            return self._opened(updates, [len(records) for records in clients], number)
        generator = torch.Generator().manual_seed(number)
        sums = [self._gradients(records, number, noise, generator) for records in clients]
        sigma = 0.0 if noise is None else noise.sigma / len(clients) ** 0.5
        return self._found(np.mean(sums, axis=0), len(clients), number, sent="gradients", sigma=sigma, grid=0.0)

    def advance(self, found: RecordedSum) -> None:
        """Let a round's mean move all clients, as after a secure sum of steps."""
        for part in self._parts:
            layout = Layout(tuple(t for t in adapter_layout(part).tensors if t.name in found.names))
            moved = [found.tensors[found.names.index(tensor.name)].reshape(-1) for tensor in layout.tensors]
            if moved:
                write_adapters(part, layout, read_adapters(part, layout) + np.concatenate(moved))

    def loss(self, records: Sequence[Record]) -> Tensor:
        """Mean over all labels, in nats, as a client computes it over one batch."""
        longest = max(map(len, records))
        tokens = torch.tensor([[*record, *[0] * (longest - len(record))] for record in records])
        labels = torch.tensor([[*record, *[IGNORED] * (longest - len(record))] for record in records])
        front, back = self._parts
        found: Tensor = back(self._middle(front(tokens)), labels)
        return found

    def _learn(self, number: int) -> list[Tensor]:
        """Let the round's factor learn; its parameters, in the order of the sum."""
        for part in self._parts:
            set_trainable_factor(part, summed(self.job.adapters.sharing, number))
        return [parameter for part in self._parts for parameter in adapter_parameters(part)]

    def _gradients(
        self, records: Sequence[Record], number: int, noise: Noised | None, generator: torch.Generator
    ) -> npt.NDArray[np.float64]:
        """One client's gradient over a batch; or its sum of clipped gradients with noise."""
        parameters = self._learn(number)
        if noise is None:
            return _flat(torch.autograd.grad(self.loss(records), parameters)).double().numpy()
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for record in records:
            own = _flat(torch.autograd.grad(self.loss([record]), parameters)).double()
            total += own * min(1.0, noise.clip / float(own.norm()))
        return (total + noise.sigma * torch.randn(total.shape, generator=generator, dtype=torch.float64)).numpy()

    def _moved(self, records: Sequence[Record], number: int) -> npt.NDArray[np.float64]:
        """How far AdamW moves one client's adapters; the client then stands where it stood."""
        parameters = self._learn(number)
        before = [parameter.detach().clone() for parameter in parameters]
        optimiser = torch.optim.AdamW(parameters, lr=self.job.optimiser.client_lr, weight_decay=0.0)
        size = self.job.schedule.batch
        for _ in range(self.job.schedule.epochs):
            for start in range(0, len(records), size):
                optimiser.zero_grad()
                self.loss(records[start : start + size]).backward()
                optimiser.step()
        moved = _flat(parameters).double() - _flat(before).double()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        return moved.numpy()

    def _opened(self, updates: list[npt.NDArray[np.float64]], weights: list[int], number: int) -> RecordedSum:
        """The mean as it comes out of the ring."""
        sums = self.job.sums
        most = 1 if sums.weights == "uniform" else 255
        weights = [min(weight, most) for weight in weights]
        scale = largest_scale(len(sums.roster), most)
        words = [
            quantise(update, weight, scale=scale, clip=sums.clip, w_max=most)[0]
            for update, weight in zip(updates, weights, strict=True)
        ]
        ring = np.sum(np.stack(words), axis=0, dtype=np.uint32)
        mean = Aggregate(ring, sums.roster[: len(updates)], scale, sums.clip).mean
        grid = sums.clip / (scale * sum(weights))
        return self._found(mean, len(updates), number, sent="steps", sigma=0.0, grid=grid, weight=sum(weights))

    def _found(
        self, mean: npt.NDArray[np.float64], clients: int, number: int, *, sent: Literal["steps", "gradients"],
        sigma: float, grid: float, weight: int = 1,
    ) -> RecordedSum:  # fmt: skip
        factor = summed(self.job.adapters.sharing, number)
        layout = [tensor for part in self._parts for tensor in adapter_layout(part, factor).tensors]
        tensors, start = [], 0
        for tensor in layout:
            size = tensor.shape[0] * tensor.shape[1]
            tensors.append(mean[start : start + size].reshape(tensor.shape).astype(np.float32))
            start += size
        return RecordedSum(
            round=number, peers=self.job.sums.roster[:clients], weight=weight, names=tuple(t.name for t in layout),
            tensors=tuple(tensors), sigma=sigma, sent=sent, grid=grid, job=self.job,
        )  # fmt: skip


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in values])
