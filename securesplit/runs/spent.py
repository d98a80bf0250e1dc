"""What a run has spent, with what the figure means. An epsilon whose meaning is not known is no figure, and is not shown as one.

The folder may be damaged, or of another's making: whatever its texts hold, there is an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from securesplit.policy.meaning import Meaning

__all__ = ["NO_BOUND", "UNKNOWN", "Bound", "Name", "Share", "Spent", "highest", "spent_by", "spent_under"]

Bound = Literal["stated", "none", "unknown"]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
Share = Annotated[float, Field(gt=0, lt=1)]
_LENIENT = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


@dataclass(frozen=True, slots=True)
class Spent:
    """One epsilon, or why there is none.

    Attributes:
        bound: ``stated``: ``epsilon`` is of the record that has spent most; ``none``: nothing bounds what leaves, as under
            UnsafeNoPrivacy; ``unknown``: nothing that can be read says what the figure means, so that it is left out.
        epsilon: None as well where a bound is stated and nothing has been counted yet.
        meaning: of ``epsilon``; None exactly where no bound is stated.
    """

    bound: Bound
    epsilon: float | None = None
    meaning: Meaning | None = None

    def __str__(self) -> str:
        """The figure with all that belongs to it, or words."""
        if self.bound != "stated":
            return "none: UNSAFE" if self.bound == "none" else "unknown"
        figure = "not counted yet" if self.epsilon is None else f"{self.epsilon:.6g}"
        return f"{figure} {self.meaning}"


NO_BOUND, UNKNOWN = Spent("none"), Spent("unknown")


def spent_by(epsilon: float | None, delta: float | None, unit: str, relation: str) -> Spent:
    """Of a finished run's record: both numbers stand there, or neither."""
    if epsilon is None and delta is None:
        return NO_BOUND
    return UNKNOWN if epsilon is None or delta is None else Spent("stated", epsilon, Meaning(delta, unit, relation))


def spent_under(policy: str, epsilon: float | None) -> Spent:
    """Of a run that has a policy and no record yet.

    Args:
        policy: JSON of about.json; of any version that has these few keys, or no policy at all.
        epsilon: of the last row.
    """
    try:
        privacy = _Policy.model_validate_json(policy).privacy
    except ValidationError:
        return UNKNOWN
    if isinstance(privacy, _Unbounded):
        return NO_BOUND
    return Spent("stated", epsilon, Meaning(privacy.delta, privacy.unit, privacy.relation))


def highest(spents: Sequence[Spent]) -> Spent:
    """The largest of several sites' figures. Without a bound where one site has none; unknown where they mean different things."""
    if NO_BOUND in spents:
        return NO_BOUND
    if len({spent.meaning for spent in spents}) != 1 or any(spent.epsilon is None for spent in spents):
        return UNKNOWN
    return max(spents, key=lambda spent: spent.epsilon or 0.0)


class _Bounded(BaseModel):
    """As much of ``[privacy]`` as an epsilon needs, so that a policy of a later version tells it, too."""

    model_config = _LENIENT
    mechanism: Literal["gaussian"]
    delta: Share
    unit: Name
    relation: Name


class _Unbounded(BaseModel):
    model_config = _LENIENT
    mechanism: Literal["UnsafeNoPrivacy"]


class _Policy(BaseModel):
    model_config = _LENIENT
    privacy: Annotated[_Bounded | _Unbounded, Field(discriminator="mechanism")]
