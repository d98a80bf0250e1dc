"""What a policy says of secure sums: floors under who takes part, and under what a server may answer before one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field

from securesplit.policy.table import STRICT, Positive, Table, at

__all__ = ["Aggregation", "Plausible"]


def _each_once(roster: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """In one order, because policies are compared by their digests."""
    if roster is not None and len(set(roster)) < len(roster):
        raise ValueError("a client stands twice in the roster")
    return None if roster is None else tuple(sorted(roster))


class Plausible(Table):
    """What the server may answer before this client abstains from the round's sum; why: docs/threat-model.md, section 6.

    Attributes:
        output: least and largest norm of B's output over that of what was sent and multiplied by its public gain.
        gradient: the same of the gradient at B's input over that at B's output, for the same gain.
        spread: least part of a batch's directions that is not common to all rows, over that of what was sent.
        steadiness: how far a step's ratio may lie from the round's median, either way, as a factor.
    """

    output: Annotated[tuple[Positive, Positive], Field(strict=False)]
    gradient: Annotated[tuple[Positive, Positive], Field(strict=False)]
    spread: Annotated[float, Field(ge=0, lt=1)]
    steadiness: Annotated[float, Field(ge=1)]

    @staticmethod
    def rules(table: object) -> Iterator[str]:
        """Ranges rise."""
        for name in ("output", "gradient"):
            ends = at(table, name)
            if isinstance(ends, list | tuple) and [type(e) for e in ends] == [float, float] and ends[0] >= ends[1]:
                yield f"{name}: the first number must be below the second"


class Aggregation(BaseModel):
    """Floors for secure aggregation that no server can lower.

    Attributes:
        min_clients: fewest updates in a sum that this client takes part in.
        min_threshold: fewest clients that must agree before a sum is opened; always more than half of the roster.
        blind: the sum is hidden from the server too; only clients can open it.
        max_update: largest absolute value of one coordinate of an update; larger ones are clipped.
        min_colluders: fewest clients that may side with the server without this client's update being opened. Absent: what
            the job says, which above 32 clients is a tenth of them at least.
        roster: certificate names of exactly those who may take part, as the consortium agreed. Absent: whom the server's
            job names, as far as the authority certified them.
        min_update: least root mean square of A's part and of C's part of an update. Absent, a part must have moved by a
            twentieth of a learning rate under UnsafeNoPrivacy, and may have stood still elsewhere.
        plausible: absent, the client keeps the floors of securesplit/client/plausible.py.
    """

    model_config = STRICT
    min_clients: Annotated[int, Field(ge=3, le=1000)]
    min_threshold: Annotated[int, Field(ge=2, le=1000)]
    blind: bool
    max_update: Positive
    # A policy without these keys is the policy that it was before they existed, digest included.
    min_colluders: Annotated[int | None, Field(ge=0, le=256, exclude_if=lambda value: value is None)] = None
    roster: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=128)], ...] | None,
        Field(min_length=3, max_length=256, strict=False, exclude_if=lambda value: value is None),
        AfterValidator(_each_once),
    ] = None
    min_update: Annotated[Positive | None, Field(exclude_if=lambda value: value is None)] = None
    plausible: Annotated[Plausible | None, Field(exclude_if=lambda value: value is None)] = None
