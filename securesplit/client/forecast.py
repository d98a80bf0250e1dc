"""What a job will cost each record under a policy, before anything is sent; and whether it can be worth it.

Pure arithmetic on the policy and the job. It counts what securesplit/client/train.py will release:

* ``frozen``: A never changes, so a record is released once, whatever the number of epochs and rounds;
* ``round``: A and C change after each round, so every round is a fresh release, a fresh gradient and a part of one sum;
* ``step``: A and C change at every local step, so every epoch of every round is.

Held-out records are evaluated before the first round and after each: fresh releases wherever A has changed. Where sums
carry no noise and the policy allows generation, every record pays in advance for what the other clients may generate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from securesplit.admit import label_breaches, noise_breaches, sharing_breaches, sum_breaches
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.plan import UNITS, At, ChannelPlan, LabelPlan, Plan, enforced_epsilon, plan_for, rows_moved
from securesplit.protocol.job import Job
from securesplit.suited import learning_breaches

USELESS_BITS = 1.0
"""Below one bit for a whole release the server cannot help with text; docs/benchmarks/frontier.md has the measurement."""


@dataclass(frozen=True, slots=True)
class Cost:
    """One channel of one unit of privacy.

    Attributes:
        channel: where it leaves.
        needed: releases that the job makes of one unit.
        allowed: releases that the policy allows it in its life.
        mu: of the needed releases together.
        sigma_over_clip: noise per coordinate, in clips.
        bits: the most the server can learn from all needed releases together, mu^2/8 nats.
        right: the most often that a yes-or-no question with even odds is answered rightly, Phi(mu/2).
    """

    channel: str
    needed: int
    allowed: int
    mu: float
    sigma_over_clip: float
    bits: float
    right: float

    @property
    def fits(self) -> bool:
        """Whether the policy allows what the job needs."""
        return self.needed <= self.allowed


@dataclass(frozen=True, slots=True)
class Forecast:
    """A job's cost for one unit of privacy.

    Attributes:
        costs: of a training record, channel by channel; ``peers`` is the reserve for the other clients' tokens.
        held_out: fresh releases of one held-out record at the cut; under unit ``user`` of a person whose records all are.
        mu, epsilon: of a training record after the job; relation replace-one, against the server.
        epsilon_peer: against the other clients alone, from the sums; equal to ``epsilon`` where B learns; None where no
            noise protects against them.
        budget: epsilon of a unit's whole life.
        rounds: most rounds of this job that the policy allows; None when any number is free.
        epochs: most local epochs in each of the job's rounds; None when any number is free.
        tokens: generated tokens that the policy allows this site in its life.
        useless: whether the releases are too noisy for the server to add anything.
        honest: how many honest clients each sum must hold for these figures to be true; 1 where nobody else is counted on.
        refusals: what the regime or its labels do not do, in words; empty for a job that they can run.
    """

    costs: tuple[Cost, ...]
    held_out: int
    mu: float
    epsilon: float
    epsilon_peer: float | None
    budget: float
    rounds: int | None
    epochs: int | None
    tokens: int
    useless: bool
    honest: int = 1
    refusals: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every channel can pay for the job."""
        paid = all(cost.fits for cost in self.costs) and self.held_out <= self.costs[0].allowed
        return paid and not self.refusals


def forecast(policy: Policy, job: Job, *, records_per_user: int = 1) -> Forecast | None:
    """Count what a job releases of one training record, or of one user with several.

    Args:
        policy: the client's own.
        job: the server's.
        records_per_user: under unit ``user``; 1 otherwise.

    Returns:
        None under UnsafeNoPrivacy, where everything leaves and nothing is counted.

    Raises:
        InputError: SS-1533 when the policy's budget cannot be divided as it says.
    """
    privacy = policy.privacy
    if not isinstance(privacy, Gaussian):
        return None
    plan = plan_for(privacy, rows=rows_moved(job.cut.front, policy.limits.buckets))
    schedule, many = job.schedule, records_per_user if privacy.unit == "user" else 1
    fresh = {"frozen": 1, "round": schedule.rounds, "step": schedule.rounds * schedule.epochs}[privacy.regime]
    sums = {"frozen": schedule.rounds, "round": schedule.rounds, "step": fresh * many}[privacy.regime]
    costs = [_cost("cut", fresh * many, plan.cut)]
    if plan.gradient is not None:
        costs.append(_cost("gradient", fresh * many, plan.gradient))
    if plan.labels is not None:
        mu = math.sqrt(plan.labels.units * many / UNITS)
        costs.append(Cost("labels", many, _answers(plan, plan.labels), mu, 0.0, _bits(mu), _right(mu)))
    if plan.update is not None:
        costs.append(_cost("update", sums, plan.update))
    elif plan.decode is not None:
        peers = len(job.sums.roster) - 1  # As Gate.reserve_for_peers counts.
        reserved = peers * (plan.decode.releases // (peers + 1))
        if reserved:
            costs.append(_cost("peers", reserved, plan.decode))
    mu = math.sqrt(sum(cost.mu**2 for cost in costs))
    update = next((cost.mu for cost in costs if cost.channel == "update"), None)
    shown = update if privacy.regime == "frozen" else mu
    return Forecast(
        costs=tuple(costs), held_out=many if privacy.regime == "frozen" else many * (schedule.rounds + 1), mu=mu,
        epsilon=enforced_epsilon(mu, privacy.delta),
        epsilon_peer=None if shown is None else enforced_epsilon(shown, privacy.delta),
        budget=enforced_epsilon(plan.mu, privacy.delta),
        rounds=_rounds(plan, costs, schedule.rounds, privacy.regime, many),
        epochs=_epochs(costs, schedule.epochs, privacy.regime),
        tokens=0 if plan.decode is None else plan.decode.releases // max(1, len(job.sums.roster)),
        useless=_bits(mu) < USELESS_BITS and job.task is None,
        honest=1 if plan.update is None else plan.update.honest, refusals=(*_refusals(privacy.regime, schedule.epochs), *label_breaches(policy, job), *sum_breaches(policy, job), *sharing_breaches(policy, job), *noise_breaches(policy, job), *(breach.line() for breach in learning_breaches(policy, job))),
    )  # fmt: skip


def _cost(channel: At | Literal["peers"], needed: int, plan: ChannelPlan) -> Cost:
    mu = math.sqrt(plan.units * needed / UNITS)
    return Cost(channel, needed, plan.releases, mu, plan.sigma / plan.clip, _bits(mu), _right(mu))


def _answers(plan: Plan, labels: LabelPlan) -> int:
    """How many labels of one unit can be answered when it spends all of its other channels; a person may have several."""
    others = (plan.cut, plan.gradient, plan.decode, plan.update)
    return (plan.budget - sum(c.units * c.releases for c in others if c is not None)) // labels.units


def _refusals(regime: str, epochs: int) -> Iterator[str]:
    if regime == "round" and epochs != 1:
        yield "regime 'round' takes each record once per round: the job's schedule.epochs must be 1"


def _bits(mu: float) -> float:
    return mu * mu / 8 / math.log(2)


def _right(mu: float) -> float:
    return 0.5 * math.erfc(-mu / 2 / math.sqrt(2))


def _rounds(plan: Plan, costs: list[Cost], rounds: int, regime: str, many: int) -> int | None:
    """How often the job's per-round need fits into what is allowed; in ``frozen`` only noised sums cost per round."""
    per_round = [
        cost for cost in costs if cost.channel != "labels" and (regime != "frozen" or cost.channel == "update")
    ]
    if not per_round:
        return None
    most = min(cost.allowed * rounds // cost.needed for cost in per_round)
    # Held-out records are released once more.
    return most if regime == "frozen" else max(0, min(most, plan.cut.releases // many - 1))


def _epochs(costs: list[Cost], epochs: int, regime: str) -> int | None:
    if regime == "frozen":
        return None
    if regime == "round":
        return 1
    return min(cost.allowed * epochs // cost.needed for cost in costs if cost.channel != "labels")
