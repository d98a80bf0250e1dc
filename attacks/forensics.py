"""Is the noise in the traffic the noise that the policy pays for? Tests that no honest release can fail but by rare chance.

A release is ``y = x + sigma z`` with ``|x| <= C`` over a whole sequence, z standard normal and fresh. Whatever x is:

* ``|y_t|^2 / sigma^2`` of a row is noncentral chi-square with D degrees, at least a central one: rows with less energy have
  less noise (sigma too small; noise on padding alone);
* the difference of two releases has noise of variance ``2 sigma^2``: rows that differ by less share their noise;
* for any public unit tensor u, ``<y, u> <= C + sigma N(0, 1)``, with C times the sum of u's row norms where rows are
  clipped one by one: more means that something was not clipped.

Each test's threshold holds its false alarms, over all that it looks at, to 1e-6. What they cannot see: noise of the right
size from a bad generator, and a missing clip where no public direction shows it. `securesplit privacy audit` looks at the
mechanism itself; this looks at what arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from attacks.view import Noise, ServerView

__all__ = ["Finding", "examine"]

_ALARM = 1e-6
_PAIRS = 64  # Sequences whose pairs are compared; more would show no more of a generator that repeats itself.

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Finding:
    """One test.

    Attributes:
        name: of the test, with the channel: ``O1 energy``, ``O1 reuse``, ``O1 reuse within``, ``O1 clip``, the same for O3.
        statistic, threshold: the test fails when the statistic is below the threshold; for ``clip``, above it.
        passed: whether it did not fail.
    """

    name: str
    statistic: float
    threshold: float
    passed: bool


def examine(view: ServerView, mean: npt.NDArray[np.float64] | None = None) -> tuple[Finding, ...]:
    """Every test that the view allows; none where the policy adds no noise.

    Args:
        view: of the whole traffic.
        mean: (T, D), what a public sequence's states are on average: the direction in which a missing clip shows; None for
            no test of the clip.
    """
    found = _tests("O1", _distinct(view), view.noise, mean)
    gradients = [s.gradient for s in view.sightings if s.gradient is not None]
    return (*found, *_tests("O3", gradients, view.gradient_noise, None))


def _distinct(view: ServerView) -> list[Rows]:
    """Each released tensor once: a memoised release is resent as the same bytes, and that is no reuse of noise."""
    arrived = [p.rows for p in view.traffic] or [s.rows for s in view.sightings]
    return list({rows.tobytes(): rows for rows in arrived}.values())


def _tests(
    channel: str, releases: Sequence[Rows], noise: Noise, mean: npt.NDArray[np.float64] | None
) -> tuple[Finding, ...]:
    if not noise.sigma or not releases:
        return ()
    rows = [r.astype(np.float64) / noise.sigma for r in releases]
    found = [_energy(channel, rows), _within(channel, rows)]
    if len(rows) > 1:
        found.append(_reuse(channel, rows[:_PAIRS]))
    if mean is not None and (noise.clip is not None or noise.row_clip is not None):
        found.append(_clip(channel, rows, mean, noise))
    return tuple(f for f in found if f is not None)


def _lower(least: float, degrees: int, tests: int) -> tuple[float, float]:
    """A squared norm as a share of its degrees, and what it may fall to by chance in so many tests."""
    return least / degrees, float(stats.chi2.ppf(_ALARM / tests, degrees)) / degrees


def _energy(channel: str, rows: Sequence[npt.NDArray[np.float64]]) -> Finding:
    """The row with the least energy of all, at its number of tests."""
    energies = np.concatenate([np.square(r).sum(1) for r in rows])
    statistic, threshold = _lower(float(energies.min()), rows[0].shape[1], len(energies))
    return Finding(f"{channel} energy", statistic, threshold, passed=statistic >= threshold)


def _within(channel: str, rows: Sequence[npt.NDArray[np.float64]]) -> Finding | None:
    """Neighbouring rows of one release must not share their noise, nor carry it with the other sign."""
    least = [
        min(np.square(r[1:] - r[:-1]).sum(1).min(), np.square(r[1:] + r[:-1]).sum(1).min()) for r in rows if len(r) > 1
    ]
    if not least:
        return None
    tests = 2 * sum(len(r) - 1 for r in rows)
    statistic, threshold = _lower(float(min(least)) / 2, rows[0].shape[1], tests)
    return Finding(f"{channel} reuse within", statistic, threshold, passed=statistic >= threshold)


def _reuse(channel: str, rows: Sequence[npt.NDArray[np.float64]]) -> Finding:
    """Rows of two releases in the same place must not share their noise, nor carry it with the other sign."""
    width, least, tests = rows[0].shape[1], np.inf, 0
    for place in range(max(len(r) for r in rows)):
        here = np.stack([r[place] for r in rows if len(r) > place])
        if len(here) < 2:
            break
        energy = np.square(here).sum(1)
        apart = np.triu_indices(len(here), 1)
        inner = (here @ here.T)[apart]
        both = energy[apart[0]] + energy[apart[1]]
        least = min(least, float((both - 2 * inner).min()), float((both + 2 * inner).min()))
        tests += 2 * len(inner)
    statistic, threshold = _lower(least / 2, width, tests)
    return Finding(f"{channel} reuse", statistic, threshold, passed=statistic >= threshold)


def _clip(
    channel: str, rows: Sequence[npt.NDArray[np.float64]], mean: npt.NDArray[np.float64], noise: Noise
) -> Finding | None:
    """The mean projection of all releases on a public direction m, which the clip bounds.

    ``<x, m> / |m|`` is at most C where a sequence is clipped as a whole, and at most ``C sum_t |m_t| / |m|`` where each
    row is.
    """
    shown, bounds = [], []
    for r in rows:
        direction = mean[: min(len(r), len(mean))]
        norm = float(np.linalg.norm(direction))
        if norm > 0:
            shown.append(float((r[: len(direction)] * direction).sum()) / norm)
            of_rows = float(np.linalg.norm(direction, axis=1).sum()) / norm
            bounds.append(min(noise.clip or np.inf, of_rows * (noise.row_clip or np.inf)) / noise.sigma)
    if not shown:
        return None
    statistic = float(np.mean(shown))
    threshold = float(np.mean(bounds)) + float(stats.norm.isf(_ALARM)) / len(shown) ** 0.5
    return Finding(f"{channel} clip", statistic, threshold, passed=statistic <= threshold)
