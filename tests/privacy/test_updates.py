"""Updates on their way into a secure sum, and the policy without privacy."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from scipy import stats

from securesplit.errors import CheckFailed, PolicyDenied
from securesplit.privacy.gate import ClippedSum, Gate
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.plan import plan_for
from tests.privacy.released import ROUND, values


@pytest.fixture
def ledger(tmp_path):
    opened = Ledger(tmp_path / "ledger")
    yield opened
    opened.close()


def total_of(gradients, bound=3.0):
    total = ClippedSum(gradients.shape[1], bound)
    for i, gradient in enumerate(gradients):
        total.add(gradient, f"r{i}")
    return total


def test_one_record_moves_a_sum_by_at_most_2c():
    gradients = torch.randn(5, 8) * 100
    one = total_of(gradients).vector
    for other in (-gradients[2], torch.zeros(8), gradients[2] * 1e20):
        replaced = gradients.clone()
        replaced[2] = other
        assert np.linalg.norm(one - total_of(replaced).vector) <= 2 * 3.0 * (1 + 1e-12)
    flipped = gradients.clone()
    flipped[2] *= -1
    assert np.linalg.norm(one - total_of(flipped).vector) == pytest.approx(6.0, rel=1e-5)


def test_a_sum_takes_a_record_once_and_no_nan():
    total = total_of(torch.ones(2, 4))
    with pytest.raises(ValueError, match="once"):
        total.add(torch.ones(4), "r1")
    before = total.vector.copy()
    total.add(torch.tensor([1.0, float("nan"), 0.0, 0.0]), "r9")  # Counts as zero, and pays like the others.
    assert total.vector.tolist() == before.tolist()
    assert total.records == ["r0", "r1", "r9"]


def test_regime_round_noises_a_sum_and_charges_each_record(policy_of, ledger, fixed_noise):
    policy = policy_of(**ROUND)
    gate, plan = Gate(policy, ledger), plan_for(policy.privacy)
    total = total_of(torch.ones(3, 5000))
    released = gate.release_update(total)
    assert released.noised
    assert [s.releases for s in ledger.summary()] == [3]
    assert ledger.mu("r1") == pytest.approx(plan.update.mu)
    residual = (released.vector - total.vector) / plan.update.sigma
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], 5000)
    assert low < np.square(residual).sum() < high


def test_regime_round_refuses_plain_updates_and_looser_clips(policy_of, ledger):
    gate = Gate(policy_of(**ROUND), ledger)
    with pytest.raises(PolicyDenied) as caught:
        gate.release_update(np.ones(4))
    assert caught.value.code == "SS-2011"
    with pytest.raises(PolicyDenied) as caught:
        gate.release_update(total_of(torch.ones(1, 4), bound=3.1))
    assert caught.value.code == "SS-2010"
    assert ledger.summary() == ()


def test_regime_frozen_lets_plain_updates_into_its_blind_sum(policy_of, ledger):
    gate = Gate(policy_of(), ledger)
    released = gate.release_update(np.arange(4.0))
    assert (released.vector.tolist(), released.noised) == ([0.0, 1.0, 2.0, 3.0], False)
    with pytest.raises(PolicyDenied) as caught:
        gate.release_update(total_of(torch.ones(1, 4)))
    assert caught.value.code == "SS-2010"
    assert gate.release_update(np.array([1.0, np.nan])).vector.tolist() == [0.0, 0.0]
    assert ledger.summary() == ()


def test_regime_frozen_without_a_blind_sum_lets_nothing_out(policy_of, ledger):
    policy = policy_of()
    seen = policy.model_copy(update={"aggregation": policy.aggregation.model_copy(update={"blind": False})})
    with pytest.raises(PolicyDenied) as caught:
        Gate(seen, ledger).release_update(np.ones(4))
    assert caught.value.code == "SS-2011"


def test_the_unsafe_policy_says_so_and_sends_exactly_the_tensor(policy_of, caplog):
    with caplog.at_level(logging.WARNING):
        gate = Gate(policy_of(epsilon=None), None)
    assert "UnsafeNoPrivacy" in caplog.text
    hidden = torch.randn(2, 3, 4) * 1e6
    for at in ("cut", "gradient", "decode"):
        assert np.array_equal(values(gate.release(hidden, at=at, records=["a", "a"])), hidden.numpy())
    gate.require(10**9, at="decode")
    assert gate.release_update(np.ones(3)).vector.tolist() == [1.0] * 3
    total = total_of(torch.ones(2, 4))
    released = gate.release_update(total)
    assert not released.noised
    assert np.array_equal(released.vector, total.vector)
    with pytest.raises(CheckFailed) as caught:
        gate.release(torch.full((1, 1, 1), float("inf")), at="cut")
    assert caught.value.code == "SS-1510"


def test_a_gradient_that_overflowed_leaves_as_zero_and_pays(policy_of, ledger, monkeypatch):
    # Stopping would tell the server, whose answer provoked it, for whose record it happened.
    monkeypatch.setattr("securesplit.privacy.gate.gaussian", lambda shape, _sigma: np.zeros(shape))
    gate = Gate(policy_of(**ROUND), ledger)
    rows = torch.ones(2, 2, 4)
    rows[1, 0, 0] = float("nan")
    released = gate.release(rows, at="gradient", records=["a", "b"], memoise=False)
    sent = np.frombuffer(released.payload, dtype="<f4").reshape(released.shape)
    assert np.abs(sent[0]).max() > 0
    assert not sent[1].any()
    assert [(s.channel, s.releases) for s in ledger.summary()] == [("gradient", 2)]
