"""What differs between two runs: settings, the policy by effect, and figures. Equal things are not told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from securesplit.errors import InputError
from securesplit.policy.compare import Change, changes
from securesplit.policy.schema import Policy
from securesplit.runs.about import About
from securesplit.runs.folder import RunFolder
from securesplit.runs.spent import Spent

__all__ = ["Difference", "Figure", "RunDiff", "Scalar", "compare_runs", "job_differences"]

Scalar = str | int | float | bool | None
_FIGURES = ("steps", "initial_loss", "loss", "accuracy", "epsilon", "bytes_up", "bytes_down", "seconds")


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting that differs; None where a run does not have it."""

    key: str
    before: Scalar
    after: Scalar


@dataclass(frozen=True, slots=True)
class Figure:
    """One result of both runs.

    Attributes:
        name: such as ``loss``.
        before, after: None where a run does not have it.
        spent: of an epsilon, what the two figures mean; None for any other.
    """

    name: str
    before: float | None
    after: float | None
    spent: tuple[Spent, Spent] | None = None

    @property
    def comparable(self) -> bool:
        """Whether both are of one quantity. Epsilons of another unit, relation or delta, and none at all, are not."""
        return self.spent is None or None is not self.spent[0].meaning == self.spent[1].meaning

    @property
    def change(self) -> float | None:
        """After less before; None where one is missing, or where they are not of one quantity."""
        if self.before is None or self.after is None or not self.comparable:
            return None
        return self.after - self.before


@dataclass(frozen=True, slots=True)
class RunDiff:
    """The outcome.

    Attributes:
        settings: of job, options, seeds, versions, data and model.
        policy: key by key with the effect of going from the first to the second; None where a policy cannot be read any more.
        figures: what came out; both runs' where at least one is known, and in any case what was spent.
    """

    settings: tuple[Difference, ...]
    policy: tuple[Change, ...] | None
    figures: tuple[Figure, ...]


def compare_runs(first: RunFolder, second: RunFolder) -> RunDiff:
    """Compare what two folders hold; interrupted runs as far as they got.

    Raises:
        InputError: SS-1284 when one of them has no readable ``about.json``, with every fault of both.
    """
    missing = [run for run in (first, second) if run.about is None]
    if missing:
        raise InputError(
            "SS-1284", f"{len(missing)} of the two runs cannot be compared: about.json is missing or is none",
            hint="Runs of earlier versions have none; `runs show` tells what there is.",
            details=tuple(f"{run.path}: {fault}" for run in missing for fault in run.faults or ("about.json: missing",)),
        )  # fmt: skip
    assert first.about is not None
    assert second.about is not None
    return RunDiff(
        settings=_different(dict(_settings(first.about)), dict(_settings(second.about))),
        policy=_policies(first.about, second.about),
        figures=tuple(f for f in _figures(first, second) if f.spent is not None or (f.before, f.after) != (None, None)),
    )


def job_differences(before: str, after: str) -> tuple[Difference, ...]:
    """What differs between two jobs in their canonical form, as keys that begin with ``job.``."""
    return _different(dict(_job(before)), dict(_job(after)))


def _different(before: Mapping[str, Scalar], after: Mapping[str, Scalar]) -> tuple[Difference, ...]:
    keys = [*before, *(key for key in after if key not in before)]
    return tuple(Difference(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k))


def _settings(about: About) -> Iterator[tuple[str, Scalar]]:
    yield "client", about.client
    yield "model", about.model
    yield "regime", about.regime
    yield "policy.name", about.policy_name
    yield "policy.digest", about.policy_digest
    yield from _job(about.job)
    yield from ((f"options.{option.name}", option.value) for option in about.options)
    for name, part in (("seeds", about.seeds), ("versions", about.versions), ("data", about.data)):
        yield from _flat(name, part.model_dump(mode="json"))


def _flat(name: str, value: object) -> Iterator[tuple[str, Scalar]]:
    """A value of JSON as dotted keys; a list counts as one value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, str | int | float | bool) or value is None:
        yield name, value
    else:
        yield name, json.dumps(value)


def _job(text: str) -> Sequence[tuple[str, Scalar]]:
    """A job's settings; the text itself where it is none, as in a file of another's making."""
    try:
        return tuple(_flat("job", json.loads(text, parse_constant=str)))
    except (ValueError, RecursionError):
        return (("job", text),)


def _policies(first: About, second: About) -> tuple[Change, ...] | None:
    try:
        before, after = (Policy.model_validate_json(about.policy, strict=False) for about in (first, second))
    except ValidationError:  # Written by a version with another schema; the digests still tell that they differ.
        return () if first.policy_digest == second.policy_digest else None
    return changes(before, after)


def _figures(first: RunFolder, second: RunFolder) -> Iterator[Figure]:
    for name in _FIGURES:
        if name == "epsilon":
            before, after = first.spent, second.spent
            yield Figure(name, before.epsilon, after.epsilon, (before, after))
        else:
            yield Figure(name, _figure(first, name), _figure(second, name))


def _figure(run: RunFolder, name: str) -> float | None:
    if run.finished is not None:
        value = getattr(run.finished, name)
    else:
        value = getattr(run.last, name, None) if run.last is not None and name != "initial_loss" else None
        value = run.steps if name == "steps" else value
    return None if value is None else float(value)
