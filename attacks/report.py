"""What a run of the suite says: figures to print, and the judgement on them. Its JSON schema is published in docs/.

``attack-report.schema.json`` is made from these classes by scripts/write-attack-schema, and a test holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, get_args

from pydantic import BaseModel, ConfigDict, Field

from attacks.config import Measure, Observed, ProfileName
from attacks.exchange import Proven
from attacks.threat import Threat
from securesplit.errors import CheckFailed, LeakageExceeded

__all__ = [
    "Baselines",
    "Bounds",
    "Check",
    "Example",
    "Point",
    "Report",
    "Result",
    "Setting",
    "Untested",
    "require_below_ceiling",
    "require_noise",
    "require_within_limits",
]

FEWEST = 5  # Sequences that a verdict on a ceiling needs.
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

Share = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[float, float]


class Piece(BaseModel):
    """A part of a text: plain, or something that identifies somebody; and, in a recovered text, whether it is right."""

    model_config = _STRICT
    text: str
    pii: bool
    right: bool


class Example(BaseModel):
    """A true text beside what an attack made of it. It holds private text: show it only where the text may be shown.

    Attributes:
        truth, recovered: the two texts.
        attack: which attack.
        truth_pieces, recovered_pieces: the same, token by token, with personal data and hits marked.
    """

    model_config = _STRICT
    truth: str
    recovered: str
    attack: str = ""
    truth_pieces: tuple[Piece, ...] = ()
    recovered_pieces: tuple[Piece, ...] = ()


class Point(BaseModel):
    """One point of a ROC curve."""

    model_config = _STRICT
    fpr: Share
    tpr: Share


class Result(BaseModel):
    """One attack, scored. What an attack's kind of answer does not have is None.

    Attributes:
        name, threat: which attack, and what its adversary knows. channel: what of the server's view it reads.
        measure: what ``value`` is: ``tokens``: share of true positions named correctly, padding and special tokens apart;
            ``bag``: share of the distinct tokens of a sum that were named; ``membership``: AUC; ``labels``: accuracy;
            ``links``: F1 of pairs; ``lengths``: share of lengths that are exact; ``pieces``: share of labelled pieces.
        value: the attack's own figure. value_ci95: its 95 % interval. value_prior: the same figure without observation.
        token_recovery, ci95: value and interval where the measure is ``tokens``.
        prior: the unigram guess: naming one token everywhere (the auxiliary text's commonest; the truth's own commonest
            without auxiliary text, the best such guess there is); 0.5 for membership.
        shuffled: the same answers scored against other sequences than their own; what a shuffled transcript gives.
        advantage: ``(value - best baseline) / (1 - best baseline)``.
        bits_per_token: information about the text beyond a language model that knows every token before, in bits; a
            lower bound (scoring.py says how it is had).
        content_recovery: over tokens that are not among the 100 commonest.
        pii_exact, pii_ci95, pii_total: share of labelled pieces with every token right, its Wilson interval, their number.
        precision: of what was claimed, the share that is right (bags, links, pieces).
        rouge_1, rouge_2, rouge_l, bleu: means over sequences. exact_match: share of sequences without a fault.
        tpr_at_001, tpr_at_0001: true positives at 1 % and 0.1 % false ones. roc: the curve.
        exposure_bits: of planted secrets, mean (Carlini et al. 2019).
        ceiling: what no attack can exceed on average under the policy; None where nothing bounds it, and under unit token.
        floor: the lower end of an interval so wide that a true ceiling is broken once in a thousand runs of the whole suite.
        seconds: time of the attack itself, without what it shares with others.
        seeds: how often it was repeated. sequences, tokens: what was scored.
        unresolved: positions, padding included, where no candidate came as close as the right one should.
        certified: of a sample of positions, how many the attack proves: no other token can explain the row.
        note: what a reader must know beside the figure; empty for nothing.
    """

    model_config = _STRICT
    name: str
    threat: str
    channel: Observed = "O1"
    measure: Measure = "tokens"
    value: float
    value_ci95: Interval
    value_prior: float
    token_recovery: float | None
    ci95: Interval | None
    prior: float
    shuffled: float | None = None
    advantage: float | None = None
    bits_per_token: float | None = None
    content_recovery: float | None = None
    pii_exact: float | None = None
    pii_ci95: Interval | None = None
    pii_total: int = 0
    precision: float | None = None
    rouge_1: float | None = None
    rouge_2: float | None = None
    rouge_l: float | None = None
    bleu: float | None = None
    exact_match: float | None = None
    tpr_at_001: float | None = None
    tpr_at_0001: float | None = None
    roc: tuple[Point, ...] = ()
    exposure_bits: float | None = None
    ceiling: float | None = None
    floor: float | None = None
    seconds: float
    seeds: int = 1
    sequences: int
    tokens: int
    unresolved: int = 0
    certified: Proven | None = None
    note: str = ""


class Untested(BaseModel):
    """An attack that was not run, and why."""

    model_config = _STRICT
    name: str
    why: str


class Check(BaseModel):
    """One test of whether the noise that arrived is the noise that the policy pays for (attacks/forensics.py).

    Attributes:
        name: of the test. statistic, threshold: what was measured, and where an honest release lies but once in a million.
        passed: whether it does.
    """

    model_config = _STRICT
    name: str
    statistic: float
    threshold: float
    passed: bool


class Baselines(BaseModel):
    """What is guessed without looking at the traffic, as shares of the same positions.

    Attributes:
        uniform: any token alike, 1 / V.
        unigram: one token everywhere.
        positional: the commonest token of each place.
        lm_free: what the public language model writes by itself.
        lm_forced: its best guess of each token, if it is told all true tokens before; None without a whole model.
        lm_bits: its surprise at the text, in bits per token.
        nearest_text: the auxiliary text that agrees best with the truth, position by position; chosen in hindsight.
    """

    model_config = _STRICT
    uniform: Share
    unigram: Share
    positional: Share
    lm_free: Share
    lm_forced: Share | None
    lm_bits: float | None
    nearest_text: Share


class Bounds(BaseModel):
    """What theory says of the releases, beside what the attacks got.

    Attributes:
        kappa: the best guess without observation that we know; the ceiling starts from it.
        ceiling: ``Phi(Phi^-1(kappa) + mu)``, per token; 1 when the policy bounds nothing, and under unit ``token``.
        membership_ceiling: ``Phi(mu / sqrt 2)``, the largest AUC of telling a record from any other; 1 in the same cases.
        certified_floor: the share of positions that an exact attacker must get, whatever the text: 1 where nothing is
            noised and every row is told from every other; None where the noise leaves nothing certain.
        capacity_bits: of one released row, ``D/2 log2(1 + rms^2 / sigma^2)``; None without noise.
        token_bits: of one token drawn evenly, log2 V: where capacity is below it, some tokens must be lost.
    """

    model_config = _STRICT
    kappa: Share
    ceiling: Share
    membership_ceiling: Share
    certified_floor: float | None
    capacity_bits: float | None
    token_bits: float


class Setting(BaseModel):
    """What was attacked.

    Attributes:
        transcript: SHA-256 over the recording's files. model: manifest digest of the public model.
        policy, policy_digest: under which policy the recording was made. mechanism: digest of what of the policy makes the
            noise: a report proves a leakage limit for every policy with the same mechanism.
        cut: decoder layers of A and of C. codec: how numbers crossed.
        sigma, clip: the noise on O1. releases: the most fresh releases that any attacked record has.
        code: digest of the public code at the cut, or None. classes: labels of a classification; 0 where text is learnt.
        channels: what crossed of the attacked sequences, or is at hand beside them: O2 answers, O3 gradients, O5 opened sums,
            O6 the trained model; a report says nothing of a job whose server sees more. Empty in reports from before this.
        profile, threat: how much work, and by whom. asked: attacks that were asked for by name; empty for the whole suite.
        seed: of the run. created: when, ISO 8601, UTC.
    """

    model_config = _STRICT
    transcript: str
    model: str
    policy: str
    policy_digest: str
    mechanism: str
    cut: tuple[int, int] | None
    codec: str
    code: str | None = None
    classes: int = 0
    channels: tuple[Observed, ...] = ()
    sigma: float
    clip: float | None
    releases: int
    profile: str
    threat: Threat
    asked: tuple[str, ...]
    seed: int
    created: str


class Report(BaseModel):
    """A run of the suite.

    Attributes:
        attacks: one result per attack.
        worst, worst_attack: the largest token recovery of the suite: the headline.
        kappa, ceiling: as in ``bounds``.
        epsilon, delta, mu: the policy's budget of one record's life; None when it bounds nothing.
        unit, relation: what epsilon speaks of.
        policy, policy_digest, profile: as in ``setting``.
        untested: attacks that were not run, and why.
        checks: of the noise that arrived; empty where the policy adds none.
        flags: what a reader should distrust: an adaptive attack below a naive one, a bound without use.
        examples: of the worst attack, a few. Not part of :meth:`to_json`.
    """

    model_config = _STRICT
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
    setting: Setting
    baselines: Baselines
    bounds: Bounds
    untested: tuple[Untested, ...]
    checks: tuple[Check, ...]
    flags: tuple[str, ...]
    examples: tuple[Example, ...]

    def to_json(self) -> str:
        """One JSON object of figures; the examples, which are text, are left out."""
        return self.model_dump_json(exclude={"examples"})

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what :meth:`to_json` wrote; it has no examples.

        Raises:
            ValueError: when it is not such an object.
        """
        raw = json.loads(text)
        if not isinstance(raw, dict):
            raise ValueError("a report is an object")  # noqa: TRY004 - one kind of error for everything that is no report
        return cls.model_validate_json(json.dumps({"examples": [], **raw}))

    @property
    def pii_exact(self) -> float | None:
        """The largest share of labelled pieces that any attack got; None where none were labelled."""
        return max((r.pii_exact for r in self.attacks if r.pii_exact is not None), default=None)

    @property
    def named(self) -> float | None:
        """The largest share of tokens that any attack named, at their places or in a sum; None where none tried."""
        return max((r.value for r in self.attacks if r.measure in ("tokens", "bag")), default=None)

    @property
    def membership(self) -> float | None:
        """The largest AUC of any membership attack; None where none ran."""
        return max((r.value for r in self.attacks if r.measure == "membership"), default=None)


def require_noise(report: Report) -> None:
    """Fail when the noise that arrived is not the noise that the policy pays for.

    Raises:
        CheckFailed: SS-1573, naming the tests.
    """
    failed = [check for check in report.checks if not check.passed]
    if failed:
        raise CheckFailed(
            "SS-1573",
            f"{len(failed)} test(s) say that what arrived is not protected as the policy states",
            hint="Stop, keep the recording, and run `securesplit privacy audit` with the clients' policy.",
            details=tuple(f"{c.name}: {c.statistic:.4g}, threshold {c.threshold:.4g}" for c in failed),
        )


def require_below_ceiling(report: Report) -> None:
    """Fail when an attack got more than the policy's guarantee allows: then the guarantee, or its accounting, is false.

    Compared is :attr:`Result.floor`, because a finite sample may lie above an expectation, and one of many attacks more
    easily than a single one. Fewer than five sequences are no sample, and are not judged.

    Raises:
        CheckFailed: SS-1570, naming the attacks.
    """
    above = [r for r in report.attacks if r.ceiling is not None and r.sequences >= FEWEST and _floor(r) > r.ceiling]
    if above:
        raise CheckFailed(
            "SS-1570",
            f"{len(above)} attack(s) got more than the policy's bound allows",
            hint="The noise that was sent is not the noise that the policy pays for. Stop, and keep the recording.",
            details=tuple(f"{r.name}: {r.value:.3f}, at least {_floor(r):.3f}, bound {r.ceiling:.3f}" for r in above),
        )


def _floor(result: Result) -> float:
    """The lower end that is judged; of older reports that of the 95 % interval."""
    return result.value_ci95[0] if result.floor is None else result.floor


def require_within_limits(
    report: Report,
    *,
    token_recovery: float | None,
    pii_exact: float | None,
    membership: float | None,
    profile: ProfileName = "smoke",
) -> None:
    """Fail when an attack got more than a policy's ``[leakage]`` table allows, or when this run cannot tell.

    The point estimate is compared: a limit that only an interval's end keeps is not kept.

    Args:
        report: of the run.
        token_recovery, pii_exact, membership: the limits; None for none.
        profile: the least effort that the policy asks for.

    Raises:
        LeakageExceeded: SS-7001, with one detail per limit; SS-7003, with one detail per reason, when no limit is exceeded
            and a limit was not measured, or was by less than the whole suite with the adversary's common knowledge.
    """
    got = (
        ("token recovery", report.named, token_recovery),
        ("personal data", report.pii_exact, pii_exact),
        ("membership AUC", report.membership, membership),
    )
    limited = [(name, value, limit) for name, value, limit in got if limit is not None]
    over = [f"{name}: {value:.3f}, limit {limit:.3f}" for name, value, limit in limited if value and value > limit]
    if over:
        raise LeakageExceeded(
            "SS-7001",
            f"the attacks got more than policy '{report.policy}' allows",
            hint="Tighten the policy's budget or move the cut, record again, and attack the new recording.",
            details=tuple(over),
        )
    unjudged = [f"{name}: nothing measured it, limit {limit:.3f}" for name, value, limit in limited if value is None]
    if limited and (reasons := (*unjudged, *_too_weak(report.setting, profile))):
        raise LeakageExceeded(
            "SS-7003",
            f"this run cannot show that the limits of policy '{report.policy}' are kept",
            hint="Run the whole suite with --aux, the policy's profile, labelled data, and --candidates where it limits membership.",
            details=reasons,
        )


def _too_weak(setting: Setting, profile: ProfileName) -> Iterator[str]:
    """Why a run that exceeded nothing shows nothing."""
    efforts: tuple[str, ...] = get_args(ProfileName)
    if efforts.index(setting.profile) < efforts.index(profile):
        yield f"the profile is {setting.profile}, and the policy asks for {profile}"
    if setting.asked:
        yield f"{len(setting.asked)} attack(s) were asked for by name; only the whole suite speaks for a limit"
    if setting.threat.weights == "none":
        yield "the adversary had no weights (--weights); everybody has the pre-trained ones"
    if setting.threat.text == "none":
        yield "the adversary had no text (--aux)"
