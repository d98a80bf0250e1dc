"""Two reports side by side: what the attacks got more or less of, and whether the difference is more than chance."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from attacks.report import Report, Result

__all__ = ["Comparison", "Difference", "compare"]

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Difference(BaseModel):
    """One attack in both reports, or in one of them.

    Attributes:
        name: of the attack. before, after: what it got; None where it did not run. change: after minus before.
        clear: whether the two 95 % intervals do not touch, which errs towards no difference; None unless both ran with the
            same measure.
    """

    model_config = _STRICT
    name: str
    before: float | None
    after: float | None
    change: float | None
    clear: bool | None


class Comparison(BaseModel):
    """What changed.

    Attributes:
        worst_before, worst_after: the headlines. attacks: one by one.
        settings: what of the settings differs, as ``name: before -> after``; figures under different transcripts, models or
            adversaries are not figures of one thing.
    """

    model_config = _STRICT
    worst_before: float
    worst_after: float
    attacks: tuple[Difference, ...]
    settings: tuple[str, ...]


def compare(before: Report, after: Report) -> Comparison:
    """Compare two reports; the order of attacks is the first's, then what is new."""
    first, second = ({r.name: r for r in report.attacks} for report in (before, after))
    names = (*first, *(name for name in second if name not in first))
    old, new = before.setting.model_dump(mode="json"), after.setting.model_dump(mode="json")
    return Comparison(
        worst_before=before.worst,
        worst_after=after.worst,
        attacks=tuple(_difference(name, first.get(name), second.get(name)) for name in names),
        settings=tuple(f"{key}: {old[key]} -> {new[key]}" for key in old if key != "created" and old[key] != new[key]),
    )


def _difference(name: str, a: Result | None, b: Result | None) -> Difference:
    both = a is not None and b is not None and a.measure == b.measure
    change = b.value - a.value if both and a is not None and b is not None else None
    clear = None
    if both and a is not None and b is not None:
        clear = b.value_ci95[0] > a.value_ci95[1] or b.value_ci95[1] < a.value_ci95[0]
    return Difference(
        name=name,
        before=None if a is None else a.value,
        after=None if b is None else b.value,
        change=change,
        clear=clear,
    )
