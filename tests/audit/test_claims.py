"""What the auditor takes for the claim, computed from the policy's text: units, shares, directions, and how many trials."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from securesplit.admit import admit
from securesplit.audit.bench import claims_of
from securesplit.audit.bounds import mu_at_least, pure_epsilon_at_least
from securesplit.audit.builtin import builtin_policy
from securesplit.audit.cohort import job_for
from securesplit.audit.distribution import clipped
from securesplit.audit.twopoint import TIGHT, directions, label_trials, measurable, trials_for
from securesplit.policy.load import load_policy
from securesplit.privacy.calibrate import pure_mu
from securesplit.privacy.plan import enforced_mu, plan_for, rows_moved


def varied(**privacy):
    policy = builtin_policy()
    return policy.model_copy(update={"privacy": policy.privacy.model_copy(update=privacy)})


@pytest.mark.parametrize("unit", ["sequence", "user", "token"])
def test_claims_agree_with_the_plan_though_they_share_no_code(unit):
    policy = varied(unit=unit)
    rows = rows_moved(job_for(policy).cut.front, policy.limits.buckets)
    plan = plan_for(policy.privacy, rows=rows)
    for claim in claims_of(policy):
        channel = plan.channel(claim.at)
        assert claim.mu == pytest.approx(channel.mu, rel=1e-9)
        assert claim.sigma == pytest.approx(channel.sigma, rel=1e-9)
        assert claim.per_row == channel.per_row


def test_every_shipped_private_policy_admits_the_audits_job():
    for name in ("balanced", "strict"):
        policy = load_policy(f"policies/{name}.toml")
        admit(policy, job_for(policy), peer="server")


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_the_worlds_are_as_far_apart_as_the_claim_allows_and_not_farther(unit):
    for claim in claims_of(varied(unit=unit)):
        for direction in directions(claim):
            assert np.linalg.norm(direction) == pytest.approx(1)
            world = 100 * claim.clip * math.sqrt(claim.rows) * direction
            apart = np.linalg.norm(clipped(world[None], claim) - clipped(-world[None], claim))
            assert apart == pytest.approx(claim.distance, rel=1e-9)


def test_so_many_trials_tell_a_right_claim_from_wrong_ones():
    rng = np.random.default_rng(2)
    for mu in (0.4, 0.7, 1.5, 2.5):
        n, decided = trials_for(mu, 50_000)
        assert decided
        for true, verdict in ((mu, "ok"), (math.sqrt(2) * mu, "false"), (0.5 * mu, "dear")):
            p = stats.norm.cdf(true / 2)
            for _ in range(4):
                bound = mu_at_least(int(rng.binomial(n, p)), int(rng.binomial(n, 1 - p)), n, 1e-4)
                found = "false" if bound > mu else "dear" if bound < TIGHT * mu else "ok"
                assert found == verdict, (mu, n, true, bound)


def test_channels_of_many_small_releases_are_divided_over_fewer():
    policy = load_policy("policies/balanced.toml")
    small = measurable(policy, 20_000)
    assert small.privacy.generation.releases < policy.privacy.generation.releases
    assert small.privacy.activations == policy.privacy.activations
    decode = next(c for c in claims_of(small) if c.at == "decode")
    assert trials_for(decode.mu, 20_000)[1]
    total = enforced_mu(policy.privacy.epsilon, policy.privacy.delta)
    assert decode.mu == pytest.approx(total * math.sqrt(0.4 / small.privacy.generation.releases))
    assert measurable(builtin_policy(), 20_000) == builtin_policy()


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_so_many_labels_tell_too(classes):
    rng, mu = np.random.default_rng(4), 1.5
    n, decided = label_trials(mu, classes, 500_000)
    assert decided
    assert not label_trials(mu, classes, 100)[1]
    epsilon = math.log(stats.norm.cdf(mu / 2) / stats.norm.cdf(-mu / 2))
    for factor, right in ((1.0, True), (0.5, False)):
        odds = math.exp(factor * epsilon)
        kept, other = odds / (odds + classes - 1), 1 / (odds + classes - 1)
        for _ in range(4):
            found = pure_epsilon_at_least(int(rng.binomial(n, kept)), int(rng.binomial(n, other)), n, 1e-4)
            assert found <= factor * epsilon
            assert (found > 0 and pure_mu(found) >= TIGHT * mu) == right
