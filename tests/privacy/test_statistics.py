"""A joint statistic of text and label on the production path: one charge for both, the stated noise, no second chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from securesplit.errors import BudgetExhausted
from securesplit.model.moments import joint_statistic, sum_moments
from securesplit.privacy.gate import Gate
from securesplit.privacy.plan import enforced_epsilon, enforced_mu
from tests.privacy.released import values

ALL_OF_IT = {"activations": (1.0, 1.0, 1)}


def statistics(count: int, label: float = 1.0) -> torch.Tensor:
    codes = torch.randn(count, 7, generator=torch.Generator().manual_seed(1))
    codes /= torch.linalg.vector_norm(codes, dim=1, keepdim=True)
    return joint_statistic(codes, torch.full((count, 1), label))


def test_one_release_spends_the_budget_and_nothing_more_is_left(policy_of, ledger):
    gate = Gate(policy_of(8.0, **ALL_OF_IT), ledger)
    gate.release(statistics(1), at="cut", records=["a"], contents=["text and label"])
    assert gate.plan is not None
    mu = (gate.plan.budget / (1 << 40)) ** 0.5
    assert mu == pytest.approx(enforced_mu(8.0, 1e-5), rel=1e-6)
    assert 7.99 < enforced_epsilon(mu, 1e-5) <= 8.0
    with pytest.raises(BudgetExhausted):  # The same text under another label is another statistic.
        gate.release(statistics(1, -1.0), at="cut", records=["a"], contents=["text and other label"])


def test_the_noise_in_a_sum_is_what_the_moments_say(policy_of, ledger):
    gate = Gate(policy_of(8.0, **ALL_OF_IT), ledger)
    count, sigma = 64, 2 / enforced_mu(8.0, 1e-5)
    clean = statistics(count)
    sent = gate.release(clean, at="cut", records=[f"r{i}" for i in range(count)])
    released = torch.from_numpy(np.asarray(values(sent), dtype=np.float64)).reshape(count, 1, 7)
    noise = (released - clean).flatten().numpy()
    assert stats.kstest(noise / sigma, "norm").pvalue > 1e-6
    moments, own = sum_moments(released, 1, sigma), sum_moments(released[:10], 1, sigma)
    assert moments.noise == pytest.approx(count * sigma**2)
    torch.testing.assert_close(moments.without(own).total, released[10:].sum((0, 1))[:, None])
