"""Settings that are legal and still deserve a word: dangerous, weak, contradictory, or worth knowing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from securesplit.policy.meaning import meaning_of
from securesplit.policy.schema import Gaussian, Leakage, Policy

__all__ = ["CERTIFICATE_DAYS", "MOST_PROVEN", "Finding", "Severity", "at_least", "lint"]

MOST_PROVEN = 100
"""Largest epsilon at which the sampler's own error is far below any delta that a policy may state (privacy/lattice.py)."""

CERTIFICATE_DAYS = 30
"""Life of a client's certificate as `certs issue` makes it: what was proven before it may be about another machine."""

_MOST_DELTA = 1e-5
_TYPICAL_NORMS = (1e-2, 1e5)  # Of hidden states of one record; SmolLM2-135M has 600, Llama-3-8B some tens.
_LEAST_BYTES_PER_ROW = 64 * 4  # No supported model has fewer than 64 numbers in a row.

Severity = Literal["note", "warning", "danger"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that an expert would ask about.

    Attributes:
        severity: ``danger``: what is protected is not what it seems. ``warning``: weak, or at odds with another key.
            ``note``: true of every such policy, and good to know.
        path: the key.
        what: in words.
    """

    severity: Severity
    path: str
    what: str

    def line(self) -> str:
        """One line, which begins with the key."""
        return f"{self.path}: {self.what}"


def at_least(findings: tuple[Finding, ...], severity: Severity) -> tuple[Finding, ...]:
    """Those of this severity and of worse ones."""
    order: tuple[str, ...] = get_args(Severity)
    return tuple(f for f in findings if order.index(f.severity) >= order.index(severity))


def lint(policy: Policy, *, records: int | None = None) -> tuple[Finding, ...]:
    """One finding per setting that an expert would ask about; empty when there is none.

    Args:
        policy: a legal one.
        records: how many records the site has, which delta is compared with; unknown when None.
    """
    if isinstance(policy.privacy, Gaussian):
        private = (
            *_budget(policy.privacy, records),
            *_channels(policy.privacy),
            *_unit(policy, policy.privacy),
            *_updates(policy, policy.privacy),
        )
    else:
        unsafe = "UnsafeNoPrivacy: the server can read every token; for public text only"
        private = (Finding("danger", "privacy.mechanism", unsafe),)
    return (*private, *_limits(policy), *_sums(policy), *(_leakage(policy, policy.leakage) if policy.leakage else ()))


def _budget(privacy: Gaussian, records: int | None) -> Iterator[Finding]:
    if privacy.epsilon > MOST_PROVEN:
        yield Finding(
            "danger", "privacy.epsilon",
            f"{privacy.epsilon:g} {meaning_of(privacy)}: beyond {MOST_PROVEN} the rounding of the noise's table is no longer proven negligible beside delta, and nothing is protected anyway",
        )  # fmt: skip
    elif privacy.epsilon > 16:
        yield Finding(
            "warning", "privacy.epsilon",
            f"{privacy.epsilon:g} {meaning_of(privacy)}: a server may decide a yes-or-no question about one {privacy.unit} with over 92 % accuracy (at delta 1e-5)",
        )  # fmt: skip
    if privacy.delta > _MOST_DELTA:
        yield Finding("warning", "privacy.delta", f"{privacy.delta:g} is above 1e-5")
    if records is not None and privacy.delta * records > 1:
        what = f"{privacy.delta:g} for {records} records: publishing one record whole would satisfy it"
        yield Finding("danger", "privacy.delta", what)
    elif records is not None and privacy.delta * records > 0.1:
        what = f"{privacy.delta:g} is above one over ten times the number of records, {0.1 / records:.1g}"
        yield Finding("warning", "privacy.delta", what)


def _channels(privacy: Gaussian) -> Iterator[Finding]:
    stated = {name: getattr(privacy, name) for name in ("activations", "gradients", "updates", "generation", "labels")}
    total = sum(channel.share for channel in stated.values() if channel is not None)
    if total < 0.5:
        what = f"the channels' shares add up to {total:g}: noise is {total**-0.5:.1f} times what the budget asks for"
        yield Finding("warning", "privacy.activations.share", what)
    for name in ("activations", "generation"):
        channel, (least, most) = stated[name], _TYPICAL_NORMS
        if channel is not None and not least <= channel.clip <= most:
            size = "below what any model's rows have, so all rows are cut to it" if channel.clip < least else (
                "above what any model's rows have, so noise is larger than all of them")  # fmt: skip
            yield Finding("warning", f"privacy.{name}.clip", f"{channel.clip:g} is {size}")
    releases = privacy.activations.releases
    if privacy.regime == "frozen" and releases > 1:
        what = f"{releases}: in regime 'frozen' a record's one release is remembered and resent, so all but one of these parts of the budget buy nothing"
        yield Finding("warning", "privacy.activations.releases", what)


def _unit(policy: Policy, privacy: Gaussian) -> Iterator[Finding]:
    if privacy.unit != "token":
        return
    if policy.limits.min_front > 0:
        yield Finding(
            "warning", "privacy.unit",
            "token, but A has attention: one token moves all later rows, so the noise is that of a whole sequence of the longest bucket, and the claim is only about one token",
        )  # fmt: skip
    if policy.leakage is not None and policy.leakage.pii_exact is not None:
        what = "a name or a number is several tokens, and the budget is for one: the limit may hold or not, the unit says nothing of it"
        yield Finding("warning", "leakage.pii_exact", what)


def _updates(policy: Policy, privacy: Gaussian) -> Iterator[Finding]:
    sums = policy.aggregation
    if privacy.regime != "frozen" and not sums.blind:
        what = "false: the server sees the noised sum of updates, which is charged, and needs no more"
        yield Finding("warning", "aggregation.blind", what)
    if sums.min_update is not None:
        what = "looks at the update itself, so that abstaining tells the server one bit a round about the text, which no epsilon counts"
        yield Finding("warning", "aggregation.min_update", what)
    if privacy.updates is None:
        what = f"{sums.min_clients}, and updates carry no noise: {sums.min_clients - 1} clients who compare what they know see the update of the last one in a sum of {sums.min_clients}"
        yield Finding("note", "aggregation.min_clients", what)
    honest = privacy.updates.honest if privacy.updates else None
    if honest is not None and sums.min_colluders is not None and sums.min_clients - max(1, sums.min_colluders) < honest:
        what = f"{honest} honest clients, and min_clients less min_colluders leaves {sums.min_clients - sums.min_colluders}: only jobs with larger sums are admitted"
        yield Finding("warning", "privacy.updates.honest", what)


def _limits(policy: Policy) -> Iterator[Finding]:
    limits = policy.limits
    if limits.min_front == 0:
        what = "0: with the embedding alone in front, each row is one token, whatever the others are"
        yield Finding("warning", "limits.min_front", what)
    if limits.min_back == 0 and not (isinstance(policy.privacy, Gaussian) and policy.privacy.regime == "frozen"):
        yield Finding("warning", "limits.min_back", "0: a gradient at the head is a closed form of the label")
    if len(limits.buckets) > 12:
        what = f"{len(limits.buckets)} lengths; the fewer, the less a length tells"
        yield Finding("warning", "limits.buckets", what)
    if limits.buckets[-1] * _LEAST_BYTES_PER_ROW > limits.max_message_bytes:
        what = f"{limits.max_message_bytes}: no sequence of {limits.buckets[-1]} tokens fits into a message"
        yield Finding("warning", "limits.max_message_bytes", what)


def _sums(policy: Policy) -> Iterator[Finding]:
    sums = policy.aggregation
    if sums.roster is None:
        return
    n = len(sums.roster)
    for name, value in (("min_clients", sums.min_clients), ("min_threshold", sums.min_threshold)):
        if value > n:
            what = f"{value}, and aggregation.roster names {n}: no job is ever admitted"
            yield Finding("warning", f"aggregation.{name}", what)
    if (sums.min_colluders or 0) > n - 2:
        what = f"{sums.min_colluders} of {n}: fewer than two are left to hide among, and no job is ever admitted"
        yield Finding("warning", "aggregation.min_colluders", what)


def _leakage(policy: Policy, limits: Leakage) -> Iterator[Finding]:
    if limits.max_age_days > CERTIFICATE_DAYS:
        what = f"{limits.max_age_days} days outlive a client's certificate, {CERTIFICATE_DAYS} days: the proof may be of a setup that is gone"
        yield Finding("warning", "leakage.max_age_days", what)
    if limits.token_recovery is not None and limits.token_recovery > 0.5:
        what = f"{limits.token_recovery:g}: a text of which every second token is named is read"
        yield Finding("warning", "leakage.token_recovery", what)
    if limits.token_recovery == 0:
        yield Finding("warning", "leakage.token_recovery", "0: a guess without looking gets more, so no report passes")
    if limits.membership_auc is not None and limits.membership_auc <= 0.5:
        what = f"{limits.membership_auc:g}: 0.5 is chance, so about every second report fails by luck, or all do"
        yield Finding("warning", "leakage.membership_auc", what)
    if limits.profile == "smoke":
        what = "smoke: the least effort; what it does not find, more effort may"
        yield Finding("note", "leakage.profile", what)
    if policy.unsafe and limits.token_recovery is not None and limits.token_recovery < 0.9:
        what = "without noise the attacks read nearly everything, so this limit refuses every job"
        yield Finding("warning", "leakage.token_recovery", what)
