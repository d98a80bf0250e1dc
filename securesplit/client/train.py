"""The training loop of one client: local work, then a secure sum, round after round.

Four regimes, chosen by the policy and by nobody else (the study behind them: docs/threat-model.md):

* ``frozen``: A and B never change; each record is released once; C learns for any number of epochs on remembered
  answers; C's update enters a blind sum.
* ``round``: A and C stand still within a round; per-record gradients are clipped and summed, the sum is noised, and only
  that moves A and C, by the same optimiser step at every client. B learns from noised gradients.
* ``step``: the same, but every batch's sum is noised and moves A and C at this client at once (DP-SGD); each batch is then
  released from a new state, and paid again. What enters the secure sum is the path from noised step to noised step.
* ``open``: policy UnsafeNoPrivacy. A, B and C learn at every step, as in SplitFed; nothing is protected.

What of the adapters learns in a round, and what of it is summed, is the job's choice: securesplit/client/sharing.py. By
default one LoRA factor learns per round and the other stands still, in turns, so that the mean of updates is the update of
the mean model, exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from securesplit.aggregate.answered import AnswerLog
from securesplit.aggregate.fixedpoint import Words
from securesplit.client.client import Client
from securesplit.client.plausible import require_plausible
from securesplit.client.rounds import Brought, close_sum, secure_sum
from securesplit.client.sharing import learns_in, to_share, turn_in, what_was_shared
from securesplit.data.batches import Batch
from securesplit.errors import LocalProtocolError
from securesplit.model.lora import Learned
from securesplit.model.persample import per_sample
from securesplit.model.sketch import Residual
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.gate import ReleasedUpdate
from securesplit.privacy.lattice import step_for
from securesplit.runs.metrics import Metrics

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
        residual: what averaging two factors apart got wrong; None where the sum is exact.
    """

    number: int
    losses: tuple[float, ...]
    survivors: tuple[str, ...]
    total_weight: int
    contribution: Words
    ring_sum: Words
    residual: Residual | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of a run on this site.

    Attributes:
        steps: batches that went to the server and back with gradients; local optimiser steps, except in regime ``round``.
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
        records: directory for what can be verified of each secure sum, or None.
        metrics: writes down every step's loss on this site, or None.
    """

    def __init__(
        self,
        client: Client,
        batches: tuple[Batch, ...],
        held_out: tuple[Batch, ...],
        *,
        answers: AnswerLog,
        progress: Progress,
        records: Path | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._records = records
        self._metrics = metrics
        self._client = client
        self._batches = batches
        self._held_out = held_out
        self._answers = answers
        self._progress = progress
        self._steps = 0
        self._heard = b""
        self._kept: torch.optim.AdamW | None = None
        self._close: Callable[[], None] = lambda: None  # Ends the last round, once what it gave is safe.

    def run(self) -> Trained:
        """All rounds of the job."""
        rounds = self._client.job.schedule.rounds
        if (
            self._client.regime == "frozen" and self._client.job.mode.summed
        ):  # Before the first release, so that a run that cannot share sends nothing.
            self._client.gate.reserve_for_peers()
        curve, records = [self._evaluate(0)], []
        for number in range(rounds):
            if self._client.job.mode.summed:
                records.append(self._round(number))
                self._close()
            else:
                self._by_itself(number)
            self._client.keep_anchor()
            curve.append(self._evaluate(number + 1))
        return Trained(steps=self._steps, curve=tuple(curve), rounds=tuple(records))

    def _evaluate(self, number: int) -> float:
        self._client.train(None)
        loss = self._client.evaluate(self._held_out)
        if self._metrics is not None:
            self._metrics.held_out(number=number, step=self._steps, loss=loss)
        return loss

    def _round(self, number: int) -> RoundRecord:
        client = self._client
        turn, learns = turn_in(client.job, number), learns_in(client.job, client.link.name, number)
        factor = turn.summed
        frozen, alike = client.frozen_digest(number, factor), client.alike_digest(number, factor, self._heard)
        origin = client.origin_digest(factor) if learns else b""
        client.train(turn.learned)
        start, before = client.read(factor), client.held()
        match client.regime:
            case _ if not learns:
                update, losses = client.gate.release_update(np.zeros(len(start))), list[float]()
            case "round":
                update, losses = self._record_gradients(number)
            case "step":
                update, losses = self._noised_steps(number, factor, start)
            case _:
                update, losses = self._local_steps(number, factor, start)
        client.train(None)
        if learns:
            require_plausible(client, factor, start, before)
        hands_over = client.job.mode.mode == "sequential"
        weight = 1 if client.regime == "round" or hands_over else sum(len(batch.records) for batch in self._batches)
        assert client.link.folder is not None
        what = f"round {number + 1}: secure sum, waits for"
        self._progress(f"{what} the roster", 0, 1, None)
        client.link.waits_for = lambda missing: self._progress(f"{what} {', '.join(missing)}", 0, 1, None)
        summed = secure_sum(
            client.link,
            client.link.folder,
            client.policy,
            update,
            weight=weight,
            number=number,
            frozen=frozen,
            answers=self._answers,
            alike=alike,
            origin=origin,
            records=self._records,
        )
        if client.job.sums.attempts is not None:
            folder, held = client.link.folder, (weight, number, frozen, self._answers, origin, alike, self._records)
            self._close = partial(close_sum, client.link, Brought(folder, client.policy, update, *held), summed.kept)
        opened, contribution, self._heard = summed.aggregate, summed.contribution, summed.heard
        # Where one hands over and the others add zeros, the update is the whole sum.
        shared = opened.mean * opened.total_weight if hands_over else opened.mean
        mean, residual = what_was_shared(start, shared, client, number)
        if client.regime == "round":
            self._common_step(mean, factor)
        else:
            client.write((start.astype(np.float64) + mean).astype(np.float32), factor)
        client.gate.moved(update)
        if residual is not None:
            self._progress(f"round {number + 1}: {residual.told}", 1, 1, None)
        return RoundRecord(
            number=number, losses=tuple(losses), survivors=opened.survivors, total_weight=opened.total_weight,
            contribution=contribution, ring_sum=opened.ring_sum, residual=residual,
        )  # fmt: skip

    def _by_itself(self, number: int) -> None:
        """A round's local work where nothing is summed: A and C stay this site's own, and its optimiser goes on."""
        client = self._client
        client.train("both")
        if self._kept is None:
            self._kept = self._optimiser()
        if client.regime == "step":
            self._noised_path(number, self._kept)
        else:
            self._plain_path(number, self._kept)
        client.train(None)

    def _local_steps(
        self, number: int, factor: Learned, start: npt.NDArray[np.float32]
    ) -> tuple[ReleasedUpdate, list[float]]:
        """Plain steps, in regimes ``open`` and ``frozen``."""
        client = self._client
        losses = self._plain_path(number, self._optimiser())
        moved = client.read(factor).astype(np.float64) - start
        return client.gate.release_update(to_share(moved, client, number)), losses

    def _plain_path(self, number: int, optimiser: torch.optim.AdamW) -> list[float]:
        losses: list[float] = []
        for batch in self._passes():
            losses.append(self._client.step(batch))
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            self._told(number, losses)
        return losses

    def _noised_steps(
        self, number: int, factor: Learned, start: npt.NDArray[np.float32]
    ) -> tuple[ReleasedUpdate, list[float]]:
        """DP-SGD: A and C meet a batch's gradients only as a sum that was clipped by unit, noised and charged.

        The optimiser's moments are functions of noised sums, and so is the difference at the end: both are free. The
        divisor is the number of rows that the server sees, never the number of units in them.
        """
        client = self._client
        losses = self._noised_path(number, self._optimiser())
        return client.gate.release_update(client.read(factor).astype(np.float64) - start), losses

    def _noised_path(self, number: int, optimiser: torch.optim.AdamW) -> list[float]:
        client = self._client
        losses: list[float] = []
        for batch in self._passes():
            total = self._empty_sum()
            gradients, loss = self._gradients(batch)
            _Units(total, batch.records).add(gradients, batch.records)
            noised = client.gate.release_update(total)
            self._descend(optimiser, noised.vector / len(batch.records))
            client.gate.moved(noised)
            losses.append(loss)
            self._told(number, losses)
        return losses

    def _record_gradients(self, number: int) -> tuple[ReleasedUpdate, list[float]]:
        """One pass over all records, whose gradients are clipped unit by unit into one sum."""
        client = self._client
        if client.job.schedule.epochs != 1:
            raise LocalProtocolError(
                "SS-4110", "regime 'round' takes each record once per round", hint="Set schedule.epochs = 1."
            )
        total = self._empty_sum()
        units = _Units(total, (key for batch in self._batches for key in batch.records))
        losses: list[float] = []
        for batch in self._batches:
            gradients, loss = self._gradients(batch)
            units.add(gradients, batch.records)
            losses.append(loss)
            self._told(number, losses)
        return client.gate.release_update(total), losses

    def _gradients(self, batch: Batch) -> tuple[Tensor, float]:
        """One step's gradient of each record, (B, d), before clip and noise, and the loss; both stay here."""
        with per_sample(self._client.trained) as kept:
            loss = self._client.step(batch)
            return kept.gradients(), loss

    def _empty_sum(self) -> ClippedSum:
        plan = self._client.gate.plan
        assert plan is not None
        assert plan.update is not None, "the policy's rules: regimes 'round' and 'step' have a channel for updates"
        size = sum(parameter.numel() for parameter in self._client.parameters())
        return ClippedSum(size, plan.update.clip, step_for(plan.update.part))

    def _common_step(self, mean: npt.NDArray[np.float64], factor: Learned) -> None:
        """The same AdamW step at every client, on the same noised gradient: post-processing, free of charge."""
        self._client.train(factor)
        self._descend(self._optimiser(), mean)
        self._client.train(None)

    def _optimiser(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self._client.parameters(), lr=self._client.job.optimiser.client_lr, weight_decay=0.0)

    def _descend(self, optimiser: torch.optim.AdamW, gradient: npt.NDArray[np.float64]) -> None:
        """One step of the optimiser along this gradient, (d,), and no other."""
        parameters = self._client.parameters()
        pieces = torch.split(torch.from_numpy(gradient).float(), [parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.reshape(parameter.shape).to(parameter.device)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def _passes(self) -> Iterable[Batch]:
        return (batch for _ in range(self._client.job.schedule.epochs) for batch in self._batches)

    def _told(self, number: int, losses: Sequence[float]) -> None:
        self._steps += 1
        total = self._client.job.schedule.epochs * len(self._batches)
        if self._metrics is not None:
            self._metrics.step(number=number, step=self._steps, loss=losses[-1])
        self._progress(f"round {number + 1}", len(losses), total, losses[-1])


class _Units:
    """Adds up gradients by unit of privacy, and hands each unit to a sum once: when the last of its records is in.

    A user's records may stand in several batches. Only users who have been met and are not complete take memory, one
    gradient each; batches are not sorted by user, because the server would see who belongs together.

    Args:
        total: clips each unit as it is complete.
        keys: the ledger key of every record to come.
    """

    def __init__(self, total: ClippedSum, keys: Iterable[str]) -> None:
        self._total = total
        self._left = Counter(keys)
        self._met: dict[str, Tensor] = {}

    def add(self, gradients: Tensor, keys: Sequence[str]) -> None:
        """Take in one batch, (B, d)."""
        for gradient, key in zip(gradients, keys, strict=True):
            self._left[key] -= 1
            known = self._met.pop(key, None)
            summed = gradient if known is None else known + gradient
            if self._left[key]:
                self._met[key] = summed.clone()  # A row of its own, not a view that would keep the whole batch.
            else:
                self._total.add(summed, key)
