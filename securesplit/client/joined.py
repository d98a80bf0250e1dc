"""The parts of one model in one process, with a job's adapters and no wire between them: what a split is compared with.

The parts in a row compute what the whole model computes, bit for bit, and the adapters start from the job's public seed as
they do at clients and server. So this is the unsplit model, and without its middle it is what a client could do alone.

What it does not do: nothing is clipped, noised or charged. Its text lies where it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from securesplit.client.noted import record_losses_of
from securesplit.data.batches import Batch
from securesplit.learning import prepare
from securesplit.model.embedding import drift_parameters
from securesplit.model.lora import (
    Learned,
    adapter_layout,
    adapter_parameters,
    add_adapters,
    read_adapters,
    set_trainable_factor,
    write_adapters,
)
from securesplit.model.parts import Back, Front, Middle, Part
from securesplit.model.store import load_back, load_front, load_middle
from securesplit.protocol.job import Job
from securesplit.runs.losses import RecordLoss

__all__ = ["Joined"]


class Joined:
    """A, B and C, or A and C, one behind the other.

    Args:
        front, middle, back: without adapters, which are added here; no middle for what a client has.
        job: names the adapters and learning rates.
        alike: give B a core, too, where the job's clients have one; else B's adapter has two factors, as at a server.
    """

    def __init__(self, front: Front, middle: Middle | None, back: Back, job: Job, *, alike: bool = False) -> None:
        self.front, self.middle, self.back, self._job = front, middle, back, job
        self.parts: tuple[Part, ...] = (front, back) if middle is None else (front, middle, back)
        for part in self.parts:
            if alike and part is middle and job.adapters.shared == "core":
                own = job.adapters.of("middle")
                add_adapters(part, own.rank, own.alpha, own.targets, seed=own.seed, core=True)
            else:
                prepare(part, job)

    @classmethod
    def load(cls, directory: Path, job: Job, *, server: bool = True, alike: bool = False) -> Joined:
        """From a model directory; with ``server`` it must hold all three parts.

        Raises:
            InputError, CheckFailed: as :func:`securesplit.model.store.load_front`.
        """
        middle = load_middle(directory) if server else None
        return cls(load_front(directory), middle, load_back(directory), job, alike=alike)

    def learn(self, ends: Learned | None, middle: Learned | None) -> None:
        """Which factors learn in A and C, and which in B; None for none."""
        for part in self.parts:
            set_trainable_factor(part, middle if part is self.middle else ends)

    def ends(self) -> list[nn.Parameter]:
        """What learns in A and C now."""
        drift = [p for _, p in drift_parameters(self.front) if p.requires_grad]
        return [*(p for part in (self.front, self.back) for p in adapter_parameters(part)), *drift]

    def served(self) -> list[nn.Parameter]:
        """What learns in B now."""
        return [] if self.middle is None else list(adapter_parameters(self.middle))

    def logits(self, batch: Batch) -> Tensor:
        """Of every position, (B, T, V)."""
        logits: Tensor = self.back(self._mixed(batch))
        return logits

    def loss(self, batch: Batch) -> Tensor:
        """Of one batch, nats per token, with its graph."""
        loss: Tensor = self.back(self._mixed(batch), batch.labels)
        return loss

    @torch.no_grad()
    def mean_loss(self, batches: Sequence[Batch]) -> float:
        """Over the predicted tokens of several batches, nats per token."""
        counts = [batch.scored for batch in batches]
        return sum(float(self.loss(b)) * count for b, count in zip(batches, counts, strict=True)) / sum(counts)

    @torch.no_grad()
    def record_losses(self, batches: Sequence[Batch]) -> tuple[RecordLoss, ...]:
        """Each record's loss, by its place in the data."""
        found = [loss for batch in batches for loss in record_losses_of(batch, self.logits(batch))]
        return tuple(sorted(found, key=lambda loss: loss.source))

    @torch.no_grad()
    def named_right(self, batches: Sequence[Batch]) -> tuple[bool, ...] | None:
        """Whether each record's class was named, in the order of its place in the data; None where there are no classes."""
        found: list[tuple[int, bool]] = []
        for batch in batches:
            if batch.classes is None:
                return None
            asked = self.logits(batch)[:, -2, list(batch.choices)]  # What follows the text, as the loss has it.
            found += zip(batch.sources, (asked.argmax(1) == batch.classes).tolist(), strict=True)
        return tuple(right for _, right in sorted(found))

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], count: int, *, stop: int | None) -> list[int]:
        """The most likely tokens behind a prompt, one by one.

        Args:
            prompt: at least one token.
            count: at most so many.
            stop: the token that ends a text; it is not among the answer.
        """
        caches = [part.new_cache() for part in self.parts]
        rows, new = torch.tensor([list(prompt)]), list[int]()
        while len(new) < count:
            hidden: Any = rows
            for part, cache in zip(self.parts[:-1], caches, strict=False):
                hidden = part(hidden, cache=cache)
            token = int(self.back(hidden, cache=caches[-1], logits_to_keep=1)[0, -1].argmax())
            if token == stop:
                break
            new.append(token)
            rows = torch.tensor([[token]])
        return new

    def read(self, factor: Learned | None = None) -> npt.NDArray[np.float32]:
        """Values of all adapters, or of one factor of each, as one vector."""
        return np.concatenate([read_adapters(part, adapter_layout(part, factor)) for part in self.parts])

    def write(self, values: npt.NDArray[np.float32], factor: Learned | None = None) -> None:
        """Set them from one vector."""
        start = 0
        for part in self.parts:
            layout = adapter_layout(part, factor)
            write_adapters(part, layout, values[start : start + layout.size])
            start += layout.size

    def _mixed(self, batch: Batch) -> Tensor:
        hidden: Tensor = self.front(batch.tokens)
        return hidden if self.middle is None else self.middle(hidden)
