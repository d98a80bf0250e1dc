"""What a run of the suite says: figures to print, and the judgement on them."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

from securesplit.errors import CheckFailed

__all__ = ["Example", "Report", "Result", "require_below_ceiling"]


@dataclass(frozen=True, slots=True)
class Example:
    """A true text beside what an attack made of it. It holds private text: show it only where the text may be shown."""

    truth: str
    recovered: str


@dataclass(frozen=True, slots=True)
class Result:
    """One attack, scored.

    Attributes:
        name, threat: which attack, and what its adversary knows.
        token_recovery: share of true positions (padding and special tokens apart) named correctly.
        ci95: its 95 % bootstrap interval over sequences.
        prior: the same share for naming one token everywhere: the auxiliary text's commonest; the truth's own commonest
            without auxiliary text, the best such guess there is.
        content_recovery: over tokens that are not among the 100 commonest; None when there are none.
        pii_exact: share of labelled pieces with every token right; None without labels.
        pii_total: labelled pieces within the sequences.
        rouge_l: mean F1 over sequences.
        exact_match: share of sequences without a fault.
        seconds: time of the attack itself, without fitting.
        sequences, tokens: what was scored.
        unresolved: positions, padding included, where no candidate came as close as the right one should.
    """

    name: str
    threat: str
    token_recovery: float
    ci95: tuple[float, float]
    prior: float
    content_recovery: float | None
    pii_exact: float | None
    pii_total: int
    rouge_l: float
    exact_match: float
    seconds: float
    sequences: int
    tokens: int
    unresolved: int


@dataclass(frozen=True, slots=True)
class Report:
    """A run of the suite.

    Attributes:
        attacks: one result per attack.
        worst, worst_attack: the largest token recovery of the suite: the headline.
        kappa: the best guess without observation that we know; the ceiling starts from it.
        ceiling: ``Phi(Phi^-1(kappa) + mu)``; 1 when the policy bounds nothing.
        epsilon, delta, mu: the policy's budget of one record's life; None when it bounds nothing.
        unit, relation: what epsilon speaks of.
        policy, policy_digest: under which policy the recording was made.
        profile: how much work the attacks might do.
        examples: of the worst attack, a few. Not part of :meth:`to_json`.
    """

    attacks: tuple[Result, ...]
    worst: float
    worst_attack: str
    kappa: float
    ceiling: float
    epsilon: float | None
    delta: float | None
    mu: float | None
    unit: str | None
    relation: str | None
    policy: str
    policy_digest: str
    profile: str
    examples: tuple[Example, ...]

    def to_json(self) -> str:
        """One JSON object of figures; the examples, which are text, are left out."""
        figures = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in {"attacks", "examples"}}
        results = [{f.name: getattr(result, f.name) for f in fields(result)} for result in self.attacks]
        return json.dumps({"attacks": results, **figures}, allow_nan=False)


def require_below_ceiling(report: Report) -> None:
    """Fail when an attack got more than the policy's guarantee allows: then the guarantee, or its accounting, is false.

    The lower end of the interval is compared, because a finite sample may lie above an expectation.

    Raises:
        CheckFailed: SS-1570, naming the attacks.
    """
    above = [r for r in report.attacks if r.ci95[0] > report.ceiling]
    if above:
        raise CheckFailed(
            "SS-1570",
            f"{len(above)} attack(s) recovered more than the policy's bound of {report.ceiling:.3f} allows",
            hint="The noise that was sent is not the noise that the policy pays for. Stop, and keep the recording.",
            details=tuple(f"{r.name}: {r.token_recovery:.3f}, interval from {r.ci95[0]:.3f}" for r in above),
        )
