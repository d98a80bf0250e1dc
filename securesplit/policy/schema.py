"""What a policy may say. An illegal policy cannot be built.

A policy is a complete TOML file, without inheritance, owned by the client. It states a budget, and the noise follows
from the budget: nobody writes a sigma by hand. Two shapes of the ``[privacy]`` table exist and no third:

* ``mechanism = "gaussian"``: clip, add calibrated Gaussian noise, charge the ledger;
* ``mechanism = "UnsafeNoPrivacy"``: send everything as it is. Long to type, loopback only, stamped on every report.

What a policy does *not* do: it says nothing of message lengths, timing and order beyond the length buckets; those are
public (docs/threat-model.md, O7).
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Aggregation", "Channel", "Gaussian", "Limits", "Policy", "Transport", "UnsafeNoPrivacy"]

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Channel(BaseModel):
    """One way out of the client, with its part of the budget.

    Attributes:
        clip: C, the largest Frobenius norm that one record's tensor (all its rows) may have; model units.
        share: the part of the squared budget, mu_total^2, that this channel may spend over a record's lifetime.
        releases: how many releases that part is divided over; one more is refused.
    """

    model_config = _STRICT
    clip: Positive
    share: Share
    releases: Annotated[int, Field(ge=1, le=1_000_000)]


class Gaussian(BaseModel):
    """The private shape: a lifetime budget per record, divided over channels.

    Attributes:
        unit: what is protected; one ``sequence`` is one training example or one prompt.
        relation: what may differ between neighbours; a record is *replaced* by any other, hence sensitivity 2C.
        epsilon, delta: the budget of one record over its whole life, against a server that keeps everything.
        regime: ``frozen``: A and B never change, no gradient crosses, only C learns (privacy.md's regime F).
        activations: O1, what a record's own rows may cost.
        generation: O1 once more, for tokens that were generated and fed back; absent means generation is refused.
        gradients: O3; must be absent in ``frozen``, where no gradient exists.
    """

    model_config = _STRICT
    mechanism: Literal["gaussian"]
    unit: Literal["sequence"]
    relation: Literal["replace-one"]
    epsilon: Annotated[float, Field(gt=0, le=1000)]
    delta: Annotated[float, Field(gt=0, lt=1e-3)]
    regime: Literal["frozen", "round"]
    activations: Channel
    gradients: Channel | None = None
    updates: Channel | None = None
    generation: Channel | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Gaussian:
        channels = [c for c in (self.activations, self.gradients, self.updates, self.generation) if c is not None]
        total = sum(c.share for c in channels)
        if total > 1 + 1e-9:
            msg = f"the channels' shares add up to {total:.4f}; a budget can be spent once, so at most 1"
            raise ValueError(msg)
        if self.regime == "frozen" and (self.gradients is not None or self.updates is not None):
            msg = "regime 'frozen' sends no gradients and no noised updates: remove [privacy.gradients] and [privacy.updates]"
            raise ValueError(msg)
        if self.regime == "round" and (self.gradients is None or self.updates is None):
            msg = "regime 'round' releases gradients and updates: both [privacy.gradients] and [privacy.updates] are needed"
            raise ValueError(msg)
        return self


class UnsafeNoPrivacy(BaseModel):
    """The unsafe shape: nothing is clipped, noised or charged. For experiments on public text, on loopback."""

    model_config = _STRICT
    mechanism: Literal["UnsafeNoPrivacy"]


class Aggregation(BaseModel):
    """Floors for secure aggregation that no server can lower.

    Attributes:
        min_clients: fewest updates in a sum that this client takes part in.
        min_threshold: fewest clients that must agree before a sum is opened; always more than half of the roster.
        blind: the sum is hidden from the server too; only clients can open it.
        max_update: largest absolute value of one coordinate of an update; larger ones are clipped.
    """

    model_config = _STRICT
    min_clients: Annotated[int, Field(ge=3, le=1000)]
    min_threshold: Annotated[int, Field(ge=2, le=1000)]
    blind: bool
    max_update: Positive


class Limits(BaseModel):
    """Caps on what is accepted from, and sent to, the other side.

    Attributes:
        min_front, min_back: fewest decoder layers that stay on the client on each end.
        max_sequences: largest number of sequences in one message.
        buckets: public lengths, in tokens; every sequence is padded up to one of them and the server sees only that.
        max_message_bytes: largest whole message, in bytes.
    """

    model_config = _STRICT
    min_front: Annotated[int, Field(ge=0)]
    min_back: Annotated[int, Field(ge=0)]
    max_sequences: Annotated[int, Field(ge=1, le=4096)]
    buckets: Annotated[tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...], Field(min_length=1, strict=False)]
    max_message_bytes: Annotated[int, Field(ge=1 << 16, le=1 << 32)]

    @model_validator(mode="after")
    def _rising(self) -> Limits:
        if list(self.buckets) != sorted(set(self.buckets)):
            msg = "buckets must rise strictly"
            raise ValueError(msg)
        return self


class Transport(BaseModel):
    """Where the traffic may go."""

    model_config = _STRICT
    loopback_only: bool


class Policy(BaseModel):
    """A whole policy file.

    Attributes:
        name: short name, shown everywhere.
        purpose: in plain words, whom the policy is for.
        cost: in plain words, what it costs in quality.
    """

    model_config = _STRICT
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
    purpose: Annotated[str, Field(min_length=20)]
    cost: Annotated[str, Field(min_length=20)]
    privacy: Annotated[Gaussian | UnsafeNoPrivacy, Field(discriminator="mechanism")]
    aggregation: Aggregation
    limits: Limits
    transport: Transport

    @model_validator(mode="after")
    def _unsafe_stays_home(self) -> Policy:
        if isinstance(self.privacy, UnsafeNoPrivacy) and not self.transport.loopback_only:
            msg = "UnsafeNoPrivacy is allowed on loopback only: set transport.loopback_only = true"
            raise ValueError(msg)
        if isinstance(self.privacy, Gaussian) and self.privacy.regime == "frozen" and not self.aggregation.blind:
            msg = "regime 'frozen' adds no noise to updates, so the sum must be hidden from the server: set aggregation.blind = true"
            raise ValueError(msg)
        return self

    @property
    def unsafe(self) -> bool:
        """Whether this policy protects nothing."""
        return isinstance(self.privacy, UnsafeNoPrivacy)

    def canonical(self) -> bytes:
        """The bytes that are hashed, signed and compared: JSON, sorted keys, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`canonical`, in hex."""
        return hashlib.sha256(self.canonical()).hexdigest()
