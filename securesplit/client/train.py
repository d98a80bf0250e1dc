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
the mean model, exactly. Where a run stands, so that it goes on after a crash, is securesplit/client/position.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from securesplit.aggregate.answered import AnswerLog
from securesplit.client.checkpoints import keep_round
from securesplit.client.client import Client
from securesplit.client.elastic import BEHIND, Elastic
from securesplit.client.memory import Remembered
from securesplit.client.pace import Best, Measured, Pace, require_affordable
from securesplit.client.pending import read_pending, write_pending
from securesplit.client.plausible import require_plausible
from securesplit.client.position import Begun, Position, RoundRecord
from securesplit.client.rounds import Brought, Opened, close_sum, secure_sum
from securesplit.client.sharing import Turn, learns_in, to_share, turn_in, what_was_shared
from securesplit.client.units import Units
from securesplit.data.batches import Batch
from securesplit.errors import AggregationAborted, LocalProtocolError, SecureSplitError
from securesplit.learning import recipe_of
from securesplit.model.descent import Descent
from securesplit.model.lora import Learned
from securesplit.model.persample import per_sample
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.gate import ReleasedUpdate
from securesplit.privacy.lattice import step_for
from securesplit.runs.metrics import Metrics

Progress = Callable[[str, int, int, float | None], None]
"""(what, done, total, loss or None)"""


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of a run on this site.

    Attributes:
        steps: batches that went to the server and back with gradients; local optimiser steps, except in regime ``round``.
        curve: held-out loss before the first round and after each, nats per token.
        rounds: one record for each secure sum.
        missed: numbers of the rounds that went on without this client; the curve has no loss of theirs but the last one's.
        measured: held-out losses inside the rounds, where the job asks for them.
        stopped: whether this client took no more local steps before the end.
        best: where the job keeps it.
    """

    steps: int
    curve: tuple[float, ...]
    rounds: tuple[RoundRecord, ...]
    missed: tuple[int, ...] = ()
    measured: tuple[Measured, ...] = ()
    stopped: bool = False
    best: Best | None = None


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
        metrics: Metrics | None = None,
        memory: Remembered | None = None,
    ) -> None:
        self._records = records
        self._metrics = metrics
        self._client = client
        self._batches = batches
        self._held_out = held_out
        self._answers = answers
        self._progress = progress
        self._memory = memory
        self._pace = Pace(client, lambda: client.evaluate(held_out))
        self._at = Position(pace=self._pace)
        self._close: Callable[[], None] = lambda: None  # Ends the last round, once what it gave is safe.
        self._elastic: Elastic | None = None  # In a job that hands over to clients that come late.
        self._was_away = False  # In the middle of a round, which may be over for the others.

    def run(self) -> Trained:
        """All rounds of the job."""
        rounds = self._client.job.schedule.rounds
        require_affordable(self._client, len(self._batches), self._held_out)
        # Before the first release, so that a run that cannot share sends nothing.
        if self._client.regime == "frozen" and self._client.job.mode.summed:
            self._client.gate.reserve_for_peers()
        if self._memory is not None:
            self._at = self._memory.begin(self._client, self._pace)
            self._close = self._unclosed()
        self._comes()
        while True:
            at = self._at
            if at.looked < at.done:  # The last round has its sum and was not looked at.
                self._look()
            if at.done == rounds:
                return Trained(
                    steps=at.steps, curve=tuple(at.curve), rounds=tuple(at.rounds), missed=tuple(at.missed),
                    measured=tuple(self._pace.measured), stopped=self._pace.stopped, best=self._pace.best,
                )  # fmt: skip
            self._one_round(at.done)
            self._keep(now=True)

    def _look(self) -> None:
        """The held-out loss before the first round, or after the last one, which is closed first."""
        at = self._at
        if at.done:
            self._close()
            self._close = lambda: None
            self._client.keep_anchor()
        at.curve.append(self._evaluate())
        at.looked = at.done
        if at.done:
            keep_round(self._client, self._records, at.done - 1)
            self._keep(now=True)

    def _one_round(self, number: int) -> None:
        """One more round is over, with this client or without it."""
        try:
            if self._client.job.mode.summed:
                self._at.rounds.append(self._round(number))
            else:
                self._by_itself(number)
        except SecureSplitError as error:
            if self._elastic is None or error.code not in BEHIND or not self._elastic.caught_up():
                raise
            return
        self._at.done += 1
        if self._elastic is not None:
            self._elastic.settle()

    def _comes(self) -> None:
        """In jobs that hand over: help those who come late from now on, and be helped if this client is late itself."""
        client, folder = self._client, self._client.link.folder
        if client.job.sums.late is not None and folder is not None:
            self._elastic = Elastic(client, folder, self._at, len(self._batches), self._tell)
            done = self._at.done
            replays = self._memory is not None and self._memory.replays
            self._elastic.comes(asks=not replays)
            self._was_away = replays or self._at.begun is not None
            if self._at.done != done:  # The others have closed that round without this client.
                self._close = lambda: None
                self._keep(now=True)  # What it does from here on follows from what it was given.

    def _tell(self, what: str) -> None:
        self._progress(what, 0, 1, None)

    def _keep(self, *, now: bool = False) -> None:
        """A place from which the run could go on."""
        if self._memory is not None:
            self._memory.pause(self._at, now=now)

    def _evaluate(self) -> float:
        at = self._at
        self._client.train(None)
        loss = self._client.evaluate(self._held_out)
        self._pace.saw(at.moves, loss)
        if self._metrics is not None:
            self._metrics.held_out(number=at.done, step=at.steps, loss=loss)
        return loss

    def _round(self, number: int) -> RoundRecord:
        try:
            return self._run_round(number)
        finally:
            self._at.ended()

    def _begun(self, number: int, turn: Turn, *, learns: bool) -> Begun:
        """What the round began from: now, or before the crash."""
        client, at, factor = self._client, self._at, turn.summed
        if at.begun is None:
            at.begun = Begun(
                client.frozen_digest(number, factor), client.alike_digest(number, factor, at.heard),
                client.origin_digest(factor) if learns else b"", client.read(factor), client.snapshot(),
            )  # fmt: skip
        return at.begun

    def _run_round(self, number: int) -> RoundRecord:
        client, at = self._client, self._at
        turn, learns = turn_in(client.job, number), learns_in(client.job, client.link.name, number)
        factor, begun = turn.summed, self._begun(number, turn, learns=learns)
        start = begun.start
        client.train(turn.learned)
        match client.regime:
            case _ if not learns:
                update = client.gate.release_update(np.zeros(len(start)))
            case "round":
                update = self._record_gradients(number)
            case "step":
                update = self._noised_steps(number, factor, start)
            case _:
                update = self._local_steps(number, factor, start)
        losses = tuple(at.losses)
        client.train(None)
        if learns:
            require_plausible(client, factor, start, begun.before, rate=at.rate)
        hands_over = client.job.mode.mode == "sequential"
        weight = 1 if client.regime == "round" or hands_over else sum(len(batch.records) for batch in self._batches)
        summed = self._summed(number, update, weight, begun)
        opened, at.heard = summed.aggregate, summed.heard
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
            number=number, losses=losses, survivors=opened.survivors, total_weight=opened.total_weight,
            contribution=summed.contribution, ring_sum=opened.ring_sum, residual=residual,
        )  # fmt: skip

    def _summed(self, number: int, update: ReleasedUpdate, weight: int, begun: Begun) -> Opened:
        """The round's secure sum; where rounds are tried again, what entered it lies on disk until the round is closed."""
        client = self._client
        assert client.link.folder is not None
        what = f"round {number + 1}: secure sum, waits for"
        self._progress(f"{what} the roster", 0, 1, None)
        client.link.sums.waits_for = lambda missing: self._progress(f"{what} {', '.join(missing)}", 0, 1, None)
        brought = Brought(
            client.link.folder, client.policy, update, weight, number, begun.frozen, self._answers, begun.origin, begun.alike,
            self._records,
        )  # fmt: skip
        again = client.job.sums.attempts is not None
        if again and self._memory is not None:
            write_pending(self._memory.pending, client.gate, brought)
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
        if again:
            if self._memory is not None:
                write_pending(self._memory.pending, client.gate, brought, summed.kept)
            self._close = partial(close_sum, client.link, brought, summed.kept)
        return summed

    def _unclosed(self) -> Callable[[], None]:
        """The end of the last round, when a crash came between its sum and its end."""
        client, memory, at = self._client, self._memory, self._at
        if memory is None or client.job.sums.attempts is None or client.link.folder is None or not at.done:
            return lambda: None
        found = read_pending(
            memory.pending, client.gate, folder=client.link.folder, policy=client.policy, answers=self._answers,
            records=self._records,
        )  # fmt: skip
        if found is None or found.kept is None or found.brought.number != at.done - 1:
            return lambda: None
        return partial(close_sum, client.link, found.brought, found.kept)

    def _by_itself(self, number: int) -> None:
        """A round's local work where nothing is summed: A and C stay this site's own, and its optimiser goes on."""
        client, at = self._client, self._at
        client.train("both")
        path = self._noised_path if client.regime == "step" else self._plain_path
        path(number, self._moving())
        client.train(None)
        at.losses = []

    def _local_steps(self, number: int, factor: Learned, start: npt.NDArray[np.float32]) -> ReleasedUpdate:
        """Plain steps, in regimes ``open`` and ``frozen``."""
        self._plain_path(number, self._moving())
        self._keep(now=True)
        moved = self._client.read(factor).astype(np.float64) - start
        return self._client.gate.release_update(to_share(moved, self._client, number))

    def _plain_path(self, number: int, descent: Descent) -> None:
        for batch in self._left():
            if self._pace.stopped:
                break
            self._at.losses.append(self._client.step(batch, at=self._at.steps))
            if descent.step():
                self._pace.moved(descent.moves)
            self._told(number, descent.rate)
        if descent.finish():
            self._pace.moved(descent.moves)
        self._ended(descent)

    def _noised_steps(self, number: int, factor: Learned, start: npt.NDArray[np.float32]) -> ReleasedUpdate:
        """DP-SGD: A and C meet a batch's gradients only as a sum that was clipped by unit, noised and charged.

        The optimiser's moments are functions of noised sums, and so is the difference at the end: both are free. The
        divisor is the number of rows that the server sees, never the number of units in them.
        """
        self._noised_path(number, self._moving())
        self._keep(now=True)
        return self._client.gate.release_update(self._client.read(factor).astype(np.float64) - start)

    def _noised_path(self, number: int, descent: Descent) -> None:
        client = self._client
        for batch in self._left():
            total = self._empty_sum()
            gradients, loss = self._gradients(batch)
            Units(total, batch.records).add(gradients, batch.records)
            noised = client.gate.release_update(total)
            self._descend(descent, noised.vector / len(batch.records))
            client.gate.moved(noised)
            self._pace.moved(descent.moves)
            self._at.losses.append(loss)
            self._told(number, descent.rate)
        self._ended(descent)

    def _record_gradients(self, number: int) -> ReleasedUpdate:
        """One pass over all records, whose gradients are clipped unit by unit into one sum."""
        client = self._client
        if client.job.schedule.epochs != 1:
            raise LocalProtocolError(
                "SS-4110", "regime 'round' takes each record once per round", hint="Set schedule.epochs = 1."
            )
        units = self._adding()
        for batch in self._left():
            gradients, loss = self._gradients(batch)
            units.add(gradients, batch.records)
            self._at.losses.append(loss)
            self._told(number)
        self._keep(now=True)
        return client.gate.release_update(units.total)

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
            loss = self._client.step(batch, at=self._at.steps)
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
        descent = self._descent()
        self._descend(descent, mean)
        self._ended(descent)
        self._client.train(None)

    def _descent(self) -> Descent:
        """An optimiser of this round's factor, without moments, where the schedule stands."""
        return Descent(self._client.parameters(), recipe_of(self._client.job, "client"), moves=self._at.moves)

    def _moving(self) -> Descent:
        """The round's optimiser, as it was before a crash if there was one; where nothing is summed, the run's."""
        at = self._at
        if at.optimiser is None:
            at.optimiser = self._descent()
            if at.moments:
                at.optimiser.restore(at.moments)
                at.moments = ()
        return at.optimiser

    def _ended(self, descent: Descent) -> None:
        self._at.moves, self._at.rate = descent.moves, descent.rate

    def _descend(self, descent: Descent, gradient: npt.NDArray[np.float64]) -> None:
        """One step of the optimiser along this gradient, (d,), and no other."""
        parameters = self._client.parameters()
        pieces = torch.split(torch.from_numpy(gradient).float(), [parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.reshape(parameter.shape).to(parameter.device)
        descent.step()

    def _passes(self) -> Iterable[Batch]:
        return (batch for _ in range(self._client.job.schedule.epochs) for batch in self._batches)

    def _left(self) -> Iterator[Batch]:
        """The passes of this round, without what was done before a crash."""
        for batch in islice(self._passes(), len(self._at.losses), None):
            self._require_open()
            yield batch
        self._require_open()

    def _require_open(self) -> None:
        """After a crash, and once all is done again that was paid for: a round that is over costs nothing more."""
        if not self._was_away or self._elastic is None or (self._memory is not None and self._memory.replays):
            return
        self._was_away = False
        if self._elastic.left_behind():
            raise AggregationAborted(
                "SS-6033", "the round was over when this client came back", hint="Begin the next one."
            )

    def _told(self, number: int, rate: float | None = None) -> None:
        losses = self._at.losses
        self._at.steps += 1
        total = self._client.job.schedule.epochs * len(self._batches)
        if self._metrics is not None:
            self._metrics.step(number=number, step=self._at.steps, loss=losses[-1], lr=rate)
        self._progress(f"round {number + 1}", len(losses), total, losses[-1])
        self._keep()
