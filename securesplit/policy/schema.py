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
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
)

from securesplit.policy.aggregation import Aggregation, Plausible
from securesplit.policy.leakage import Leakage
from securesplit.policy.table import STRICT, Table, at

__all__ = [
    "Aggregation",
    "Channel",
    "Gaussian",
    "Labels",
    "Leakage",
    "Limits",
    "Plausible",
    "Policy",
    "Transport",
    "UnsafeNoPrivacy",
    "Updates",
]


Share = Annotated[float, Field(gt=0, le=1)]


# A float32 holds the noise of every clip between these bounds, at any share of any budget.
Clip = Annotated[float, Field(ge=1e-6, le=1e9)]


class Channel(BaseModel):
    """One way out of the client, with its part of the budget.

    Attributes:
        clip: C, the largest Frobenius norm that one record's tensor (all its rows) may have; under unit ``token``, the
            largest norm of one activation row; model units.
        share: the part of the squared budget, mu_total^2, that this channel may spend over a unit's lifetime.
        releases: how many releases that part is divided over; one more is refused.
    """

    model_config = STRICT
    clip: Clip
    share: Share
    releases: Annotated[int, Field(ge=1, le=1_000_000)]


class Updates(Channel):
    """The channel of O5, which may share its noise with other clients.

    Attributes:
        honest: how many honest clients the noise of a sum may count on. Absent, a client counts on nobody: it adds all of
            the noise itself, and the sum of n clients carries n times what is needed. With ``honest = h`` each adds an h-th
            of the variance in the ring of the secure sum, and takes part in no sum that fewer than h honest clients could
            be in, after the worst dropout that opens it, and without its colluders, of whom there is one at least: whoever
            opens a sum knows its own part of the noise.
    """

    # A policy without the key is the policy that it was before the key existed, digest included.
    honest: Annotated[int | None, Field(ge=2, le=256, exclude_if=lambda value: value is None)] = None


def _as_updates(value: object) -> object:
    """A plain channel is a channel of updates that counts on nobody."""
    return Updates(**value.model_dump()) if type(value) is Channel else value


class Labels(BaseModel):
    """Randomised response on class labels, once per record; then O3 needs no noise of its own.

    Attributes:
        share: the part of the squared budget that the answer may cost.
        classes: how many labels there are; public.
    """

    model_config = STRICT
    share: Share
    classes: Annotated[int, Field(ge=2, le=10_000)]


class Gaussian(Table):
    """The private shape: a lifetime budget per unit, divided over channels.

    Attributes:
        unit: what is protected. ``sequence``: one training example or one prompt, whole. ``token``: one token of it;
            clips activation rows one by one, and is dearer than it sounds once A has attention, because one token moves
            all rows after it. ``user``: everything that one person has at this site, under one key in the ledger.
        relation: what may differ between neighbours; a unit is *replaced* by any other, hence sensitivity 2C.
        epsilon, delta: the budget of one unit over its whole life, against a server that keeps everything.
        regime: ``frozen``: A and B never change, no gradient crosses, only C learns. ``round``: A and C change once per
            round, by the noised sum. ``step``: A and C change at every local step, each step noised (DP-SGD).
        activations: O1, what a record's own rows may cost.
        generation: O1 once more, for tokens that were generated and fed back; absent means generation is refused.
        gradients: O3; must be absent in ``frozen``, where no gradient exists.
        labels: instead of ``gradients``, where the only secret in O3 is a class label.
        updates: O5. In ``round`` and ``step`` clipped per unit. In ``frozen`` it is optional: the client's whole update is
            clipped and noised, which is what gives a claim against the other clients.
    """

    mechanism: Literal["gaussian"]
    unit: Literal["sequence", "token", "user"]
    relation: Literal["replace-one"]
    epsilon: Annotated[float, Field(gt=0, le=1000)]
    delta: Annotated[float, Field(gt=0, lt=1e-3)]
    regime: Literal["frozen", "round", "step"]
    activations: Channel
    gradients: Channel | None = None
    labels: Labels | None = None
    updates: Annotated[Updates | None, BeforeValidator(_as_updates)] = None
    generation: Channel | None = None

    @staticmethod
    def rules(table: object) -> Iterator[str]:
        """Shares add up to at most 1; a regime has exactly its channels."""
        shares = [at(table, name, "share") for name in ("activations", "gradients", "labels", "updates", "generation")]
        total = sum(s for s in shares if type(s) in {int, float} and 0 < s <= 1)
        if total > 1 + 1e-9:
            yield f"the channels' shares add up to {total:.4f}; a budget can be spent once, so at most 1"
        gradients, labels, updates = (at(table, name) is not None for name in ("gradients", "labels", "updates"))
        regime = at(table, "regime")
        if regime == "step" and at(table, "updates", "honest") is not None:
            yield "regime 'step' releases from every local step, which needs noise of one's own: remove updates.honest"
        if regime == "frozen" and (gradients or labels):
            yield "regime 'frozen' sends no gradients: remove [privacy.gradients] and [privacy.labels]"
        if regime in ("round", "step") and gradients == labels:
            yield f"regime '{regime}' releases gradients: exactly one of [privacy.gradients] and [privacy.labels] is needed"
        if regime in ("round", "step") and not updates:
            yield f"regime '{regime}' lets A and C learn by noised sums alone: [privacy.updates] is needed"


class UnsafeNoPrivacy(BaseModel):
    """The unsafe shape: nothing is clipped, noised or charged. For experiments on public text, on loopback."""

    model_config = STRICT
    mechanism: Literal["UnsafeNoPrivacy"]


class Limits(Table):
    """Caps on what is accepted from, and sent to, the other side.

    Attributes:
        min_front, min_back: fewest decoder layers that stay on the client on each end.
        max_sequences: largest number of sequences in one message.
        buckets: public lengths, in tokens; every sequence is padded up to one of them and the server sees only that.
        max_message_bytes: largest whole message, in bytes.
    """

    min_front: Annotated[int, Field(ge=0)]
    min_back: Annotated[int, Field(ge=0)]
    max_sequences: Annotated[int, Field(ge=1, le=4096)]
    buckets: Annotated[tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...], Field(min_length=1, strict=False)]
    max_message_bytes: Annotated[int, Field(ge=1 << 16, le=1 << 32)]

    @staticmethod
    def rules(table: object) -> Iterator[str]:
        """Buckets rise."""
        buckets = at(table, "buckets")
        if not isinstance(buckets, list | tuple) or not all(type(b) is int for b in buckets):
            return
        if list(buckets) != sorted(set(buckets)):
            yield "buckets must rise strictly"


class Transport(BaseModel):
    """Where the traffic may go."""

    model_config = STRICT
    loopback_only: bool


class Policy(Table):
    """A whole policy file.

    Attributes:
        name: short name, shown everywhere.
        purpose: in plain words, whom the policy is for.
        cost: in plain words, what it costs in quality.
        leakage: what the attacks may get, by a fresh report; absent: anything.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
    purpose: Annotated[str, Field(min_length=20)]
    cost: Annotated[str, Field(min_length=20)]
    privacy: Annotated[Gaussian | UnsafeNoPrivacy, Field(discriminator="mechanism")]
    aggregation: Aggregation
    limits: Limits
    transport: Transport
    # A policy without the table is the policy that it was before the table existed, digest included.
    leakage: Annotated[Leakage | None, Field(exclude_if=lambda value: value is None)] = None

    @staticmethod
    def rules(table: object) -> Iterator[str]:
        """No protection stays on loopback; un-noised updates stay hidden."""
        mechanism = at(table, "privacy", "mechanism")
        if mechanism == "UnsafeNoPrivacy" and at(table, "transport", "loopback_only") is False:
            yield "UnsafeNoPrivacy is allowed on loopback only: set transport.loopback_only = true"
        frozen = mechanism == "gaussian" and at(table, "privacy", "regime") == "frozen"
        plain = at(table, "privacy", "updates") is None
        honest, least = at(table, "privacy", "updates", "honest"), at(table, "aggregation", "min_clients")
        if type(honest) is int and type(least) is int and honest >= least:
            yield f"updates.honest is {honest}, and aggregation.min_clients lets a sum of {least}, of whom one looks, be opened"
        if frozen and plain and at(table, "aggregation", "blind") is False:
            yield "regime 'frozen' without [privacy.updates] adds no noise to updates, so the sum must be hidden from the server: set aggregation.blind = true"

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

    @property
    def mechanism_digest(self) -> str:
        """SHA-256 of what of the policy decides what the server sees: budget, channels, length buckets; in hex.

        Name, purpose and limits on leakage are not in it, so that a measurement under one policy speaks for another that
        differs in words alone.
        """
        seen = {"privacy": self.privacy.model_dump(mode="json"), "buckets": list(self.limits.buckets)}
        return hashlib.sha256(json.dumps(seen, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
