"""Test 2: is what is left, when the clipped record is taken away, the noise that was claimed, everywhere and afresh?

The clipped record is computed here a second time, by other code, so the residual is known to a lattice step. It is looked
at as a whole (mean, variance, the law in 64 equal cells, the low bits of the lattice), along the clipped record (another clip would be left over
there), by group (padding rows, training and evaluation, before and after a restart, each position), and in pairs (neighbours, rows, records, messages), where one draw
used twice shows as correlation. Two-point tests see one direction; this one sees a row without noise that lies beside it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from securesplit.audit.bench import ROWS, Bench, Claim, Floats, claims_of
from securesplit.audit.bounds import chi_square_z, quantile
from securesplit.policy.schema import Policy

_LENGTH, _WIDTH, _PADDING = 8, 128, 2  # Rows of a record, the last of which are padding; numbers in a row.
_BATCH = 16
_CELLS = 64


@dataclass(frozen=True, slots=True)
class Finding:
    """One statistic, standard normal when the code is right."""

    name: str
    z: float


@dataclass(frozen=True, slots=True)
class DistributionVerdict:
    """All statistics of one channel.

    Attributes:
        channel: ``cut``, ``decode``, ``gradient`` or ``update``.
        coordinates: how many noised numbers were looked at.
        off_lattice: how many were no float32 of a multiple of the lattice step; must be none. None where the codec rounds the
            noised numbers: lattice and law are then looked at by an audit under ``f32``, and the rest here.
        worst: the statistic farthest from 0.
        limit: what no ``|z|`` may exceed.
        sigma_ratio: measured over claimed standard deviation.
        findings: all statistics.
        ok: no statistic is over its limit and every number lies on the lattice, where it can be told.
    """

    channel: str
    coordinates: int
    off_lattice: int | None
    worst: str
    worst_z: float
    limit: float
    sigma_ratio: float
    findings: tuple[Finding, ...]
    ok: bool


def audit_distribution(
    policy: Policy, bench: Bench, *, messages: int, error: float, only: Collection[str] | None = None
) -> tuple[DistributionVerdict, ...]:
    """Test the noise on every channel of a private policy, at the policy's own sigma.

    Args:
        policy: audited.
        bench: of this policy, fresh.
        messages: of 16 records of 8 x 128 numbers each, by channel; even.
        error: probability that right noise is called wrong, all statistics of all channels together.
        only: these channels; all that the policy has, when absent.
    """
    claims = claims_of(policy)
    return tuple(
        _verdict(bench, claim, messages, error / len(claims)) for claim in claims if only is None or claim.at in only
    )


def clipped(records: Floats, claim: Claim) -> Floats:
    """(B,T,D) after clipping, in float64 and without the product's code."""
    axes = (2,) if claim.per_row else (1, 2)
    norm = np.sqrt((records**2).sum(axis=axes, keepdims=True))
    out: Floats = records * np.minimum(1.0, claim.clip / np.maximum(norm, 1e-300))
    return out


def _records(claim: Claim, longest: int) -> Floats:
    """Half of them far outside the clip, half inside, with rows of padding; the same in every message."""
    shape = (_BATCH, min(_LENGTH, longest), _WIDTH)
    wave = np.sin(np.arange(math.prod(shape)) * 0.7).reshape(shape)
    wave[:, -_PADDING:] = 0.0
    norm = np.sqrt((wave**2).sum(axis=(1, 2), keepdims=True))
    scale = np.where(np.arange(_BATCH) % 2 == 0, 100.0, 0.4)[:, None, None]
    out: Floats = (wave / norm * claim.clip * scale).astype(np.float32).astype(np.float64)
    return out


def _verdict(bench: Bench, claim: Claim, messages: int, error: float) -> DistributionVerdict:
    records = _records(claim, max(bench.policy.limits.buckets))
    values = np.empty((messages, *records.shape))
    for i in range(messages):
        if i == messages // 2:
            bench.resume()
        values[i] = _seen(bench, claim, records, learn=i % 2 == 0)
    clean = clipped(records, claim) if claim.at in ROWS else _summed(records, claim)
    residual = (values - clean) / claim.sigma
    off, law = _lattice(bench, claim, values, residual) if bench.exact or claim.at not in ROWS else (None, ())
    aligned = Finding(
        "along the clipped record", float((residual * clean).sum() / math.sqrt(len(values) * (clean**2).sum()))
    )
    findings = (aligned, *_moments(residual), *_pairs(residual), *law)
    worst = max(findings, key=lambda f: abs(f.z) if math.isfinite(f.z) else math.inf)
    limit = quantile(error / len(findings))
    return DistributionVerdict(
        channel=claim.at, coordinates=values.size, off_lattice=off, worst=worst.name, worst_z=worst.z, limit=limit,
        sigma_ratio=float(np.sqrt((residual**2).mean())), findings=findings, ok=not off and abs(worst.z) <= limit,
    )  # fmt: skip


def _seen(bench: Bench, claim: Claim, records: Floats, *, learn: bool) -> Floats:
    if claim.at in ROWS:
        return bench.send(torch.from_numpy(records).float(), at=claim.at, learn=learn)
    total = bench.summing(records.size)
    for name, record in zip(bench.names(_BATCH), records, strict=True):
        total.add(torch.from_numpy(np.concatenate([record.ravel()] * _BATCH)), name)
    return bench.release(total).reshape(records.shape)


def _summed(records: Floats, claim: Claim) -> Floats:
    """What a sum of these records' gradients is, each repeated along the whole vector and clipped by itself."""
    whole = np.concatenate([clipped(np.tile(r.ravel(), _BATCH)[None, None], claim) for r in records])
    out: Floats = whole.sum(axis=(0, 1)).reshape(records.shape)
    return out


def _step(bench: Bench, claim: Claim) -> float:
    """The lattice step that the ledger says the release had; public."""
    return next(e.step for e in bench.ledger.entries() if e.channel == claim.at)


def _lattice(bench: Bench, claim: Claim, values: Floats, residual: Floats) -> tuple[int, tuple[Finding, ...]]:
    """How many numbers lie beside the lattice, and whether the noise on it has its law to the lowest bits."""
    step = _step(bench, claim)
    known = np.rint(values / step)
    wide = values.astype(np.float32) if claim.at in ROWS else values
    return int(np.count_nonzero((known * step).astype(wide.dtype) != wide)), _law(residual, known)


def _z_of_squares(part: Floats) -> float:
    return chi_square_z(float((part**2).sum()), part.size)


def _moments(residual: Floats) -> tuple[Finding, ...]:
    half = len(residual) // 2
    by_position = (residual**2).sum(axis=(0, 1)).ravel()
    trials = residual.shape[0] * residual.shape[1]
    positions = [chi_square_z(float(s), trials) for s in by_position]
    # The largest of n statistics, brought back to one: each has to have n times the tail.
    low, high = min(positions), max(positions)
    return (
        Finding("mean", float(residual.sum() / math.sqrt(residual.size))),
        Finding("variance", _z_of_squares(residual)),
        Finding("variance of padding rows", _z_of_squares(residual[:, :, -_PADDING:])),
        Finding("variance in training", _z_of_squares(residual[0::2])),
        Finding("variance in evaluation", _z_of_squares(residual[1::2])),
        Finding("variance before a restart", _z_of_squares(residual[:half])),
        Finding("variance after a restart", _z_of_squares(residual[half:])),
        Finding("variance of the quietest position", _of_extreme(low, len(positions))),
        Finding("variance of the loudest position", _of_extreme(high, len(positions))),
    )


def _of_extreme(z: float, n: int) -> float:
    """The extreme of n independent statistics as a standard normal one, where it is far out; 0 elsewhere."""
    tail = n * 0.5 * math.erfc(abs(z) / math.sqrt(2))
    if tail >= 0.5:
        return 0.0
    return math.copysign(quantile(2 * tail) if tail > 1e-300 else abs(z), z)


def _pairs(residual: Floats) -> tuple[Finding, ...]:
    half = len(residual) // 2

    def z(name: str, a: Floats, b: Floats) -> Finding:
        return Finding(f"correlation of {name}", float((a * b).sum() / math.sqrt(a.size)))

    return (
        z("neighbours", residual[..., :-1], residual[..., 1:]),
        z("rows", residual[:, :, :-1], residual[:, :, 1:]),
        z("records of a message", residual[:, :-1], residual[:, 1:]),
        z("messages", residual[:-1], residual[1:]),
        z("messages before and after a restart", residual[:half], residual[half : 2 * half]),
    )


def _law(residual: Floats, steps: Floats) -> tuple[Finding, ...]:
    """The discrete law is flat within a cell: so wide noise is Gaussian in cells, and uniform in the lowest six bits."""
    normal = NormalDist()
    edges = [normal.inv_cdf(i / _CELLS) for i in range(1, _CELLS)]
    cells = np.bincount(np.searchsorted(edges, residual.ravel()), minlength=_CELLS)
    bits = np.bincount(np.mod(steps.ravel(), _CELLS).astype(np.int64), minlength=_CELLS)
    expected = residual.size / _CELLS
    return tuple(
        Finding(name, chi_square_z(float(((found - expected) ** 2 / expected).sum()), _CELLS - 1))
        for name, found in (("law", cells), ("lowest bits", bits))
    )
