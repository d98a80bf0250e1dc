"""From a policy's budget to each channel's noise, in integers, so that shares can neither be lost nor overspent.

The ledger counts mu^2 in units of 2^-40. The budget is rounded down to units, every release's part of it is rounded
down again, and sigma is computed from the rounded part and rounded up: the noise pays for at most what is charged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from securesplit.errors import InputError
from securesplit.policy.schema import Channel, Gaussian
from securesplit.privacy.calibrate import mu_for

UNITS = 1 << 40

At = Literal["cut", "gradient", "decode", "update"]


@dataclass(frozen=True, slots=True)
class ChannelPlan:
    """One channel's clip and noise.

    Attributes:
        clip: C, Frobenius bound on one record's tensor.
        sigma: standard deviation of the noise per coordinate; ``2 C / mu``.
        units: mu^2 of one release, in 2^-40.
        releases: how many releases a record has on this channel, over its life.
    """

    clip: float
    sigma: float
    units: int
    releases: int

    @property
    def mu(self) -> float:
        """mu of one release."""
        return math.sqrt(self.units / UNITS)

    def gain(self, coordinates: int) -> float:
        """The public factor that brings a noised release back to norm C: ``C / sqrt(C^2 + n sigma^2)``.

        Scaling after the noise is post-processing, so it costs nothing and hides nothing; without it B's layers meet
        rows hundreds of times longer than any they were trained on.

        Args:
            coordinates: n, numbers in one record's release, padding included.
        """
        return self.clip / math.hypot(self.clip, self.sigma * math.sqrt(coordinates))


@dataclass(frozen=True, slots=True)
class Plan:
    """All channels of one policy.

    Attributes:
        budget: mu_total^2 of one record's life, in 2^-40, rounded down.
        cut, gradient, decode, update: O1, O3, O1 for generated tokens, O5; None where the policy has no such channel.
    """

    budget: int
    cut: ChannelPlan
    gradient: ChannelPlan | None
    decode: ChannelPlan | None
    update: ChannelPlan | None

    def channel(self, at: At) -> ChannelPlan | None:
        """The plan of one place of release, or None where the policy closes it."""
        match at:
            case "cut":
                return self.cut
            case "gradient":
                return self.gradient
            case "decode":
                return self.decode
            case "update":
                return self.update


def plan_for(privacy: Gaussian) -> Plan:
    """Derive every channel's noise from the budget.

    Unit: sequence. Relation: replace-one, so a release clipped at C has sensitivity 2C.

    Raises:
        InputError: SS-1533 when a channel's part of the budget is less than one unit.
    """
    budget = math.floor(Fraction(mu_for(privacy.epsilon, privacy.delta)) ** 2 * UNITS)
    stated_channels = (privacy.activations, privacy.gradients, privacy.generation, privacy.updates)
    # Decimal shares such as 0.1 + 0.2 + 0.7 may exceed 1 in the last bit; exact fractions keep their parts below 1.
    whole = max(Fraction(1), sum((Fraction(c.share) for c in stated_channels if c is not None), Fraction(0)))

    def channel(stated: Channel | None) -> ChannelPlan | None:
        if stated is None:
            return None
        units = math.floor(budget * Fraction(stated.share) / whole / stated.releases)
        if units < 1:
            raise InputError(
                "SS-1533",
                "a channel's part of the budget for one release is less than the ledger can count, mu = 2^-20",
                hint="Raise privacy.epsilon or the channel's share, or lower its releases.",
            )
        # The square root and the division may each round down by 2^-53, so one part in 2^50 covers both.
        sigma = 2 * stated.clip / math.sqrt(units / UNITS) * (1 + 2.0**-50)
        return ChannelPlan(clip=stated.clip, sigma=sigma, units=units, releases=stated.releases)

    cut = channel(privacy.activations)
    assert cut is not None
    return Plan(
        budget=budget,
        cut=cut,
        gradient=channel(privacy.gradients),
        decode=channel(privacy.generation),
        update=channel(privacy.updates),
    )
