"""Finished cells as curves of recovery over loss, and recovery where two defences cost the same quality."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attacks.metrics import interval

Numbers = NDArray[np.float64]

RESAMPLES = 2000
# Public, so that anybody gets the same interval from the same counts.
_SEED = 20261123
PERMUTED = {1: "S", 2: "D", 3: "SD"}


@dataclass(frozen=True, slots=True)
class Point:
    """One finished cell.

    Attributes:
        kind, level: of the defence.
        losses: (N,) nats per token of every sequence. hits: (N,) by attack. of: tokens of a sequence.
        mu: of one row, None without a guarantee. unresolved, facts, seconds: as in :class:`scripts.defences.cells.Result`.
    """

    kind: str
    level: float
    losses: Numbers
    hits: dict[str, Numbers]
    of: int
    mu: float | None
    unresolved: int | None
    facts: dict[str, float]
    seconds: float

    @property
    def best(self) -> str:
        """The attack with the highest mean: chosen on the attacked text, which favours the attacker."""
        return max(self.hits, key=lambda name: float(self.hits[name].mean()))

    @property
    def recovered(self) -> Numbers:
        """(N,) shares of tokens that the best attack named."""
        return self.hits[self.best] / self.of

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())

    @property
    def recovery(self) -> float:
        """Mean recovery of the best attack."""
        return float(self.recovered.mean())

    def recovery_interval(self) -> tuple[float, float]:
        """95 %, by :func:`attacks.metrics.interval`: a bootstrap over sequences."""
        counts = [int(v) for v in self.hits[self.best]]
        return interval(counts, [self.of] * len(counts))


@dataclass(frozen=True, slots=True)
class Measured:
    """All that a file holds.

    Attributes:
        points: finished cells of one setting. noiseless, client: (N,) losses. priors: (N,) shares, by what they know.
        setting: the parameters that all points have in common.
    """

    points: tuple[Point, ...]
    noiseless: Numbers
    client: Numbers
    priors: dict[str, Numbers]
    setting: dict[str, float]


def read(file: Path) -> Measured:
    """The cells of the latest setting in a file; behind the client's denoiser, ``gaussian`` is a point of ``denoised`` too."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    cells, first = list(kept["cells"].values()), kept["references"]
    common = ("steps", "training", "public", "test", "length", "seeds", "k", "width", "candidates")
    setting = {name: cells[-1]["parameters"][name] for name in common}
    points = []
    for cell in cells:
        p = cell["parameters"]
        if any(p[name] != value for name, value in setting.items()):
            continue
        hits = {name: np.array(values, dtype=np.float64) for name, values in cell["hits"].items()}
        rest = (hits, cell["of"], cell["mu"], cell["unresolved"], cell["facts"], cell["seconds"])
        points.append(Point(p["kind"], p["level"], np.array(cell["losses"]), *rest))
        if cell["denoised"]:
            points.append(Point("denoised", p["level"], np.array(cell["denoised"]), *rest))
    priors = {name: np.array(first[name]) / first["of"] for name in ("unigram", "alone", "told")}
    return Measured(tuple(points), np.array(first["noiseless"]), np.array(first["client"]), priors, setting)


def name_of(point: Point) -> str:
    """What a point's curve is called: one per defence, and one per permutation."""
    return f"permuted {PERMUTED[int(point.level)]}" if point.kind == "permuted" else point.kind


def curves(points: Sequence[Point]) -> dict[str, tuple[Point, ...]]:
    """Points by curve, each from the lowest loss up."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(name_of(point), []).append(point)
    return {name: tuple(sorted(mine, key=lambda p: p.loss)) for name, mine in found.items()}


def recovery_at(losses: Sequence[float], recoveries: Sequence[float], target: float) -> float | None:
    """Recovery of a defence that may cost this loss, linear between the measured settings that lie nearest in loss.

    A client that mixes two settings at random, sequence by sequence, gets every point of the line between them. Where even
    the weakest setting costs more than the target, None: the defence cannot be had at that quality. Where the strongest
    setting costs less, that setting: nobody must waste quality.

    Args:
        losses, recoveries: of the settings, in any order.
        target: the loss.
    """
    order = np.argsort(losses)
    x, y = np.asarray(losses, dtype=np.float64)[order], np.asarray(recoveries, dtype=np.float64)[order]
    if target < x[0]:
        return None
    return float(np.interp(target, x, y))


@dataclass(frozen=True, slots=True)
class Matched:
    """Recovery at a loss, with a 95 % interval.

    Attributes:
        value, low, high: recovery. inside: whether the loss lies between two settings; else the strongest setting's figure.
    """

    value: float
    low: float
    high: float
    inside: bool


def matched(curve: Sequence[Point], target: float) -> Matched | None:
    """Recovery of a curve at a loss; the interval resamples sequences, and loss and recovery of every setting with them."""
    losses, recovered = _stacked(curve)
    value = recovery_at(losses.mean(1), recovered.mean(1), target)
    if value is None:
        return None
    drawn = [v for v in _resampled(losses, recovered, target) if v is not None]
    low, high = np.quantile(drawn, (0.025, 0.975)) if drawn else (value, value)
    return Matched(value, float(low), float(high), bool(target <= losses.mean(1).max()))


def difference(curve: Sequence[Point], other: Sequence[Point], target: float) -> Matched | None:
    """Recovery of ``curve`` minus that of ``other`` at a loss, on the same resampled sequences; None where one has none."""
    (a, b), (c, d) = _stacked(curve), _stacked(other)
    first, second = (recovery_at(x.mean(1), y.mean(1), target) for x, y in ((a, b), (c, d)))
    if first is None or second is None:
        return None

    pairs = zip(_resampled(a, b, target), _resampled(c, d, target), strict=True)
    drawn = [mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None]
    low, high = np.quantile(drawn, (0.025, 0.975)) if drawn else (0.0, 0.0)
    inside = target <= min(a.mean(1).max(), c.mean(1).max())
    return Matched(first - second, float(low), float(high), bool(inside))


def _stacked(curve: Sequence[Point]) -> tuple[Numbers, Numbers]:
    return np.stack([p.losses for p in curve]), np.stack([p.recovered for p in curve])


def _resampled(losses: Numbers, recovered: Numbers, target: float) -> list[float | None]:
    """:func:`recovery_at` on resampled sequences; equal numbers of sequences give equal picks, so that pairs stay pairs."""
    picks = _picks(losses.shape[1])
    x, y = losses[:, picks].mean(2), recovered[:, picks].mean(2)
    return [recovery_at(x[:, i], y[:, i], target) for i in range(RESAMPLES)]


def _picks(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(_SEED).integers(0, count, size=(RESAMPLES, count))


def mean_interval(values: Numbers) -> tuple[float, float, float]:
    """Mean and 95 % percentile bootstrap over sequences (N,)."""
    low, high = np.quantile(values[_picks(len(values))].mean(1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)
