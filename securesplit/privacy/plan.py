"""From a policy's budget to each channel's noise, in integers, so that shares can neither be lost nor overspent.

The ledger counts mu^2 in units of 2^-40. The budget is rounded down to units, every release's part of it is rounded
down again, and sigma is computed from the rounded part and rounded up: the noise pays for at most what is charged.

Which mu a budget of (epsilon, delta) buys: noise on the lattice has the Renyi curve of a Gaussian, exactly (Canonne,
Kamath, Steinke, arXiv:2004.00010), but not proven its trade-off function. So the budget is the smaller of two: the mu whose
Renyi curve converts to epsilon, and the mu whose Gaussian trade-off function does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from securesplit.errors import InputError
from securesplit.policy.schema import Channel, Gaussian, Labels, Updates
from securesplit.privacy.calibrate import epsilon_for, epsilon_rdp_for, mu_for, mu_rdp_for

UNITS = 1 << 40

At = Literal["cut", "gradient", "decode", "update", "labels"]


def enforced_mu(epsilon: float, delta: float) -> float:
    """The largest mu that both accountants admit at (epsilon, delta), rounded down."""
    return min(mu_for(epsilon, delta), mu_rdp_for(epsilon, delta))


def enforced_epsilon(mu: float, delta: float) -> float:
    """What is printed for noise on the lattice that cost ``mu``: the larger of the two accountants' epsilons."""
    return max(epsilon_for(mu, delta), epsilon_rdp_for(mu, delta)) if mu > 0 else 0.0


@dataclass(frozen=True, slots=True)
class ChannelPlan:
    """One channel's clip and noise.

    Attributes:
        clip: C, Frobenius bound on one record's tensor; on each of its rows where ``per_row``.
        sigma: standard deviation of the noise per coordinate; ``sensitivity / mu``.
        units: mu^2 of one release, in 2^-40.
        releases: how many releases a unit of privacy has on this channel, over its life.
        sensitivity: L2 distance between neighbours; 2C, or 2C sqrt(rows) where one token moves several clipped rows.
        per_row: whether rows are clipped one by one.
        honest: how many clients share this noise in a secure sum; 1 where the release carries all of it.
    """

    clip: float
    sigma: float
    units: int
    releases: int
    sensitivity: float
    per_row: bool = False
    honest: int = 1

    @property
    def part(self) -> float:
        """Standard deviation of one client's part of the noise; the parts of ``honest`` clients together have ``sigma``.

        Each part is a discrete Gaussian, and so is their sum, with the variances added, but for a factor within
        ``1 +- 2.1 exp(-2 pi^2 w^2)``, ``w^-2 = s^-2 + s'^-2`` for two of widths s and s' (Poisson summation, as in
        securesplit/privacy/lattice.py): at its width of 2^20 steps no computer can tell that factor from 1.
        """
        return self.sigma if self.honest == 1 else self.sigma / math.sqrt(self.honest) * (1 + 2.0**-50)

    @property
    def mu(self) -> float:
        """mu of one release."""
        return math.sqrt(self.units / UNITS)

    def gain(self, coordinates: int) -> float:
        """The public factor that brings a noised release back to norm C: ``C / sqrt(C^2 + n sigma^2)``.

        Scaling after the noise is post-processing, so it costs nothing and hides nothing; without it B's layers meet
        rows hundreds of times longer than any they were trained on.

        Args:
            coordinates: n, numbers in what was clipped: one record's release, padding included, or one row of it.
        """
        return self.clip / math.hypot(self.clip, self.sigma * math.sqrt(coordinates))


@dataclass(frozen=True, slots=True)
class LabelPlan:
    """Randomised response on labels.

    Attributes:
        epsilon: of pure differential privacy of one answer, rounded down.
        classes: number of labels.
        units: mu^2 that one answer is charged, in 2^-40; epsilon-DP implies this mu (privacy study 1.5).
    """

    epsilon: float
    classes: int
    units: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All channels of one policy.

    Attributes:
        budget: mu_total^2 of one unit's life, in 2^-40, rounded down.
        cut, gradient, decode, update: O1, O3, O1 for generated tokens, O5; None where the policy has no such channel.
        labels: randomised response instead of noised gradients, or None.
    """

    budget: int
    cut: ChannelPlan
    gradient: ChannelPlan | None
    decode: ChannelPlan | None
    update: ChannelPlan | None
    labels: LabelPlan | None

    @property
    def mu(self) -> float:
        """mu of one unit's whole life."""
        return math.sqrt(self.budget / UNITS)

    def channel(self, at: At) -> ChannelPlan | None:
        """The plan of one place of release, or None where the policy closes it or needs no noise there."""
        match at:
            case "cut":
                return self.cut
            case "gradient":
                return self.gradient
            case "decode":
                return self.decode
            case "update":
                return self.update
            case "labels":
                return None


def rows_moved(front: int, buckets: tuple[int, ...]) -> int:
    """How many released rows one token of a record can move.

    One, when A is the embedding alone; with causal attention in A all rows from its own on, which may be the first. The
    longest public length is counted, never the private one.

    Args:
        front: decoder layers in A.
        buckets: public lengths.
    """
    return 1 if front == 0 else max(buckets)


def plan_for(privacy: Gaussian, *, rows: int | None = None) -> Plan:
    """Derive every channel's noise from the budget.

    Relation: replace-one, so what is clipped at C has sensitivity 2C. Units ``sequence`` and ``user`` clip a record as a
    whole; several records of one user add up in the ledger, and inside one sum they are clipped together. Unit ``token``
    clips a record's activations row by row, with sensitivity ``2 C sqrt(rows)``; generated rows, a gradient or an update
    are clipped as a whole there too, because one token may move all of it.

    Args:
        privacy: the policy's.
        rows: of :func:`rows_moved`; required under unit ``token``.

    Raises:
        InputError: SS-1533 when a channel's part of the budget is less than one unit.
        ValueError: under unit ``token`` without ``rows``.
    """
    by_token = privacy.unit == "token"
    if by_token and rows is None:
        raise ValueError("unit 'token' needs the number of rows that one token moves")
    budget = math.floor(Fraction(enforced_mu(privacy.epsilon, privacy.delta)) ** 2 * UNITS)
    stated_channels = (privacy.activations, privacy.gradients, privacy.labels, privacy.generation, privacy.updates)
    # Decimal shares such as 0.1 + 0.2 + 0.7 may exceed 1 in the last bit; exact fractions keep their parts below 1.
    whole = max(Fraction(1), sum((Fraction(c.share) for c in stated_channels if c is not None), Fraction(0)))

    def units_of(stated: Channel | Labels, releases: int) -> int:
        units = math.floor(budget * Fraction(stated.share) / whole / releases)
        if units < 1:
            raise InputError(
                "SS-1533",
                "a channel's part of the budget for one release is less than the ledger can count, mu = 2^-20",
                hint="Raise privacy.epsilon or the channel's share, or lower its releases.",
            )
        return units

    def channel(stated: Channel | None, *, moved: int | None = None) -> ChannelPlan | None:
        if stated is None:
            return None
        units = units_of(stated, stated.releases)
        sensitivity = 2 * stated.clip * math.sqrt(moved or 1)
        # The square roots and the division may each round by 2^-53, so one part in 2^50 covers them all.
        sigma = sensitivity / math.sqrt(units / UNITS) * (1 + 2.0**-50)
        return ChannelPlan(stated.clip, sigma, units, stated.releases, sensitivity, per_row=moved is not None)

    cut = channel(privacy.activations, moved=rows if by_token else None)
    assert cut is not None
    return Plan(
        budget=budget,
        cut=cut,
        gradient=channel(privacy.gradients),
        decode=channel(privacy.generation),
        update=_shared(channel(privacy.updates), privacy.updates),
        labels=None if privacy.labels is None else _label_plan(privacy.labels, units_of(privacy.labels, 1)),
    )


def _shared(plan: ChannelPlan | None, stated: Updates | None) -> ChannelPlan | None:
    return plan if plan is None or stated is None else replace(plan, honest=stated.honest or 1)


def _label_plan(stated: Labels, units: int) -> LabelPlan:
    at = math.sqrt(units / UNITS) / 2 / math.sqrt(2)
    # Phi(mu/2) / Phi(-mu/2) is e^epsilon at the corner where epsilon-DP touches mu-GDP. A ratio close to 1 has lost the
    # digits of its logarithm, and one minus erf close to 1 its own, so each form is used where it keeps them.
    epsilon = 2 * math.atanh(math.erf(at)) if at < 0.5 else math.log(math.erfc(-at) / math.erfc(at))
    return LabelPlan(epsilon=epsilon * (1 - 2.0**-40), classes=stated.classes, units=units)
