"""The training loop of one client: local work, then a secure sum, round after round.

Three regimes, chosen by the policy and by nobody else (the study behind them: docs/threat-model.md):

* ``frozen``: A and B never change; each record is released once; C learns for any number of epochs on remembered
  answers; C's update enters a blind sum.
* ``round``: A and C stand still within a round; per-record gradients are clipped and summed, the sum is noised, and only
  that moves A and C, by the same optimiser step at every client. B learns from noised gradients.
* ``open``: policy UnsafeNoPrivacy. A, B and C learn at every step, as in SplitFed; nothing is protected.

One LoRA factor learns per round and the other stands still, in turns, so that the mean of updates is the update of the
mean model, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from securesplit.aggregate.answered import AnswerLog
from securesplit.aggregate.fixedpoint import Words
from securesplit.client.client import Client
from securesplit.client.rounds import secure_sum
from securesplit.data.batches import Batch
from securesplit.errors import LocalProtocolError
from securesplit.model.lora import Factor
from securesplit.policy.schema import Gaussian
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.gate import ReleasedUpdate
from securesplit.privacy.plan import plan_for

Progress = Callable[[str, int, int, float | None], None]
"""(what, done, total, loss or None)"""


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What this site keeps of a round. All of it stays here.

    Attributes:
        number: of the round.
        losses: of each local step, nats per token.
        survivors: clients whose updates are in the sum.
        total_weight: sum of their weights.
        contribution: this client's quantised part of the ring sum.
        ring_sum: the opened sum.
    """

    number: int
    losses: tuple[float, ...]
    survivors: tuple[str, ...]
    total_weight: int
    contribution: Words
    ring_sum: Words


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of a run on this site.

    Attributes:
        steps: local optimiser steps, or record gradients in regime ``round``.
        curve: held-out loss before the first round and after each, nats per token.
        rounds: one record each.
    """

    steps: int
    curve: tuple[float, ...]
    rounds: tuple[RoundRecord, ...]


class Trainer:
    """Runs a job on one site.

    Args:
        client: this site.
        batches: training data.
        held_out: evaluation data; each of its records is released, and charged, like any other.
        answers: remembers which sums were answered.
        progress: told of every step.
    """

    def __init__(
        self,
        client: Client,
        batches: tuple[Batch, ...],
        held_out: tuple[Batch, ...],
        *,
        answers: AnswerLog,
        progress: Progress,
    ) -> None:
        self._client = client
        self._batches = batches
        self._held_out = held_out
        self._answers = answers
        self._progress = progress
        self._steps = 0

    def run(self) -> Trained:
        """All rounds of the job."""
        rounds = self._client.job.schedule.rounds
        if self._client.regime == "frozen":  # Before the first release, so that a run that cannot share sends nothing.
            self._client.gate.reserve_for_peers()
        curve, records = [self._evaluate()], []
        for number in range(rounds):
            records.append(self._round(number))
            curve.append(self._evaluate())
        return Trained(steps=self._steps, curve=tuple(curve), rounds=tuple(records))

    def _evaluate(self) -> float:
        self._client.train(None)
        return self._client.evaluate(self._held_out)

    def _round(self, number: int) -> RoundRecord:
        client = self._client
        factor: Factor = "B" if number % 2 == 0 else "A"  # B starts at zero, so A has no gradient before B has moved.
        frozen = client.frozen_digest(number, factor)
        client.train(factor)
        start = client.read(factor)
        update, losses = (
            self._record_gradients(number) if client.regime == "round" else self._local_steps(number, factor, start)
        )
        client.train(None)
        weight = 1 if client.regime == "round" else sum(len(batch.records) for batch in self._batches)
        assert client.link.folder is not None
        self._progress(f"round {number + 1}: secure sum, waits for the roster", 0, 1, None)
        opened, contribution = secure_sum(
            client.link,
            client.link.folder,
            client.policy,
            update,
            weight=weight,
            number=number,
            frozen=frozen,
            answers=self._answers,
        )
        if client.regime == "round":
            self._common_step(opened.mean, factor)
        else:
            client.write((start.astype(np.float64) + opened.mean).astype(np.float32), factor)
        return RoundRecord(
            number=number, losses=tuple(losses), survivors=opened.survivors, total_weight=opened.total_weight,
            contribution=contribution, ring_sum=opened.ring_sum,
        )  # fmt: skip

    def _local_steps(
        self, number: int, factor: Factor, start: npt.NDArray[np.float32]
    ) -> tuple[ReleasedUpdate, list[float]]:
        client, schedule = self._client, self._client.job.schedule
        optimiser = torch.optim.AdamW(client.parameters(), lr=client.job.optimiser.client_lr, weight_decay=0.0)
        losses: list[float] = []
        total = schedule.epochs * len(self._batches)
        for _ in range(schedule.epochs):
            for batch in self._batches:
                losses.append(client.step(batch))
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                self._steps += 1
                self._progress(f"round {number + 1}", len(losses), total, losses[-1])
        return client.gate.release_update(client.read(factor).astype(np.float64) - start), losses

    def _record_gradients(self, number: int) -> tuple[ReleasedUpdate, list[float]]:
        """One pass, record by record: a batch of one makes the record's gradient its own, clip included."""
        client = self._client
        assert isinstance(client.policy.privacy, Gaussian)
        channel = plan_for(client.policy.privacy).update
        if channel is None or client.job.schedule.epochs != 1:
            raise LocalProtocolError(
                "SS-4110", "regime 'round' takes each record once per round", hint="Set schedule.epochs = 1."
            )
        parameters = client.parameters()
        total = ClippedSum(sum(p.numel() for p in parameters), channel.clip)
        losses: list[float] = []
        singles = [single for batch in self._batches for single in batch.singles()]
        for single in singles:
            losses.append(client.step(single))
            total.add(
                torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters]),
                single.records[0],
            )
            for parameter in parameters:
                parameter.grad = None
            self._steps += 1
            self._progress(f"round {number + 1}", len(losses), len(singles), losses[-1])
        return client.gate.release_update(total), losses

    def _common_step(self, mean: npt.NDArray[np.float64], factor: Factor) -> None:
        """The same AdamW step at every client, on the same noised gradient: post-processing, free of charge."""
        client = self._client
        client.train(factor)
        parameters = client.parameters()
        optimiser = torch.optim.AdamW(parameters, lr=client.job.optimiser.client_lr, weight_decay=0.0)
        flat = torch.from_numpy(mean).float()
        start = 0
        for parameter in parameters:
            parameter.grad = flat[start : start + parameter.numel()].reshape(parameter.shape)
            start += parameter.numel()
        optimiser.step()
        client.train(None)
        client.restamp()
