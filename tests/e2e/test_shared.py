"""Noise shared by the clients of a secure sum, over TLS: what is in the ring, what is charged, which jobs are refused."""

from __future__ import annotations

import numpy as np

from securesplit.admit import noise_breaches
from securesplit.policy.load import parse_policy
from securesplit.privacy.lattice import SIGMA, step_for
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.plan import plan_for, rows_moved
from tests.e2e.house import CLIENTS, ROUND, policy_of, policy_text
from tests.e2e.test_rounds import alike, sums_are_exact, train_all

SHARED = ROUND.replace("clip = 0.05", "clip = 0.05\nhonest = 2").replace("1000.0", "1.0")  # Little beside the noise.


def test_a_job_with_fewer_honest_clients_or_a_narrow_ring_is_refused(house):
    policy, job = policy_of(SHARED), house.job()
    assert noise_breaches(policy, job) == ()
    assert noise_breaches(policy_of(ROUND), job) == ()
    four = policy_text(SHARED).replace("min_clients = 3", "min_clients = 4").replace("honest = 2", "honest = 3")
    five = {"roster": (*CLIENTS, "dan", "eve"), "threshold": 4, "min_clients": 4}
    for colluders, left in ((0, 3), (1, 3), (2, 2)):
        sums = job.sums.model_copy(update={**five, "colluders": colluders})
        found = noise_breaches(parse_policy(four), job.model_copy(update={"sums": sums}))
        assert bool(found) == (left < 3), "one client is counted as a colluder in any case"
        assert not found or "2 honest" in found[0]
    many = job.sums.model_copy(
        update={"roster": tuple(f"c{i:03d}" for i in range(200)), "threshold": 150, "min_clients": 100}
    )
    (sentence,) = noise_breaches(policy, job.model_copy(update={"sums": many}))
    assert "ring_bits = 64" in sentence
    wide = job.model_copy(update={"sums": many.model_copy(update={"ring_bits": 64})})
    assert noise_breaches(policy, wide) == ()


def test_the_ring_sum_is_the_lattices_and_carries_the_noise_of_all_three_together(house):
    policy = policy_of(SHARED)
    core = house.core(house.job(rounds=2, epochs=1), policy)
    outcome = train_all(house, core, policy)
    assert outcome.errors == {}
    sums_are_exact(house, 2)
    alike(house)
    plan = plan_for(policy.privacy, rows=rows_moved(1, policy.limits.buckets)).update
    words = np.load(house.root / "alice" / "round-0.npz")["ring_sum"]
    assert words[-1] == 3, "every update counts once"
    steps = words[:-1].view(np.int32).astype(np.float64)
    # Gradients of few records are small beside noise of three parts; the sum's deviation is sqrt(3) parts.
    assert abs(steps.std() / (SIGMA * np.sqrt(3)) - 1) < 4 / np.sqrt(2 * steps.size) + 0.05
    assert steps.std() * step_for(plan.part) > 0.9 * plan.sigma
    for name in CLIENTS:
        assert outcome.records[name].epsilon <= 1.0
        ledger = Ledger(house.keys / name / "ledger")
        entries = [e for e in ledger.entries() if e.channel == "update"]
        ledger.close()
        assert {e.units for e in entries} == {plan.units}
