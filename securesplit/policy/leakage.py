"""What a policy lets the attacks get, and the reports that prove it. A limit without a fresh report is a refusal.

The reports are the site's own: files that `securesplit attack run --out` wrote, on a disk that the site trusts. They are not
signed, and nothing of them comes from a server. A limit that holds is *not* a guarantee: it says that the attacks of one
release, on one recording, got no more. The guarantee is the budget.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from securesplit.errors import InputError
from securesplit.policy.table import Table, at

__all__ = ["Leakage", "Proof", "Traffic", "faults_of", "read_proofs"]

Limit = Annotated[float | None, Field(ge=0, le=1)]
ProfileName = Literal["smoke", "standard", "full"]
_EFFORT = ("smoke", "standard", "full")
_SKEW = timedelta(days=1)  # Clocks of the machine that attacked and of this one may differ.


class Leakage(Table):
    """The ``[leakage]`` table of a policy.

    Attributes:
        token_recovery: the largest share of tokens that any attack may name, at their places or in a sum.
        pii_exact: the largest share of labelled personal data that any attack may get whole.
        membership_auc: the largest AUC of any membership attack on the trained model.
        max_age_days: the greatest age of the report that proves the limits.
        profile: the least effort of the attacks in that report.
    """

    token_recovery: Limit = None
    pii_exact: Limit = None
    membership_auc: Limit = None
    max_age_days: Annotated[int, Field(ge=1, le=3650)]
    profile: ProfileName = "smoke"

    @staticmethod
    def rules(table: object) -> Iterator[str]:
        """A table without a limit limits nothing."""
        if all(at(table, name) is None for name in ("token_recovery", "pii_exact", "membership_auc")):
            yield "state at least one of token_recovery, pii_exact and membership_auc"


_LOOSE = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)  # A report says much more than is needed here.


@dataclass(frozen=True, slots=True)
class Traffic:
    """What of a job decides what its server sees: a report must be on the same, or on more.

    Attributes:
        mechanism: digest of what of the policy makes the noise. model: manifest digest. cut, codec: the job's.
        code: digest of the public code at the cut, or None. classes: labels of a classification; 0 where text is learnt.
        fresh: releases of one record with fresh noise, over the whole job.
        channels: what an attack must have looked at: O1 rows, O3 gradients, O5 opened sums.
    """

    mechanism: str
    model: str
    cut: tuple[int, int]
    codec: str
    code: str | None
    classes: int
    fresh: int
    channels: frozenset[str]


class _Result(BaseModel):
    model_config = _LOOSE
    name: str
    measure: str
    value: float
    value_ci95: tuple[float, float]
    ceiling: float | None = None
    pii_exact: float | None = None


class _Check(BaseModel):
    model_config = _LOOSE
    name: str
    passed: bool


class _Threat(BaseModel):
    model_config = _LOOSE
    weights: Literal["none", "pre-trained", "round-start", "exact"]
    text: str
    releases: int


class _Setting(BaseModel):
    model_config = _LOOSE
    mechanism: str
    model: str
    cut: tuple[int, int] | None
    codec: str
    code: str | None = None
    classes: int = 0
    releases: int
    channels: tuple[str, ...] = ()  # A report from before there was this field looked at nothing that we know of.
    profile: ProfileName
    threat: _Threat
    asked: tuple[str, ...] = ()
    created: AwareDatetime


class Proof(BaseModel):
    """What of a report of the attack suite decides.

    Attributes:
        setting: what was attacked, by whom, and when. attacks: what each attack got. worst: the largest token recovery.
        checks: of the noise that arrived.
    """

    model_config = _LOOSE
    setting: _Setting
    attacks: Annotated[tuple[_Result, ...], Field(min_length=1)]
    worst: float
    checks: tuple[_Check, ...]

    def largest(self, limit: str) -> float | None:
        """The largest figure that a limit speaks of; None where nothing measured it.

        A token that is named in a sum (``bag``) is given away as much as one that is named at its place.
        """
        if limit == "pii_exact":
            return max((a.pii_exact for a in self.attacks if a.pii_exact is not None), default=None)
        if limit == "membership_auc":
            return max((a.value for a in self.attacks if a.measure == "membership"), default=None)
        return max((a.value for a in self.attacks if a.measure in ("tokens", "bag")), default=None)

    def is_on(self, traffic: Traffic) -> bool:
        """Whether the recording was of this mechanism, model, cut, codec, code and task."""
        of, to = self.setting, traffic
        mine = (of.mechanism, of.model, of.cut, of.codec, of.code, of.classes)
        return mine == (to.mechanism, to.model, to.cut, to.codec, to.code, to.classes)

    def weak(self, traffic: Traffic, profile: ProfileName) -> tuple[str, ...]:
        """Why this report is no proof for the job, although it is on its mechanism: who attacked knew or saw too little."""
        of, unseen = self.setting, sorted(traffic.channels - set(self.setting.channels))
        reasons = (
            (_EFFORT.index(of.profile) < _EFFORT.index(profile), f"its profile is {of.profile}, below {profile}"),
            (bool(of.asked), "its attacks were asked for by name; it is not the whole suite"),
            (of.threat.weights == "none", "its adversary had no weights; everybody has the pre-trained ones"),
            (of.threat.text == "none", "its adversary had no text (--aux)"),
            (
                min(of.releases, of.threat.releases) < traffic.fresh,
                f"it used {min(of.releases, of.threat.releases)} releases of a record; the job makes {traffic.fresh}",
            ),
            (bool(unseen), f"its recording lacks {', '.join(unseen)}, which the job's server sees"),
        )
        return tuple(why for found, why in reasons if found)

    def doubts(self) -> tuple[str, ...]:
        """What in the report itself says that its figures, or the recording's protection, are not what they should be."""
        tokens = max((a.value for a in self.attacks if a.measure == "tokens"), default=0.0)
        return (
            *(f"the last report's check '{c.name}' failed" for c in self.checks if not c.passed),
            *(
                f"the last report's attack '{a.name}' got more than the policy's bound allows"
                for a in self.attacks
                if a.ceiling is not None and a.value_ci95[0] > a.ceiling
            ),
            *(("the last report's worst figure is not the largest of its attacks",) if tokens != self.worst else ()),
        )


def read_proofs(folder: Path) -> tuple[Proof, ...]:
    """Every report in a folder: ``*.json``, and ``report.json`` in folders below it.

    Raises:
        InputError: SS-1115 when the folder is none, or one of its reports cannot be read; a report that nobody can read
            might be the one that exceeds a limit.
    """
    hint = "Name a folder with the report.json files that `securesplit attack run --out` wrote."
    if not folder.is_dir():
        raise InputError("SS-1115", f"{folder} is no folder", hint=hint)
    found = []
    for path in sorted({*folder.glob("*.json"), *folder.rglob("report.json")}):
        try:
            found.append(Proof.model_validate(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, ValidationError) as error:
            what = f"{path} is no report of the attack suite: {type(error).__name__}"
            raise InputError("SS-1115", what, hint=hint) from None
    return tuple(found)


def faults_of(
    limits: Leakage, proofs: Sequence[Proof], traffic: Traffic, *, now: datetime
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What keeps the limits from being proven, in sentences: what is missing, and what is exceeded.

    Of the reports on this traffic by an adversary who knew and saw enough, the newest of each profile decide, all together:
    an older one that was better does not, and less effort does not refute more. Figures count whatever their age; a proof
    needs one that is fresh.

    Args:
        limits: the policy's.
        proofs: what lies in the site's folder.
        traffic: the job's.
        now: with a time zone.
    """
    near = [p for p in proofs if p.is_on(traffic)]
    fitting = [p for p in near if not p.weak(traffic, limits.profile)]
    if not fitting:
        where = f"cut {traffic.cut[0]}/{traffic.cut[1]}, codec {traffic.codec}, profile {limits.profile} or more"
        if not near:
            return (f"no report on this mechanism and model: {where}",), ()
        last = max(near, key=lambda p: p.setting.created)
        return tuple(f"the last report proves nothing: {why}" for why in last.weak(traffic, limits.profile)), ()
    last_of = {
        p.setting.profile: max(q.setting.created for q in fitting if q.setting.profile == p.setting.profile)
        for p in fitting
    }
    deciding = [p for p in fitting if p.setting.created == last_of[p.setting.profile]]
    missing = list(dict.fromkeys(doubt for p in deciding for doubt in p.doubts()))
    newest = max(p.setting.created for p in deciding)
    if newest - now > _SKEW:
        missing.append("the last report is from the future; one of the clocks is wrong")
    fresh = [p for p in deciding if now - p.setting.created <= timedelta(days=limits.max_age_days)]
    if not fresh:
        age = (now - newest).days
        missing.append(f"the last report is {age} days old; leakage.max_age_days is {limits.max_age_days}")
    over = []
    for name in ("token_recovery", "pii_exact", "membership_auc"):
        limit: float | None = getattr(limits, name)
        if limit is None:
            continue
        got = max((value for p in deciding if (value := p.largest(name)) is not None), default=None)
        if got is not None and got > limit:
            over.append(f"the attacks got {name} {got:.3f}; leakage.{name} is {limit:g}")
        elif fresh and all(p.largest(name) is None for p in fresh):
            missing.append(f"the last report did not measure {name}")
    return tuple(missing), tuple(over)
