"""What an epsilon speaks of: its delta, its unit and its neighbouring relation. No epsilon is shown without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from securesplit.policy.schema import Gaussian

__all__ = ["Meaning", "meaning_of"]


@dataclass(frozen=True, slots=True)
class Meaning:
    """Two epsilons are of one quantity when these are equal, and else must not be compared.

    Attributes:
        delta: the probability for which epsilon need not hold.
        unit: what is protected, such as ``sequence``.
        relation: how neighbours differ in one unit, such as ``replace-one``.
    """

    delta: float
    unit: str
    relation: str

    def __str__(self) -> str:
        """To stand behind the figure."""
        return f"at delta {self.delta:g}, unit {self.unit}, {self.relation}"


def meaning_of(privacy: Gaussian) -> Meaning:
    """Of every epsilon under a policy's private shape."""
    return Meaning(privacy.delta, privacy.unit, privacy.relation)
