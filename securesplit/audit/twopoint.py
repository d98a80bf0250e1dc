"""Test 1: two worlds that differ as far as a claim allows, told apart by the best statistic there is.

World u holds records at +100 C e, world v at -100 C e, far outside the clip, so that a skipped clip is seen. The statistic
is <decoded, e>, the threshold 0, both fixed in advance. ``mu_lower`` is a lower bound of mu by exact binomial limits; it
lies under the claim when the code is right, but for the stated probability, and above it when noise, clip or sensitivity
are wrong. A bound under 0.6 of the claim means that the noise is dearer than its price, or that the test is blind.

Half of the trials are released as in training and half as in evaluation, the second half after a restart of the site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from securesplit.audit.bench import BATCH, ROWS, Bench, Claim, Floats, claims_of
from securesplit.audit.bounds import mu_at_least, pure_epsilon_at_least
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.calibrate import pure_mu
from securesplit.privacy.plan import enforced_mu

TIGHT = 0.6
_BLOCK = 250  # Records in one sum; each has coordinates of its own there, so that one sum is so many trials.


@dataclass(frozen=True, slots=True)
class ChannelVerdict:
    """One channel's claim and what the distinguisher proves.

    Attributes:
        channel: ``cut``, ``decode``, ``gradient``, ``update`` or ``labels``.
        claimed_mu: of the audited release.
        mu_lower: the larger of the two directions' bounds.
        mu_lower_by_direction: along one coordinate, and along a dense unit vector; one value where there is one direction.
        ok: no bound is over the claim, and each is at least 0.6 of it where so many trials can tell.
        decided: whether the trials were enough to tell 0.6 of the claim from less.
        trials: releases in each world and direction.
        releases: over how many releases the channel's budget was divided in this audit.
        policy_releases: over how many the policy divides it; where a release is too small to be measured in acceptable
            time, the audit divides over fewer, which makes noise smaller and changes nothing else.
    """

    channel: str
    claimed_mu: float
    mu_lower: float
    mu_lower_by_direction: tuple[float, ...]
    ok: bool
    decided: bool
    trials: int
    releases: int
    policy_releases: int


def trials_for(mu: float, most: int) -> tuple[int, bool]:
    """How many trials per world tell mu from 0.6 mu and from 1.41 mu, four standard errors apart; at most ``most``.

    A rate's limit at joint error 10^-4 lies about 4 standard errors off, and a standard error of Phi^-1(rate) is
    ``sqrt(p (1-p) / n) / phi``, which grows with mu.
    """
    p = 0.5 * math.erfc(-mu / 2 / math.sqrt(2))
    error = math.sqrt(p * (1 - p)) * math.sqrt(2 * math.pi) * math.exp(mu * mu / 8)
    wanted = math.ceil((error * (2 * 4.1 + 4 * math.sqrt(2)) / (0.4 * mu)) ** 2 / BATCH) * BATCH
    return min(max(wanted, 2 * BATCH), most), wanted <= most


def measurable(policy: Policy, most: int) -> Policy:
    """The policy, with channels of very many releases divided over as few as ``most`` trials can measure."""
    privacy = policy.privacy
    assert isinstance(privacy, Gaussian)
    total = enforced_mu(privacy.epsilon, privacy.delta)
    changed: dict[str, object] = {}
    for name in ("activations", "generation", "gradients", "updates"):
        channel = getattr(privacy, name)
        releases = 1 if channel is None else channel.releases
        while releases > 1 and not trials_for(total * math.sqrt(channel.share / releases), most)[1]:
            releases = (releases + 1) // 2
        if channel is not None and releases < channel.releases:
            changed[name] = channel.model_copy(update={"releases": releases})
    return policy.model_copy(update={"privacy": privacy.model_copy(update=changed)}) if changed else policy


def directions(claim: Claim) -> tuple[Floats, Floats]:
    """Two unit tensors (T,D) along which neighbours differ most: one coordinate a row, and all of them."""
    rows, width = (claim.rows, 3) if claim.per_row else (2, 3)
    coordinate, dense = np.zeros((rows, width)), np.random.default_rng(5).standard_normal((rows, width))
    if claim.per_row:  # Each row is clipped, and moves by 2C.
        coordinate[:, 1] = 1 / math.sqrt(rows)
        dense /= np.linalg.norm(dense, axis=1, keepdims=True) * math.sqrt(rows)
    else:
        coordinate[1, 1] = 1.0
        dense /= np.linalg.norm(dense)
    return coordinate, dense


def audit_channels(
    policy: Policy,
    bench_of: Callable[[Policy], Bench],
    *,
    most: int,
    error: float,
    only: Collection[str] | None = None,
) -> tuple[ChannelVerdict, ...]:
    """Test every channel of a private policy.

    Args:
        policy: audited.
        bench_of: opens a fresh bench for a policy.
        most: trials in one world and direction, at most.
        error: probability that a right claim is called wrong, all channels and directions together.
        only: these channels; all that the policy has, when absent.
    """
    privacy = policy.privacy
    assert isinstance(privacy, Gaussian)
    stated, policy = {c.at: c.releases for c in claims_of(policy)}, measurable(policy, most)
    claims = claims_of(policy)
    each = error / (2 * len(claims) + (privacy.labels is not None))
    bench = bench_of(policy)
    try:
        verdicts = [
            _channel(bench, claim, stated[claim.at], most, each) for claim in claims if only is None or claim.at in only
        ]
        if privacy.labels is not None and (only is None or "labels" in only):
            verdicts.append(_labels(bench, privacy, most, each))
    finally:
        bench.close()
    return tuple(verdicts)


def _channel(bench: Bench, claim: Claim, policy_releases: int, most: int, error: float) -> ChannelVerdict:
    trials, decided = trials_for(claim.mu, most)
    observe = _rows if claim.at in ROWS else _sums
    bounds = []
    for direction in directions(claim):
        plus, minus = (np.concatenate(list(observe(bench, claim, sign * direction, trials))) for sign in (1, -1))
        hits, alarms = int((plus @ direction.ravel() > 0).sum()), int((minus @ direction.ravel() > 0).sum())
        bounds.append(mu_at_least(hits, alarms, trials, error))
    sound, tight = max(bounds) <= claim.mu, min(bounds) >= TIGHT * claim.mu
    return ChannelVerdict(
        channel=claim.at, claimed_mu=claim.mu, mu_lower=max(bounds), mu_lower_by_direction=tuple(bounds),
        ok=sound and (tight or not decided), decided=decided, trials=trials, releases=claim.releases, policy_releases=policy_releases,
    )  # fmt: skip


def _rows(bench: Bench, claim: Claim, direction: Floats, trials: int) -> Iterator[Floats]:
    """What arrived of every trial, (n, T D) a batch."""
    record = torch.from_numpy(100 * claim.clip * math.sqrt(claim.rows) * direction).float()
    # At least four messages, so that training, evaluation and both sides of the restart have their share.
    batch = max(1, min(BATCH, trials // 4, bench.policy.limits.max_message_bytes // (16 * direction.size)))
    for start in range(0, trials, batch):
        n = min(batch, trials - start)
        if start <= trials // 2 < start + n:
            bench.resume()
        yield bench.send(record.expand(n, *record.shape), at=claim.at, learn=(start // batch) % 2 == 0).reshape(n, -1)


def _sums(bench: Bench, claim: Claim, direction: Floats, trials: int) -> Iterator[Floats]:
    """The same for sums: every record has coordinates of its own in a long vector."""
    size = direction.size
    gradient = torch.from_numpy(100 * claim.clip * direction.ravel())
    for start in range(0, trials, _BLOCK):
        n = min(_BLOCK, trials - start)
        total = bench.summing(n * size)
        for i, name in enumerate(bench.names(n)):
            whole = torch.zeros(n * size, dtype=torch.float64)
            whole[i * size : (i + 1) * size] = gradient
            total.add(whole, name)
        yield bench.send_sum(total)[0].reshape(n, size)
        if start <= trials // 2 < start + n:
            bench.resume()


def label_trials(mu: float, classes: int, most: int) -> tuple[int, bool]:
    """As :func:`trials_for`, for labels: the logarithm of the ratio of two rates p and q has variance (1-p)/np + (1-q)/nq."""

    def epsilon_of(value: float) -> float:
        return math.log(math.erfc(-value / math.sqrt(8)) / math.erfc(value / math.sqrt(8)))

    q = 1 / (math.exp(epsilon_of(mu)) + classes - 1)
    one, other = math.sqrt((1 - math.exp(epsilon_of(mu)) * q) / (math.exp(epsilon_of(mu)) * q)), math.sqrt((1 - q) / q)
    margin = epsilon_of(mu) - epsilon_of(TIGHT * mu)
    wanted = math.ceil(((4.1 * (one + other) + 4 * math.hypot(one, other)) / margin) ** 2 / BATCH) * BATCH
    return min(max(wanted, 2 * BATCH), most), wanted <= most


def _labels(bench: Bench, privacy: Gaussian, most: int, error: float) -> ChannelVerdict:
    """Labels 0 and 1: the answer is 0 or not. Epsilon-DP is bounded by the ratio of the rates, and shown as the mu it implies."""
    assert privacy.labels is not None
    claimed = enforced_mu(privacy.epsilon, privacy.delta) * math.sqrt(privacy.labels.share)
    trials, decided = label_trials(claimed, privacy.labels.classes, most)
    batch = min(BATCH, trials)
    zero, one = (
        sum(int((bench.send_labels(torch.full((batch,), label)) == 0).sum()) for _ in range(trials // batch))
        for label in (0, 1)
    )
    epsilon = pure_epsilon_at_least(zero, one, trials // batch * batch, error)
    bound = pure_mu(epsilon) if epsilon > 0 else 0.0
    return ChannelVerdict(
        channel="labels", claimed_mu=claimed, mu_lower=bound, mu_lower_by_direction=(bound,), decided=decided,
        ok=bound <= claimed and (bound >= TIGHT * claimed or not decided), trials=trials, releases=1, policy_releases=1,
    )  # fmt: skip
