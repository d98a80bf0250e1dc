"""Is the noise in the traffic the noise that the policy pays for? Tests that no honest release can fail but by rare chance.

A release is ``y = x + sigma z`` with ``|x| <= C`` over a whole sequence, z standard normal and fresh. Whatever x is:

* ``|y_t|^2 / sigma^2`` of a row is noncentral chi-square with D degrees, at least a central one, and so are sums of squares
  over all rows, over one column, over one place: those with less energy have less noise (sigma too small; noise on padding
  alone; coordinates without any);
* any two rows that differ by less than two noises do share their noise (attacks/reuse.py), within a release, between
  releases, and between channels;
* for any public unit tensor u, ``<y, u> <= C + sigma N(0, 1)``, with C times the sum of u's row norms where rows are
  clipped one by one: more, on average or in one release, means that something was not clipped.

All thresholds together hold the false alarms of a whole recording to 1e-6. Rounding adds energy as long as its step is no
longer than sigma; under the codecs int8 and bf16 rows so large that it may be longer are left out of the first two.

What they cannot see: noise of the right size from a bad generator, such as one tensor whose coordinates are permuted from
release to release, or whose halves repeat each other; sigma too small by less than the recording's size can show, or by as
much as the text adds; noise that rows share whose texts differ by more than the noise; in recordings of more than 2^15 rows,
noise shared by rows that were not compared; a clip that is missing, or wider by a factor, where the public direction does
not show it; and any clip of gradients (O3) and decoded tokens (O8), for which there is no public direction. `securesplit
privacy audit` looks at the mechanism itself; this looks at what arrived.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy import stats

from attacks.reuse import Closest, across, between, within
from attacks.view import Noise, ServerView

__all__ = ["Finding", "examine"]

_ALARM = 1e-6
_FINDINGS = 24  # Eight on O1, six each on O3 and O8, three between them, are 23.
_LARGE = 100.0  # In sigma: int8 rounds a row with such a peak in steps of 0.8 sigma, bf16 in steps of half a sigma.

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Finding:
    """One test.

    Attributes:
        name: of the test, with the channel: ``O1 energy`` (of a row), ``O1 energy of all``, ``O1 energy of a column``, ``O1
            energy of a place``, ``O1 reuse``, ``O1 reuse within``, ``O1 clip``, ``O1 clip of one``, the same for O3 and O8;
            ``O1-O3 reuse``; ``O8 unpaid``.
        statistic, threshold: the test fails when the statistic is below the threshold; for ``clip`` and ``unpaid``, above.
        passed: whether it did not fail.
    """

    name: str
    statistic: float
    threshold: float
    passed: bool


@dataclass(frozen=True, slots=True)
class _Channel:
    """What arrived on one channel, each tensor once, in units of its sigma."""

    name: str
    releases: tuple[Rows, ...]


def examine(view: ServerView, mean: npt.NDArray[np.float64] | None = None) -> tuple[Finding, ...]:
    """Every test that the view allows; none where the policy adds no noise.

    Args:
        view: of the whole traffic; of gradients those of the attacked sequences are taken where there is no traffic.
        mean: (T, D), what a public sequence's states are on average: the direction in which a missing clip shows; None for
            no test of the clip.
    """
    rows = [p.rows for p in view.traffic] or [s.rows for s in view.sightings]
    seen = [p.gradient for p in view.traffic] if view.traffic else [s.gradient for s in view.sightings]
    channels = [
        _channel("O1", rows, view.noise),
        _channel("O3", [g for g in seen if g is not None], view.gradient_noise),
        _channel("O8", [p.rows for p in view.decoded], view.decode_noise),
    ]
    found: list[Finding | None] = []
    for at in channels:
        if at.name == "O1" and at.releases and mean is not None:
            found += _clip(at, mean, view.noise, view.codec)
        found += _tests(_resolved(at, view.codec))
    for one, two in combinations([_resolved(at, view.codec) for at in channels], 2):
        found.append(_apart(f"{one.name}-{two.name} reuse", across(one.releases, two.releases)))
    if view.noise.sigma and view.decoded and not view.decode_noise.sigma:
        # The policy has no budget for decoded tokens, so that the gate lets none pass.
        found.append(Finding("O8 unpaid", float(len(view.decoded)), 0.0, passed=False))
    return tuple(finding for finding in found if finding is not None)


def _channel(name: str, arrived: Sequence[Rows], noise: Noise) -> _Channel:
    """Each released tensor once: a memoised release is resent as the same bytes, and that is no reuse of noise."""
    if not noise.sigma:
        return _Channel(name, ())
    distinct = {hashlib.sha256(rows.tobytes()).digest(): rows for rows in arrived}
    return _Channel(name, tuple((rows / noise.sigma).astype(np.float32) for rows in distinct.values()))


def _resolved(channel: _Channel, codec: str) -> _Channel:
    """Without the rows that a codec rounds in steps that may be longer than sigma."""
    if codec == "f32":
        return channel
    kept = (rows[np.abs(rows).max(1) <= _LARGE] for rows in channel.releases)
    return _Channel(channel.name, tuple(rows for rows in kept if len(rows)))


def _alarm(tests: int) -> float:
    return _ALARM / _FINDINGS / tests


def _tests(channel: _Channel) -> list[Finding | None]:
    if not channel.releases:
        return []
    name, releases = channel.name, channel.releases
    width = releases[0].shape[1]
    rows = np.concatenate([np.square(r, dtype=np.float64).sum(1) for r in releases])
    columns = np.sum([np.square(r, dtype=np.float64).sum(0) for r in releases], axis=0)
    places, counts = np.zeros(max(map(len, releases))), np.zeros(max(map(len, releases)), np.int64)
    for r in releases:
        places[: len(r)] += np.square(r, dtype=np.float64).sum(1)
        counts[: len(r)] += width
    return [
        _least(f"{name} energy", rows, np.full(len(rows), width)),
        _least(f"{name} energy of all", rows.sum(keepdims=True), np.array([len(rows) * width])),
        _least(f"{name} energy of a column", columns, np.full(width, len(rows))),
        _least(f"{name} energy of a place", places, counts),
        _apart(f"{name} reuse within", within(releases)),
        _apart(f"{name} reuse", between(releases)),
    ]


def _least(name: str, energies: npt.NDArray[np.float64], degrees: npt.NDArray[np.int64]) -> Finding:
    """The energy that is the least for its degrees, at the number of energies."""
    worst = int((energies / stats.chi2.ppf(_alarm(len(energies)), degrees)).argmin())
    return _lower(name, float(energies[worst]), int(degrees[worst]), len(energies))


def _lower(name: str, least: float, degrees: int, tests: int) -> Finding:
    """A squared norm as a share of its degrees, and what it may fall to by chance in so many tests."""
    statistic, threshold = least / degrees, float(stats.chi2.ppf(_alarm(tests), degrees)) / degrees
    return Finding(name, statistic, threshold, passed=statistic >= threshold)


def _apart(name: str, closest: Closest | None) -> Finding | None:
    """Rows must not share their noise, nor carry it with the other sign."""
    if closest is None or not np.isfinite(closest.least):
        return None
    return _lower(name, closest.least, closest.width, closest.tests)


def _clip(channel: _Channel, mean: npt.NDArray[np.float64], noise: Noise, codec: str) -> list[Finding | None]:
    """The projections of all releases on a public direction m, which the clip bounds: their mean, and the largest.

    ``<x, m> / |m|`` is at most C where a sequence is clipped as a whole, and at most ``C sum_t |m_t| / |m|`` where each
    row is. Rounding moves a number by at most 2^-8 of its row's peak, and adds to the noise less than a twentieth.
    """
    if noise.clip is None and noise.row_clip is None:
        return []
    shown, bounds = [], []
    for rows in channel.releases:
        direction = mean[: min(len(rows), len(mean))]
        norm = float(np.linalg.norm(direction))
        if norm > 0:
            shown.append(float((rows[: len(direction)] * direction).sum()) / norm)
            of_rows = float(np.linalg.norm(direction, axis=1).sum()) / norm
            bounds.append(min(noise.clip or np.inf, of_rows * (noise.row_clip or np.inf)) / noise.sigma)
    if not shown:
        return []
    name, wide, more = channel.name, *((1.0, 1.0) if codec == "f32" else (1 + 2.0**-7, 1.05))
    spread = more * float(stats.norm.isf(_alarm(1))) / len(shown) ** 0.5
    mean_shown, mean_bound = float(np.mean(shown)), wide * float(np.mean(bounds)) + spread
    over = np.asarray(shown) - wide * np.asarray(bounds)
    worst, reach = int(over.argmax()), more * float(stats.norm.isf(_alarm(len(shown))))
    return [
        Finding(f"{name} clip", mean_shown, mean_bound, passed=mean_shown <= mean_bound),
        Finding(f"{name} clip of one", shown[worst], wide * bounds[worst] + reach, passed=float(over[worst]) <= reach),
    ]
