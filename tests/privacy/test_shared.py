"""Noise that the clients of a secure sum share: what each adds, what it is charged, and what the sum carries."""

from __future__ import annotations

import math
import tomllib

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from securesplit.errors import BudgetExhausted, PolicyDenied
from securesplit.policy.load import parse_policy
from securesplit.policy.schema import Policy
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.gate import Gate
from securesplit.privacy.lattice import SIGMA, VARIANCE, step_for
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.plan import plan_for
from tests.e2e.house import FROZEN, ROUND, policy_of, policy_text

SHARED = ROUND.replace("clip = 0.05", "clip = 0.05\nhonest = 2")
DIM = 20_000


def gate_of(tmp_path, policy, ring=1 << 29) -> Gate:
    return Gate(policy, Ledger(tmp_path / "ledger", anchors=tmp_path / "anchors"), ring=ring)


def summed(gate, rows) -> ClippedSum:
    plan = gate.plan.update
    total = ClippedSum(DIM, plan.clip, step_for(plan.part))
    for number, row in enumerate(rows):
        total.add(row, gate._purse.ledger.key(f"record {number}".encode()))
    return total


def test_without_the_key_a_policy_is_what_it_was_before_there_was_one():
    plain, shared = policy_of(ROUND), policy_of(SHARED)
    assert b"honest" not in plain.canonical()
    assert b'"honest":2' in shared.canonical()
    assert plain.digest != shared.digest
    assert parse_policy(policy_text(SHARED)) == Policy.model_validate(tomllib.loads(policy_text(SHARED)))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (policy_text(SHARED).replace("honest = 2", "honest = 3"), "min_clients"),
        (policy_text(SHARED).replace("honest = 2", "honest = 1"), "honest"),
        (policy_text(SHARED.replace('"round"', '"step"')), "noise of one's own"),
    ],
)
def test_what_cannot_be_counted_on_is_refused(text, word):
    with pytest.raises(ValidationError) as error:
        Policy.model_validate(tomllib.loads(text))
    assert word in str(error.value)


@pytest.mark.parametrize("honest", [2, 3, 17, 256])
def test_the_parts_of_the_honest_have_the_whole_variance(honest):
    privacy = policy_of(SHARED).privacy
    plan = plan_for(
        privacy.model_copy(update={"updates": privacy.updates.model_copy(update={"honest": honest})})
    ).update
    own = plan_for(policy_of(ROUND).privacy).update
    assert (plan.sigma, plan.units, plan.sensitivity) == (own.sigma, own.units, own.sensitivity)
    assert own.part == own.sigma
    whole = honest * plan.part**2
    assert plan.sigma**2 <= whole <= plan.sigma**2 * (1 + 1e-14)
    # On the lattice, exactly: h draws of VARIANCE steps^2, each step at least part / SIGMA.
    assert honest * VARIANCE * step_for(plan.part) ** 2 >= plan.sigma**2


def test_a_part_is_made_of_ring_steps_and_charged_as_the_whole(tmp_path):
    gate = gate_of(tmp_path, policy_of(SHARED))
    plan = gate.plan.update
    rows = [torch.full((DIM,), 1e-5 * (i + 1)) for i in range(2)]
    released = gate.release_update(total := summed(gate, rows))
    assert (released.honest, released.step, released.noised) == (2, step_for(plan.part), True)
    steps = released.vector / released.step
    assert np.abs(steps - np.round(steps)).max() < 1e-6
    noise = np.round(steps) - total.steps
    # 20000 draws: the standard error of the deviation is 0.5 %.
    assert abs(noise.std() / SIGMA - 1) < 0.025
    assert abs(noise.mean()) < 5 * SIGMA / math.sqrt(DIM)
    entries = [e for e in gate._purse.ledger.entries() if e.channel == "update"]
    assert {e.units for e in entries} == {plan.units}, "as dear as if all of the noise were one's own"
    assert len(entries) == 2


def test_two_parts_make_the_noise_that_is_claimed(tmp_path):
    vectors = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        gate = gate_of(tmp_path / str(number), policy_of(SHARED))
        vectors.append(gate.release_update(summed(gate, [torch.zeros(DIM)])).vector)
    sigma = gate.plan.update.sigma
    assert abs(sum(vectors).std() / sigma - 1) < 0.025
    assert abs(vectors[0].std() / sigma - 1 / math.sqrt(2)) < 0.02


def test_every_sum_is_drawn_and_paid_anew_until_the_policy_says_stop(tmp_path):
    gate = gate_of(tmp_path, policy_of(SHARED))
    rows = [torch.full((DIM,), 1e-5)] * 2
    vectors = [gate.release_update(summed(gate, rows)).vector for _ in range(gate.plan.update.releases)]
    entries = [e for e in gate._purse.ledger.entries() if e.channel == "update"]
    assert len(entries) == 2 * len(vectors) == 4
    assert not np.array_equal(vectors[0], vectors[1])
    spent = gate._purse.ledger.mu()
    assert spent**2 == pytest.approx(len(vectors) * gate.plan.update.units / 2**40)
    with pytest.raises(BudgetExhausted, match="SS-5002"):
        gate.release_update(summed(gate, rows))
    assert gate._purse.ledger.mu() == spent
    assert sum(f.stat().st_size for f in (tmp_path / "ledger").rglob("*") if f.is_file()) < 1 << 20, "no vector is kept"


def test_what_would_stick_out_of_the_ring_is_brought_into_it_before_its_noise(tmp_path):
    """A coordinate that sticks out would be clipped with its noise, and the others count on that noise."""
    ring = 1 << 25
    gate = gate_of(tmp_path, policy_of(SHARED), ring=ring)
    total = summed(gate, [torch.zeros(DIM)])
    total.steps[: DIM // 2] = 1 << 40  # As the aligned gradients of very many records would make it.
    total.steps[0] = -(1 << 40)
    released = gate.release_update(total)
    steps = np.round(released.vector / released.step)
    assert np.abs(steps).max() < ring
    most = ring - 12 * SIGMA
    assert abs((steps[1 : DIM // 2] - most).std() / SIGMA - 1) < 0.04, "its noise is whole"
    assert abs(steps[1 : DIM // 2].mean() - most) < 5 * SIGMA / math.sqrt(DIM / 2)
    assert abs(steps[0] + most) < 7 * SIGMA


def test_without_a_ring_nothing_is_shared(tmp_path):
    gate = gate_of(tmp_path, policy_of(SHARED), ring=0)
    with pytest.raises(PolicyDenied, match="SS-2010"):
        gate.release_update(summed(gate, [torch.zeros(DIM)]))
    assert gate._purse.ledger.summary() == ()


def test_a_sum_made_for_own_noise_is_refused(tmp_path):
    gate = gate_of(tmp_path, policy_of(SHARED))
    total = ClippedSum(4, gate.plan.update.clip, step_for(gate.plan.update.sigma))
    with pytest.raises(Exception, match="SS-2010"):
        gate.release_update(total)


def test_a_whole_update_of_a_frozen_site_shares_its_noise_too(tmp_path):
    frozen = FROZEN + "[privacy.updates]\nclip = 0.5\nshare = 0.0\nreleases = 2\nhonest = 2\n"
    policy = policy_of(frozen.replace("share = 0.0", "share = 0.1").replace("share = 0.6", "share = 0.5"))
    released = gate_of(tmp_path, policy).release_update(np.full(64, 1e-3))
    assert (released.honest, released.step > 0) == (2, True)


@pytest.mark.parametrize(("one", "other"), [(1.0, 1.0), (1.2, 1.0), (1.5, 1.5), (2.0, 1.0)])
def test_a_sum_of_discrete_gaussians_is_one_up_to_the_factor_that_is_claimed(one, other):
    """The oracle sums the probabilities themselves, at widths so small that doubles show the difference."""
    support = np.arange(-60, 61)
    first, second = (np.exp(-(support**2) / (2 * s * s)) for s in (one, other))
    joined = np.convolve(first / first.sum(), second / second.sum())
    wide = np.arange(-120, 121)
    whole = np.exp(-(wide**2) / (2 * (one**2 + other**2)))
    middle = np.abs(wide) <= 6  # Where doubles still hold the digits.
    ratio = joined[middle] / (whole[middle] / whole.sum())
    bound = 2.1 * math.exp(-2 * math.pi**2 / (one**-2 + other**-2))
    assert np.abs(ratio - 1).max() <= 2 * bound + 1e-12, "each of the two laws' own sums may be off by as much"
    assert np.abs(ratio - 1).max() > bound / 100 or bound < 1e-12, "the bound says something"
