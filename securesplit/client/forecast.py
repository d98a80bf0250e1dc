"""What a job will cost each record under a policy, before anything is sent; and whether it can be worth it.

Pure arithmetic on the policy and the job. It counts what securesplit/client/train.py will release:

* ``frozen``: A never changes, so a record is released once, whatever the number of epochs and rounds;
* ``round``: A and C change after each round, so every round is a fresh release, a fresh gradient and a part of one sum;
* ``step``: A and C change at every local step, so every epoch of every round is.

Held-out records are evaluated before the first round, after each, and inside as often as ``schedule.evaluate_every`` says:
fresh releases wherever A has changed. How many those are hangs on how many batches an epoch has at this site, which a job
does not know. Where sums carry no noise and the policy allows generation, every record pays in advance for what the other
clients may generate. The counting itself is in securesplit/client/releases.py.

What no forecast knows: what this site spends besides the run, such as on what it generates; and that a run may end early, or
go on without this client for rounds, and spend less.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from securesplit.admit import breaches
from securesplit.client.releases import Needs, Regime, is_exact, needs, within_rounds
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.plan import UNITS, At, ChannelPlan, LabelPlan, Plan, enforced_epsilon, plan_for, rows_moved
from securesplit.protocol.job import Job

USELESS_BITS = 1.0
"""Below one bit for a whole release the server cannot help with text; docs/benchmarks/frontier.md has the measurement."""


@dataclass(frozen=True, slots=True)
class Cost:
    """One channel of one unit of privacy.

    Attributes:
        channel: where it leaves.
        needed: releases that the job makes of one unit.
        allowed: releases that the policy allows it in its life.
        units: what the needed releases are charged together, mu^2 in 2^-40.
        mu: the same as mu.
        sigma_over_clip: noise per coordinate, in clips.
        bits: the most the server can learn from all needed releases together, mu^2/8 nats.
        right: the most often that a yes-or-no question with even odds is answered rightly, Phi(mu/2).
    """

    channel: str
    needed: int
    allowed: int
    units: int
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
            Where the number of batches matters and is not given, with one batch an epoch: at least so many.
        units, mu, epsilon: of a training record after the job; relation replace-one, against the server. Units are what
            the ledger will have charged.
        units_held_out, mu_held_out, epsilon_held_out: the same of a held-out record, which may pay more.
        batches: with so many batches in an epoch, or fewer, the policy pays for the measurements inside the rounds; None
            where their number is given or does not matter.
        exact: whether a run that goes to its end spends exactly this, and not sometimes less.
        epsilon_peer: against the other clients alone, from the sums; equal to ``epsilon`` where B learns; None where no
            noise protects against them.
        budget: epsilon of a unit's whole life.
        rounds: most rounds of this job that the policy allows; None when any number is free.
        epochs: most local epochs in each of the job's rounds; None when any number is free.
        tokens: generated tokens that the policy allows this site in its life.
        useless: whether the releases are too noisy for the server to add anything.
        honest: how many honest clients each sum must hold for these figures to be true; 1 where nobody else is counted on.
        refusals: every rule of the policy that the job breaks, in words; empty for a job that a client would join.
    """

    costs: tuple[Cost, ...]
    held_out: int
    units: int
    mu: float
    epsilon: float
    units_held_out: int
    mu_held_out: float
    epsilon_held_out: float
    epsilon_peer: float | None
    budget: float
    rounds: int | None
    epochs: int | None
    tokens: int
    useless: bool
    batches: int | None = None
    exact: bool = True
    honest: int = 1
    refusals: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every channel can pay for the job."""
        paid = all(cost.fits for cost in self.costs) and self.held_out <= self.costs[0].allowed and self.batches != 0
        return paid and not self.refusals


def forecast(policy: Policy, job: Job, *, records_per_user: int = 1, batches: int | None = None) -> Forecast | None:
    """Count what a job releases of one training record, or of one user with several, and of a held-out one.

    Args:
        policy: the client's own.
        job: the server's.
        records_per_user: under unit ``user``; 1 otherwise.
        batches: of training in one epoch at this site, as ``train`` makes them; it matters where the job measures inside
            rounds under regime ``step``.

    Returns:
        None under UnsafeNoPrivacy, where everything leaves and nothing is counted.

    Raises:
        InputError: SS-1533 when the policy's budget cannot be divided as it says.
    """
    privacy = policy.privacy
    if not isinstance(privacy, Gaussian):
        return None
    plan = plan_for(privacy, rows=rows_moved(job.cut.front, policy.limits.buckets))
    regime, many = privacy.regime, records_per_user if privacy.unit == "user" else 1
    need = needs(job, regime, batches or 1)
    costs = _costs(plan, job, regime, need, many)
    # One unit says in the ledger that an update without noise has entered a blind sum.
    bare = int(regime == "frozen" and plan.update is None and job.mode.summed)
    units = bare + sum(cost.units for cost in costs)
    # In regime ``frozen`` sums and reserves are charged to all of the site's records, as C may hold something of any.
    common = (
        bare + sum(cost.units for cost in costs if cost.channel in {"update", "peers"}) if regime == "frozen" else 0
    )
    held_out = many * need.held_out
    apart = plan.cut.units * held_out + common
    update = next((cost.mu for cost in costs if cost.channel == "update"), None if job.mode.summed else 0.0)
    mu, shown = _mu(units), update if regime == "frozen" else _mu(units)
    unknown = regime == "step" and batches is None
    reach = _Reach(plan, job, regime, many, batches or 1)
    return Forecast(
        costs=costs, held_out=held_out, units=units, mu=mu, epsilon=enforced_epsilon(mu, privacy.delta),
        units_held_out=apart, mu_held_out=_mu(apart), epsilon_held_out=enforced_epsilon(_mu(apart), privacy.delta),
        epsilon_peer=None if shown is None else enforced_epsilon(shown, privacy.delta),
        budget=enforced_epsilon(plan.mu, privacy.delta), rounds=reach.rounds(), epochs=reach.epochs(),
        tokens=0 if plan.decode is None else plan.decode.releases // max(1, len(job.sums.roster)),
        useless=_bits(mu) < USELESS_BITS and job.task is None,
        batches=within_rounds(job, plan.cut.releases // many) if unknown else None,
        exact=is_exact(job, regime) and many == 1 and not (unknown and job.schedule.evaluate_every is not None),
        honest=1 if plan.update is None else plan.update.honest, refusals=(*_refusals(regime, job.schedule.epochs), *breaches(policy, job)),
    )  # fmt: skip


def _costs(plan: Plan, job: Job, regime: Regime, need: Needs, many: int) -> tuple[Cost, ...]:
    """Of a training record, or a user whose records all are."""
    costs = [_cost("cut", need.trained * many, plan.cut)]
    if plan.gradient is not None:
        costs.append(_cost("gradient", need.trained * many, plan.gradient))
    if plan.labels is not None:
        units = plan.labels.units * many
        mu = _mu(units)
        costs.append(Cost("labels", many, _answers(plan, plan.labels), units, mu, 0.0, _bits(mu), _right(mu)))
    if plan.update is not None:
        # Of a user's records each batch's sum may hold one; a round's sum holds the user once.
        costs.append(_cost("update", need.summed * (many if regime == "step" else 1), plan.update))
    elif plan.decode is not None and job.mode.summed:
        peers = len(job.sums.roster) - 1  # As Gate.reserve_for_peers counts.
        reserved = peers * (plan.decode.releases // (peers + 1))
        if reserved:
            costs.append(_cost("peers", reserved, plan.decode))
    return tuple(costs)


def _cost(channel: At | Literal["peers"], needed: int, plan: ChannelPlan) -> Cost:
    units = plan.units * needed
    mu = _mu(units)
    return Cost(channel, needed, plan.releases, units, mu, plan.sigma / plan.clip, _bits(mu), _right(mu))


def _mu(units: int) -> float:
    return math.sqrt(units / UNITS)


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


@dataclass(frozen=True, slots=True)
class _Reach:
    """How far the channels that a job fills as it goes on let it go."""

    plan: Plan
    job: Job
    regime: Regime
    many: int
    batches: int

    def rounds(self) -> int | None:
        """Most rounds of this job; in ``frozen`` only noised sums cost per round."""
        if self.regime == "frozen" and (self.plan.update is None or not self.job.mode.summed):
            return None
        return self._most(lambda rounds: needs(self.job, self.regime, self.batches, rounds=rounds))

    def epochs(self) -> int | None:
        """Most epochs in each of the job's rounds."""
        if self.regime == "frozen":
            return None
        if self.regime == "round":
            return 1
        return self._most(lambda epochs: needs(self.job, self.regime, self.batches, epochs=epochs))

    def _most(self, need: Callable[[int], Needs]) -> int:
        # Each further one adds a release somewhere, but in sequence: there only each client's own turns do.
        most = max(c.releases for c in (self.plan.cut, self.plan.update) if c is not None) * len(self.job.sums.roster)
        return bisect_left(range(1, most + 2), x=True, key=lambda number: not self._fits(need(number)))

    def _fits(self, need: Needs) -> bool:
        costs = _costs(self.plan, self.job, self.regime, need, self.many)
        paid = all(cost.fits for cost in costs if cost.channel in {"cut", "gradient", "update"})
        return paid and self.many * need.held_out <= self.plan.cut.releases
