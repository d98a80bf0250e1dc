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

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from securesplit.aggregate.answered import AnswerLog
from securesplit.client.client import Client
from securesplit.client.memory import Remembered
from securesplit.client.plausible import require_plausible
from securesplit.client.position import Begun, Position, RoundRecord
from securesplit.client.rounds import secure_sum
from securesplit.client.sharing import Turn, to_share, turn_of, what_was_shared
from securesplit.client.units import Units
from securesplit.data.batches import Batch
from securesplit.errors import LocalProtocolError
from securesplit.model.descent import Descent, Recipe
from securesplit.model.lora import Learned
from securesplit.model.persample import per_sample
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.gate import ReleasedUpdate
from securesplit.privacy.lattice import step_for

Progress = Callable[[str, int, int, float | None], None]
"""(what, done, total, loss or None)"""


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
        memory: from which the run goes on after a crash; None for a run that then begins anew.
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
        memory: Remembered | None = None,
    ) -> None:
        self._records = records
        self._client = client
        self._batches = batches
        self._held_out = held_out
        self._answers = answers
        self._progress = progress
        self._memory = memory
        self._at = Position()

    def run(self) -> Trained:
        """All rounds of the job."""
        rounds = self._client.job.schedule.rounds
        if self._client.regime == "frozen":  # Before the first release, so that a run that cannot share sends nothing.
            self._client.gate.reserve_for_peers()
        if self._memory is not None:
            self._at = self._memory.begin(self._client)
        at = self._at
        if not at.curve:
            at.curve.append(self._evaluate())
        while True:
            if len(at.rounds) == len(at.curve):  # The last round has its sum and was not looked at.
                self._client.keep_anchor()
                at.curve.append(self._evaluate())
                self._keep(now=True)
            if len(at.rounds) == rounds:
                return Trained(steps=at.steps, curve=tuple(at.curve), rounds=tuple(at.rounds))
            at.rounds.append(self._round(len(at.rounds)))
            self._keep(now=True)

    def _keep(self, *, now: bool = False) -> None:
        """A place from which the run could go on."""
        if self._memory is not None:
            self._memory.pause(self._at, now=now)

    def _evaluate(self) -> float:
        self._client.train(None)
        return self._client.evaluate(self._held_out)

    def _round(self, number: int) -> RoundRecord:
        try:
            return self._run_round(number)
        finally:
            self._at.ended()

    def _begun(self, number: int, turn: Turn) -> Begun:
        """What the round began from: now, or before the crash."""
        client, at, factor = self._client, self._at, turn.summed
        if at.begun is None:
            at.begun = Begun(
                client.frozen_digest(number, factor), client.alike_digest(number, factor, at.heard),
                client.origin_digest(factor), client.read(factor), client.read(),
            )  # fmt: skip
        return at.begun

    def _run_round(self, number: int) -> RoundRecord:
        client = self._client
        turn = turn_of(client.job.adapters.sharing, number)
        factor, begun = turn.summed, self._begun(number, turn)
        start = begun.start
        client.train(turn.learned)
        match client.regime:
            case "round":
                update, losses = self._record_gradients(number)
            case "step":
                update, losses = self._noised_steps(number, factor, start)
            case _:
                update, losses = self._local_steps(number, factor, start)
        client.train(None)
        require_plausible(client, factor, start, begun.before)
        weight = 1 if client.regime == "round" else sum(len(batch.records) for batch in self._batches)
        assert client.link.folder is not None
        self._progress(f"round {number + 1}: secure sum, waits for the roster", 0, 1, None)
        summed = secure_sum(
            client.link,
            client.link.folder,
            client.policy,
            update,
            weight=weight,
            number=number,
            frozen=begun.frozen,
            answers=self._answers,
            alike=begun.alike,
            origin=begun.origin,
            records=self._records,
        )
        opened, contribution, self._at.heard = summed.aggregate, summed.contribution, summed.heard
        mean, residual = what_was_shared(start, opened.mean, client, number)
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

    def _local_steps(
        self, number: int, factor: Learned, start: npt.NDArray[np.float32]
    ) -> tuple[ReleasedUpdate, list[float]]:
        """Plain steps, in regimes ``open`` and ``frozen``."""
        client, optimiser, losses = self._client, self._moving(), self._at.losses
        for batch in self._left():
            losses.append(client.step(batch))
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            self._told(number)
        self._keep(now=True)
        moved = client.read(factor).astype(np.float64) - start
        update = to_share(moved, client, number)
        return client.gate.release_update(update), losses

    def _noised_steps(
        self, number: int, factor: Learned, start: npt.NDArray[np.float32]
    ) -> tuple[ReleasedUpdate, list[float]]:
        """DP-SGD: A and C meet a batch's gradients only as a sum that was clipped by unit, noised and charged.

        The optimiser's moments are functions of noised sums, and so is the difference at the end: both are free. The
        divisor is the number of rows that the server sees, never the number of units in them.
        """
        client, optimiser, losses = self._client, self._moving(), self._at.losses
        for batch in self._left():
            total = self._empty_sum()
            gradients, loss = self._gradients(batch)
            Units(total, batch.records).add(gradients, batch.records)
            noised = client.gate.release_update(total)
            self._descend(optimiser, noised.vector / len(batch.records))
            client.gate.moved(noised)
            losses.append(loss)
            self._told(number)
        self._keep(now=True)
        return client.gate.release_update(client.read(factor).astype(np.float64) - start), losses

    def _record_gradients(self, number: int) -> tuple[ReleasedUpdate, list[float]]:
        """One pass over all records, whose gradients are clipped unit by unit into one sum."""
        client = self._client
        if client.job.schedule.epochs != 1:
            raise LocalProtocolError(
                "SS-4110", "regime 'round' takes each record once per round", hint="Set schedule.epochs = 1."
            )
        losses = self._at.losses
        units = self._adding()
        for batch in self._left():
            gradients, loss = self._gradients(batch)
            units.add(gradients, batch.records)
            losses.append(loss)
            self._told(number)
        self._keep(now=True)
        return client.gate.release_update(units.total), losses

    def _adding(self) -> Units:
        """The round's gradients by unit: none yet, or those from before a crash."""
        at = self._at
        at.units = units = Units(self._empty_sum(), (key for batch in self._batches for key in batch.records))
        if at.added is not None:
            units.resume((key for batch in self._batches[: len(at.losses)] for key in batch.records), at.added)
            at.added = None
        return units

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

    def _optimiser(self) -> Descent:
        return Descent(self._client.parameters(), Recipe(self._client.job.optimiser.client_lr))

    def _moving(self) -> Descent:
        """The round's optimiser, as it was before a crash if there was one."""
        at = self._at
        at.optimiser = optimiser = self._optimiser()
        if at.moments:
            optimiser.restore(at.moments)
            at.moments = ()
        return optimiser

    def _descend(self, optimiser: Descent, gradient: npt.NDArray[np.float64]) -> None:
        """One step of the optimiser along this gradient, (d,), and no other."""
        parameters = self._client.parameters()
        pieces = torch.split(torch.from_numpy(gradient).float(), [parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.reshape(parameter.shape).to(parameter.device)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def _passes(self) -> Iterable[Batch]:
        return (batch for _ in range(self._client.job.schedule.epochs) for batch in self._batches)

    def _left(self) -> Iterable[Batch]:
        """The passes of this round, without what was done before a crash."""
        return islice(self._passes(), len(self._at.losses), None)

    def _told(self, number: int) -> None:
        losses = self._at.losses
        self._at.steps += 1
        total = self._client.job.schedule.epochs * len(self._batches)
        self._progress(f"round {number + 1}", len(losses), total, losses[-1])
        self._keep()
