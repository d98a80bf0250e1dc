"""From who was right to figures with errors: by seeds alone, and by seeds and passages together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from securesplit.policy.meaning import Meaning

MEANING = Meaning(1e-5, "sequence", "replace-one")
"""Of every epsilon of this study."""
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Figure:
    """A method's accuracy, its standard error over draws, and what it gains over the best client-only head.

    Attributes:
        gain_seed_error: standard error of the paired gain over draws of clients and noise, for these tested texts.
        gain_error: the same when tested passages are resampled as well; the one to quote.
    """

    method: str
    accuracy: float
    seed_error: float
    gain: float
    gain_seed_error: float
    gain_error: float


@dataclass(frozen=True, slots=True)
class Finding:
    """One setting's figures.

    Attributes:
        exchanged: whether val.jsonl's records were the private ones and train.jsonl's the tested ones.
        baseline: the client-only head that did best *on the tested records*.
        meaning: of ``epsilon``.
    """

    task: str
    exchanged: bool
    clients: int
    records: int
    epsilon: float
    mu: float
    chance: float
    tested: int
    draws: int
    baseline: str
    figures: tuple[Figure, ...]
    meaning: Meaning = MEANING


def judge(draws: Sequence[Mapping[str, Tensor]], passages: Tensor) -> tuple[str, tuple[Figure, ...]]:
    """The best client-only method by name, and every method's figures.

    Of the client-only heads with a fixed ridge only the best in hindsight is kept for each kind of rows: a baseline that
    is better than anybody could choose, so that a gain over it is a gain.

    Args:
        draws: per seed, each method's (T,) share of clients that were right.
        passages: (T,) passage of each tested record.
    """
    right = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}  # (S, T)
    kept: dict[str, Tensor] = {}
    for name, each in right.items():
        kind, _, ridge = name.rpartition(", ridge ")
        label = (
            name
            if not kind
            else f"{kind}, ridge by leave-one-out"
            if ridge == "loo"
            else f"{kind}, best ridge in hindsight"
        )
        if label not in kept or each.mean() > kept[label].mean():
            kept[label] = each
    best = max((name for name in kept if name.startswith("client-only")), key=lambda name: float(kept[name].mean()))
    weights = _resampled(passages, len(draws))
    figures = []
    for name, each in kept.items():
        gains = each - kept[best]
        per_draw = each.mean(1)
        figures.append(
            Figure(
                name,
                float(each.mean()),
                _error(per_draw),
                float(gains.mean()),
                _error(gains.mean(1)),
                float(_bootstrap(gains, weights).std()),
            )
        )
    return best, tuple(sorted(figures, key=lambda figure: figure.accuracy))


def _error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)


def _resampled(passages: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Bootstrap weights (R, S) of draws and (R, T) of tested records, whole passages at a time."""
    generator = torch.Generator().manual_seed(0)
    names, group = torch.unique(passages, return_inverse=True)
    picks = torch.randint(len(names), (_RESAMPLES, len(names)), generator=generator)
    times = torch.zeros(_RESAMPLES, len(names)).scatter_add_(1, picks, torch.ones(picks.shape))
    seeds = torch.randint(draws, (_RESAMPLES, draws), generator=generator)
    often = torch.zeros(_RESAMPLES, draws).scatter_add_(1, seeds, torch.ones(seeds.shape))
    return often.double(), times[:, group].double()


def _bootstrap(values: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    often, times = weights
    return ((often @ values) * times).sum(1) / often.sum(1) / times.sum(1)


def table(finding: Finding) -> str:
    """A markdown table of one setting."""
    side = " (exchanged)" if finding.exchanged else ""
    budget = f"epsilon {finding.epsilon:g} {finding.meaning} (mu {finding.mu:.3f})"
    tested = f"{finding.tested} tested texts, {finding.draws} draws, chance {finding.chance:.3f}"
    lines = [
        f"Task `{finding.task}`{side}: {finding.clients} clients of {finding.records} records, {budget}, {tested}.",
        "",
        "| head | accuracy | gain over the best client-only head |",
        "|---|---|---|",
    ]
    lines += [
        f"| {figure.method} | {figure.accuracy:.3f} ± {figure.seed_error:.3f} "
        f"| {figure.gain:+.3f} ± {figure.gain_error:.3f} |"
        for figure in finding.figures
    ]
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """One JSON object."""
    return json.dumps({"findings": [asdict(finding) for finding in findings]})
