"""Test 4: one record against another over a whole small job, counting what *other* records' releases say of it.

A toy site, linear so that thousands of jobs run at once, through the real gate and wire: A adds a bias to each record, and
the bias learns from a sum over the records. The canary is one extreme record or its opposite. The auditor knows all other
records and the code; from what the server saw it computes, for either canary, what every release would have been before
its noise, and adds up ``<z - (m + m')/2, m - m'> / sigma^2`` over all releases of all records: the log-likelihood ratio.
Where the bias learns from the noised sum, other records' releases add nothing. Where it learns from clean gradients they
do (the theta-leak, docs/threat-model.md 3), and the total exceeds what the canary was charged. The loop is the toy's own: what
is audited is that gate, noise and charges compose over a job. That the product's loop moves A and C by released sums alone
is found by the test of completeness, not here.

Beside the bound from counted errors stands ``mu_path``, the square root of ``sum |m - m'|^2 / sigma^2``: what the job gave
away along the observed path if the noise is as claimed, to the last digit and without any test's slack.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from securesplit.audit.bench import Bench, Claim, Floats, claims_of
from securesplit.audit.bounds import mu_at_least
from securesplit.audit.distribution import clipped
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.plan import At

_OTHERS, _WIDTH, _ROUNDS, _BLOCK = 8, 2, 2, 250

Learn = Callable[[Floats, Floats, Floats, float], Floats]
"""(bias, noised sum, clean sum, rate) -> the next bias, all (jobs, D)."""


@dataclass(frozen=True, slots=True)
class JointVerdict:
    """What a whole job proves about one record.

    Attributes:
        regime: of the policy.
        jobs: run in each world.
        rounds, others: of each job.
        claimed_mu: what the canary's own releases cost together.
        mu_lower: what the auditor's test proves.
        mu_path: what the observed path gave away by the claimed noise.
        ok: neither exceeds the claim.
    """

    regime: str
    jobs: int
    rounds: int
    others: int
    claimed_mu: float
    mu_lower: float
    mu_path: float
    ok: bool


def learn(bias: Floats, noised: Floats, clean: Floats, rate: float) -> Floats:
    """How the toy's A learns: from the noised sum. The clean one is at hand as it is in any training loop."""
    del clean
    return bias - rate * noised


@dataclass(slots=True)
class _Jobs:
    """Many jobs of one world, side by side.

    Attributes:
        bench, claims: the path, and its channels.
        world: +1 or -1, the canary's sign.
        bias: for either canary, (jobs, D); the one of this world is what the site uses.
        ratio: log-likelihood ratio so far, (jobs,).
        given: ``sum |m - m'|^2 / sigma^2`` so far, (jobs,).
        cost: mu^2 of the canary's own releases.
    """

    bench: Bench
    claims: dict[At, Claim]
    world: int
    bias: dict[int, Floats]
    ratio: Floats
    given: Floats
    cost: float = 0.0

    def weigh(self, at: At, seen: Floats, clean: dict[int, Floats]) -> None:
        """Add one channel's releases, (jobs, records, D), to the statistic."""
        claim = self.claims[at]
        means = {w: _clipped(value, claim) for w, value in clean.items()}
        difference = means[1] - means[-1]
        middle = (means[1] + means[-1]) / 2
        self.ratio += ((seen - middle) * difference).sum(axis=(1, 2)) / claim.sigma**2
        self.given += (difference**2).sum(axis=(1, 2)) / claim.sigma**2
        self.cost += claim.mu**2

    def rows(self, at: At, clean: dict[int, Floats]) -> None:
        """Release every record's row of every job."""
        mine = clean[self.world]
        seen = np.concatenate(
            [
                self.bench.send(torch.from_numpy(part)[:, None].float(), at=at, learn=True)
                for part in np.array_split(mine.reshape(-1, _WIDTH), -(-mine.size // _WIDTH // 1000))
            ]
        )
        self.weigh(at, seen.reshape(mine.shape), clean)


def audit_joint(policy: Policy, bench: Bench, *, jobs: int, error: float) -> JointVerdict:
    """Run the jobs in both worlds.

    Args:
        policy: audited.
        bench: of this policy, fresh.
        jobs: in each world.
        error: probability that a right claim is called wrong.
    """
    privacy = policy.privacy
    assert isinstance(privacy, Gaussian)
    claims = {claim.at: claim for claim in claims_of(policy)}
    moving = privacy.regime != "frozen"
    rounds = min([_ROUNDS, *(c.releases for at, c in claims.items() if at != "decode")]) if moving else 1
    worlds = {}
    for world in (1, -1):
        zeros = {w: np.zeros((jobs, _WIDTH)) for w in (1, -1)}
        worlds[world] = _Jobs(bench, dict(claims), world, zeros, np.zeros(jobs), np.zeros(jobs))
        for _ in range(rounds):
            _round(worlds[world], moving=moving)
    hits, alarms = (int((worlds[w].ratio > 0).sum()) for w in (1, -1))
    bound = mu_at_least(hits, alarms, jobs, error)
    path = math.sqrt(max(float(jobs_.given.max()) for jobs_ in worlds.values()))
    claimed = math.sqrt(worlds[1].cost)
    return JointVerdict(
        regime=privacy.regime, jobs=jobs, rounds=rounds, others=_OTHERS, claimed_mu=claimed, mu_lower=bound, mu_path=path,
        ok=bound <= claimed and path <= claimed * (1 + 1e-6),
    )  # fmt: skip


def _round(jobs: _Jobs, *, moving: bool) -> None:
    n, claims = len(jobs.ratio), jobs.claims
    cut = claims["cut"]
    records = _records(n, cut.clip, others=_OTHERS)
    jobs.rows("cut", {w: records[w] + jobs.bias[w][:, None] for w in (1, -1)})
    if "decode" in claims:
        # A token that is fed back may depend on any record, and is charged to each; nobody else's row is fed back.
        jobs.rows("decode", _records(n, claims["decode"].clip, others=0))
    if not moving:
        return
    if "gradient" in claims:
        jobs.rows("gradient", _records(n, claims["gradient"].clip, others=1))
    update = claims["update"]
    gradients = _records(n, update.clip, others=1)
    noised = _sum(jobs.bench, gradients[jobs.world])
    clean = {w: gradients[w].sum(axis=1) for w in (1, -1)}
    sums = {w: _clipped(gradients[w], update).sum(axis=1, keepdims=True) for w in (1, -1)}
    whole = Claim("update", math.inf, update.mu, update.distance, 1, per_row=False, releases=update.releases)
    jobs.claims["update"] = whole
    jobs.weigh("update", noised[:, None], sums)
    jobs.claims["update"] = update
    rate = cut.clip / update.clip / 10
    jobs.bias = {w: learn(jobs.bias[w], noised, clean[w], rate) for w in (1, -1)}


def _records(n: int, clip: float, *, others: int) -> dict[int, Floats]:
    """(n, 1 + others, D) for either canary: the canary far outside the clip, the others inside and known."""
    out = {}
    for world in (1, -1):
        records = np.zeros((n, 1 + others, _WIDTH))
        records[:, 0, 0] = world * 100 * clip
        records[:, 1:, 1] = 0.5 * clip
        out[world] = records
    return out


def _clipped(values: Floats, claim: Claim) -> Floats:
    out: Floats = clipped(values.reshape(-1, 1, _WIDTH), claim).reshape(values.shape)
    return out


def _sum(bench: Bench, gradients: Floats) -> Floats:
    """Every job's noised sum, (jobs, D); many jobs share one long vector, each with coordinates of its own."""
    out = []
    for start in range(0, len(gradients), _BLOCK):
        block = gradients[start : start + _BLOCK]
        total = bench.summing(len(block) * _WIDTH)
        for i, job in enumerate(block):
            for gradient, name in zip(job, bench.names(len(job)), strict=True):
                whole = torch.zeros(len(block) * _WIDTH, dtype=torch.float64)
                whole[i * _WIDTH : (i + 1) * _WIDTH] = torch.from_numpy(gradient)
                total.add(whole, name)
        out.append(bench.apply(total).reshape(-1, _WIDTH))
    return np.concatenate(out)
