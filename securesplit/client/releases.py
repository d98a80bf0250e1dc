"""How often a job releases one record: in training, in sums, and in every measurement of the held-out loss.

Arithmetic on the job, for a client that is there from the first round to the last. What was released before in the same
state of A goes out as the same bytes and is not counted. So these are the most that a run makes, and exactly what it
makes where every optimiser step moves A (:func:`is_exact`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from securesplit.protocol.job import Job

__all__ = ["Needs", "Regime", "is_exact", "looks", "needs", "within_rounds"]

Regime = Literal["frozen", "round", "step"]


@dataclass(frozen=True, slots=True)
class Needs:
    """Releases of one record.

    Attributes:
        trained: of a training record at the cut, and as many of its gradient.
        summed: sums that a training record is a part of.
        held_out: of a held-out record at the cut.
    """

    trained: int
    summed: int
    held_out: int


def needs(job: Job, regime: Regime, batches: int, *, rounds: int | None = None, epochs: int | None = None) -> Needs:
    """What a whole run makes.

    Args:
        job: the server's.
        regime: the policy's.
        batches: of training, in one epoch at this site; it matters where the job measures inside rounds.
        rounds, epochs: in place of the job's own.
    """
    rounds, epochs = rounds or job.schedule.rounds, epochs or job.schedule.epochs
    match regime:
        case "frozen":  # A stands still. Sums are drawn anew each time, and there are none where nothing is summed.
            return Needs(1, rounds if job.mode.summed else 0, 1)
        case "round":
            return Needs(rounds, rounds, rounds + 1)
    steps = _turns(job, rounds, None) * epochs
    return Needs(steps, steps, looks(job, batches, rounds=rounds, epochs=epochs))


def looks(
    job: Job, batches: int, *, rounds: int | None = None, epochs: int | None = None, name: str | None = None
) -> int:
    """In regime ``step``: releases of a held-out record, before the first round, inside the rounds and after each.

    Args as :func:`needs`, and
        name: of the client; None for the one that learns most.
    """
    rounds, epochs = rounds or job.schedule.rounds, epochs or job.schedule.epochs
    every, between = job.schedule.evaluate_every, rounds + 1
    if every is None:
        return between
    inside = _turns(job, rounds, name) * epochs * batches // every
    if job.mode.summed:
        return between + inside
    # No sum moves A behind a round's last step, so a measurement right there is that of the round's end, too.
    return between + inside - rounds // (every // math.gcd(every, epochs * batches))


def within_rounds(job: Job, allowed: int) -> int | None:
    """In regime ``step``: with so many batches in an epoch, or fewer, a held-out record has no more releases than allowed.

    None for any number, where the job does not measure inside rounds.
    """
    schedule = job.schedule
    if schedule.evaluate_every is None:
        return None
    left = allowed - schedule.rounds - 1
    steps = _turns(job, schedule.rounds, None) * schedule.epochs
    return max(0, ((left + 1) * schedule.evaluate_every - 1) // steps)


def is_exact(job: Job, regime: Regime) -> bool:
    """Whether a run makes exactly as many as :func:`needs` says, and not sometimes fewer.

    Fewer where the rate is 0 and a step moves nothing, where early stopping leaves records out, or where clients learn in
    turns and some have fewer of them.
    """
    if regime == "frozen":
        return job.schedule.patience is None
    optimiser = job.optimiser
    return optimiser.schedule == "constant" and not optimiser.warmup and job.mode.mode != "sequential"


def _turns(job: Job, rounds: int, name: str | None) -> int:
    """Rounds in which a client learns; of the client that learns most, where no name is given."""
    if job.mode.mode != "sequential":
        return rounds
    names = sorted(job.sums.roster)
    return (rounds - (0 if name is None else names.index(name)) + len(names) - 1) // len(names)
