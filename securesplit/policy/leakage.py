"""What a policy lets the attacks get, and the reports that prove it. A limit without a fresh report is a refusal.

The reports are the site's own: files that `securesplit attack run --out` wrote, on a disk that the site trusts. They are not
signed, and nothing of them comes from a server. A limit that holds is *not* a guarantee: it says that the attacks of one
release, on one recording, got no more. The guarantee is the budget.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from securesplit.errors import InputError
from securesplit.policy.table import Table, at

__all__ = ["Leakage", "Proof", "faults_of", "read_proofs"]

Limit = Annotated[float | None, Field(ge=0, le=1)]
ProfileName = Literal["smoke", "standard", "full"]
_EFFORT = ("smoke", "standard", "full")
_SKEW = timedelta(days=1)  # Clocks of the machine that attacked and of this one may differ.


class Leakage(Table):
    """The ``[leakage]`` table of a policy.

    Attributes:
        token_recovery: the largest share of tokens that any attack may name.
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


class _Result(BaseModel):
    model_config = _LOOSE
    measure: str
    value: float
    pii_exact: float | None = None


class _Setting(BaseModel):
    model_config = _LOOSE
    mechanism: str
    model: str
    cut: tuple[int, int] | None
    codec: str
    profile: ProfileName
    asked: tuple[str, ...] = ()
    created: AwareDatetime


class Proof(BaseModel):
    """What of a report of the attack suite decides.

    Attributes:
        setting: what was attacked, and when. attacks: what each attack got. worst: the largest token recovery.
    """

    model_config = _LOOSE
    setting: _Setting
    attacks: Annotated[tuple[_Result, ...], Field(min_length=1)]
    worst: float

    def largest(self, limit: str) -> float | None:
        """The largest figure that a limit speaks of; None where nothing measured it."""
        if limit == "pii_exact":
            return max((a.pii_exact for a in self.attacks if a.pii_exact is not None), default=None)
        measure = {"token_recovery": "tokens", "membership_auc": "membership"}[limit]
        return max((a.value for a in self.attacks if a.measure == measure), default=None)


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
    limits: Leakage,
    proofs: Sequence[Proof],
    *,
    mechanism: str,
    model: str,
    cut: tuple[int, int],
    codec: str,
    now: datetime,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What keeps the limits from being proven, in sentences: what is missing, and what is exceeded.

    The newest report of the whole suite, with enough effort, on the same mechanism, model, cut and codec decides; an older one that was better
    does not.

    Args:
        limits: the policy's.
        proofs: what lies in the site's folder.
        mechanism: digest of what of the policy makes the noise. model: manifest digest. cut, codec: the job's.
        now: with a time zone.
    """
    effort = _EFFORT.index(limits.profile)
    fitting = [
        p for p in proofs
        if (p.setting.mechanism, p.setting.model, p.setting.cut, p.setting.codec) == (mechanism, model, cut, codec)
        and _EFFORT.index(p.setting.profile) >= effort and not p.setting.asked
    ]  # fmt: skip
    if not fitting:
        where = f"cut {cut[0]}/{cut[1]}, codec {codec}, profile {limits.profile} or more"
        return (f"no report on this mechanism and model: {where}",), ()
    last = max(fitting, key=lambda p: p.setting.created)
    age = now - last.setting.created
    if age > timedelta(days=limits.max_age_days):
        return (f"the last report is {age.days} days old; leakage.max_age_days is {limits.max_age_days}",), ()
    if age < -_SKEW:
        return ("the last report is from the future; one of the clocks is wrong",), ()
    missing, over = [], []
    for name in ("token_recovery", "pii_exact", "membership_auc"):
        limit: float | None = getattr(limits, name)
        if limit is None:
            continue
        got = last.largest(name)
        if got is None:
            missing.append(f"the last report did not measure {name}")
        elif got > limit:
            over.append(f"the attacks got {name} {got:.3f}; leakage.{name} is {limit:g}")
    return tuple(missing), tuple(over)
