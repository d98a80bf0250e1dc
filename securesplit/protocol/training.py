"""How a job's clients and the server's part learn together: the mode, and what belongs to it. Part of the job file.

In every mode B sees each client's batches as forward and backward of one step; modes differ in how many copies of B's
adapters there are, when these are averaged, in which order clients step, and what of A and C the secure sums carry.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Mode", "Order", "PersonalPart", "Training", "Weighting"]

Mode = Literal["splitfed-v2", "splitfed-v1", "splitfed-v3", "sequential", "client-batch", "hierarchical"]
Order = Literal["arrival", "roster"]
Weighting = Literal["sequences", "uniform"]
PersonalPart = Literal["front", "back"]

_REPLICATED = frozenset({"splitfed-v1", "splitfed-v3", "hierarchical"})


class Training(BaseModel):
    """The mode of training.

    Attributes:
        mode: ``splitfed-v2``: one B, the clients' steps one after another, A and C summed after each round (SplitFed v2,
            arXiv:2004.12088); what a job without this table does. ``splitfed-v1``: a copy of B's adapters for each client,
            averaged when a round's secure sum begins (v1 there). ``splitfed-v3``: copies as well, averaged every ``every``
            steps; A and C stay each client's own and nothing is summed (arXiv:2112.01299). ``sequential``: one client learns
            in each round and hands A and C over to the others (split learning, arXiv:1812.00564). ``client-batch``: B
            computes on the batches of all clients at once. ``hierarchical``: a copy of B's adapters for each group of clients,
            averaged every ``every`` steps; A and C summed after each round.
        order: whose step is next where clients share a B: whoever asked first, or the roster's order, which makes a run
            repeatable bit for bit and waits for those who are slower.
        every: learning steps of each client between two means of B's copies; absent where the secure sums say when.
        groups: who shares a copy in mode ``hierarchical``; absent: each client has its own.
        straggler_seconds: how long the others wait for a client that owes them a step; then they go on without it until it is
            back.
        weighting: what counts in a mean over clients at the server: each by its sequences, or each the same.
        personal: parts on the client's side that are never summed and never leave: a head, or a front, of each client's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    mode: Mode = "splitfed-v2"
    order: Order = "arrival"
    every: Annotated[int | None, Field(ge=1, le=100_000)] = None
    groups: Annotated[
        tuple[Annotated[tuple[str, ...], Field(min_length=1, strict=False)], ...], Field(max_length=256, strict=False)
    ] = ()
    straggler_seconds: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    weighting: Weighting = "sequences"
    personal: Annotated[tuple[PersonalPart, ...], Field(max_length=2, strict=False)] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """All that contradicts the mode, at once."""
        faults = []
        if self.mode in {"splitfed-v3", "hierarchical"} and self.every is None:
            faults.append(
                f"mode '{self.mode}' needs every: how many steps lie between two means of the server's copies"
            )
        if self.every is not None and self.mode not in {"splitfed-v3", "hierarchical"}:
            faults.append(
                f"every belongs to modes splitfed-v3 and hierarchical; mode '{self.mode}' averages no copies by it"
            )
        if self.groups and self.mode != "hierarchical":
            faults.append(f"groups belong to mode hierarchical, not to '{self.mode}'")
        named = [name for group in self.groups for name in group]
        if len(set(named)) < len(named):
            faults.append("a client stands in two groups, or twice in one")
        if self.mode == "splitfed-v3" and self.personal:
            faults.append("in mode splitfed-v3 both parts are personal already; leave personal out")
        if len(set(self.personal)) < len(self.personal):
            faults.append("a part stands twice in personal")
        elif len(self.personal) == 2:
            faults.append("with both parts personal nothing is left to sum; that is mode splitfed-v3")
        if self.mode == "sequential" and self.personal:
            faults.append("mode sequential hands both parts over; personal parts stay, so leave personal out")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def summed(self) -> bool:
        """Whether there are secure sums at all."""
        return self.mode != "splitfed-v3"

    @property
    def replicated(self) -> bool:
        """Whether B's adapters have copies."""
        return self.mode in _REPLICATED

    def lanes(self, roster: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        """Who shares a copy of B's adapters: all, or each for itself, or the groups; in the roster's sorted order."""
        names = tuple(sorted(roster))
        if not self.replicated:
            return (names,)
        grouped = {name for group in self.groups for name in group}
        alone = tuple((name,) for name in names if name not in grouped)
        return (*(tuple(sorted(group)) for group in self.groups), *alone)
