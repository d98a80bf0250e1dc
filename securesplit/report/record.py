"""What one run reports: the shape of report.json, and nothing else may stand in it.

The key names are a contract (architecture: ``train.initial_loss``, ``privacy.epsilon``, ``leakage.protected.prior`` and
so on); scripts read them. Figures only: no tokens, tensors, keys or ledger ids. Text appears in two places, the generated
answer and the rows of recovered text, and a report that carries either cannot be built unless the text is synthetic or
the user asked to see it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# A validation error of pydantic quotes its input; a report may hold text, so the quote is left out.
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Losses = Annotated[tuple[float, ...], Field(min_length=1, strict=False)]
Interval = Annotated[tuple[Share, Share], Field(strict=False)]


class Data(BaseModel):
    """The text of the run.

    Attributes:
        synthetic: made up by :mod:`securesplit.data.notes`.
        shown: the user asked for real text in the report.
        records: how many, over all clients.
    """

    model_config = _STRICT
    synthetic: bool
    shown: bool = False
    records: Annotated[int, Field(ge=1)]


class Model(BaseModel):
    """The model and its cut, in decoder layers: ``front`` and ``back`` on the client, ``middle`` on the server."""

    model_config = _STRICT
    name: Annotated[str, Field(min_length=1)]
    front: Count
    middle: Count
    back: Count


class PolicyNote(BaseModel):
    """The policy in its own words; ``unsafe`` when it protects nothing."""

    model_config = _STRICT
    name: str
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    purpose: str
    cost: str
    unsafe: bool


class Train(BaseModel):
    """Losses in nats per token, on the same texts for all three runs.

    Each curve starts before the first step and has one point after every round.

    Attributes:
        initial_loss, final_loss: ends of the protected run.
        unprotected: the same split with the noise off: what the noise costs is the distance to it.
        protected: the run under the policy.
        client_only: A and C without any server: a split that does not beat it gains nothing from the server.
    """

    model_config = _STRICT
    initial_loss: float
    final_loss: float
    unprotected: Losses
    protected: Losses
    client_only: Losses

    @classmethod
    def of(
        cls, *, unprotected: tuple[float, ...], protected: tuple[float, ...], client_only: tuple[float, ...]
    ) -> Self:
        """Build from the three curves; the protected one gives the ends."""
        return cls(
            initial_loss=protected[0],
            final_loss=protected[-1],
            unprotected=unprotected,
            protected=protected,
            client_only=client_only,
        )


class Budget(BaseModel):
    """What a policy grants one record over its whole life; relation, unit and delta stand in :class:`Privacy`."""

    model_config = _STRICT
    epsilon: NotNegative
    mu: NotNegative


class ChannelSpend(BaseModel):
    """What left through one channel.

    Attributes:
        channel: ``cut``, ``gradient``, ``decode`` or ``update``.
        releases: charged releases, over all records and clients.
        mu: of the record that spent most on this channel.
        epsilon: the same, at the report's delta; channels compose in mu^2, so their epsilons do not add up.
    """

    model_config = _STRICT
    channel: Annotated[str, Field(min_length=1)]
    releases: Count
    mu: NotNegative
    epsilon: NotNegative


class Privacy(BaseModel):
    """What the record that spent most has spent, over all channels; None where nothing was protected.

    Attributes:
        epsilon, mu: composed over all channels; None under an unsafe policy, where no bound holds.
        delta, unit, relation: what epsilon means; it is never shown without them.
        budget: what the policy grants; None under an unsafe policy.
        channels: the parts.
    """

    model_config = _STRICT
    epsilon: NotNegative | None
    delta: Annotated[float, Field(gt=0, lt=1)] | None
    unit: str
    relation: str
    mu: NotNegative | None
    budget: Budget | None
    channels: Annotated[tuple[ChannelSpend, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _whole_or_absent(self) -> Self:
        absent = [value is None for value in (self.epsilon, self.delta, self.mu, self.budget)]
        if any(absent) and not all(absent):
            msg = "epsilon, delta, mu and budget stand together or not at all"
            raise ValueError(msg)
        return self


class Aggregation(BaseModel):
    """The secure sums.

    Attributes:
        rounds: sums that were opened.
        exact: every opened sum equalled the plain sum of the same updates, in the ring.
        blind: only clients could open the sums.
        noised: the sums carried noise that the ledger paid for; without it no epsilon covers whoever opens them.
    """

    model_config = _STRICT
    rounds: Count
    exact: bool
    blind: bool
    noised: bool


class Recovery(BaseModel):
    """What an attack got out of one transcript.

    Attributes:
        token_recovery: share of positions whose token was named correctly.
        ci95: its 95 % confidence interval, low and high.
        prior: the same share for a guess that ignores the traffic.
        pii_exact: share of labelled pieces recovered without a fault; None without labels.
        tokens: positions attacked.
    """

    model_config = _STRICT
    token_recovery: Share
    ci95: Interval
    prior: Share
    pii_exact: Share | None = None
    tokens: Count

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.ci95[0] > self.ci95[1]:
            msg = "ci95 is (low, high)"
            raise ValueError(msg)
        return self


class Protected(Recovery):
    """What an attack got out of the protected transcript.

    Attributes:
        kappa: the best guess without traffic that we know, at least ``prior``; the ceiling starts from it.
        ceiling: ``Phi(Phi^-1(kappa) + mu)``: no attack on these releases, present or future, does better on average if it
            starts from a guess no better than ``kappa``; None under an unsafe policy.
    """

    kappa: Share | None = None
    ceiling: Share | None


class Leakage(BaseModel):
    """The same attack on both transcripts."""

    model_config = _STRICT
    attack: Annotated[str, Field(min_length=1)]
    unprotected: Recovery
    protected: Protected


class Tls(BaseModel):
    """What the connections agreed on, for example ``TLSv1.3``."""

    model_config = _STRICT
    version: Annotated[str, Field(min_length=1)]
    cipher: str = ""


class Traffic(BaseModel):
    """Bytes between all clients and the server in the protected run, and the largest resident memory of a client."""

    model_config = _STRICT
    bytes_up: Count
    bytes_down: Count
    client_resident_bytes: Count


class Phase(BaseModel):
    """A part of the run and how long it took."""

    model_config = _STRICT
    name: Annotated[str, Field(min_length=1)]
    seconds: NotNegative


class Generated(BaseModel):
    """One answer through the split."""

    model_config = _STRICT
    prompt: str
    text: str


class Example(BaseModel):
    """A text beside what the attack made of it."""

    model_config = _STRICT
    run: Literal["unprotected", "protected"]
    truth: str
    recovered: str


class Check(BaseModel):
    """A command that reproduces a figure of this report, and what it should show."""

    model_config = _STRICT
    command: Annotated[str, Field(min_length=1)]
    shows: Annotated[str, Field(min_length=1)]


class Report(BaseModel):
    """One run, whole.

    Attributes:
        release: version of securesplit.
        created: when the run ended, ISO 8601 with a zone.
        seconds: wall time of the whole.
        clients: how many took part.
        generated: None when the policy refuses generation.
        examples: few; empty unless the text may be shown.
    """

    model_config = _STRICT
    release: str
    created: str
    seconds: NotNegative
    clients: Annotated[int, Field(ge=1)]
    data: Data
    model: Model
    policy: PolicyNote
    train: Train
    privacy: Privacy
    aggregation: Aggregation
    leakage: Leakage
    tls: Tls
    traffic: Traffic
    phases: Annotated[tuple[Phase, ...], Field(strict=False)] = ()
    generated: Generated | None = None
    examples: Annotated[tuple[Example, ...], Field(strict=False)] = ()
    checks: Annotated[tuple[Check, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.examples or self.generated) and not (self.data.synthetic or self.data.shown):
            msg = "text may stand in a report only when it is synthetic or the user asked for it"
            raise ValueError(msg)
        if self.policy.unsafe != (self.privacy.epsilon is None):
            msg = "an unsafe policy has no epsilon, and every other policy has one"
            raise ValueError(msg)
        return self


def write_report(report: Report, path: Path) -> None:
    """Write report.json: one JSON object, indented, in UTF-8."""
    path.write_text(json.dumps(report.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
