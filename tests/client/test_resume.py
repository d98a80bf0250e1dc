"""A run that is killed again and again ends as one that was never touched: adapters to the bit, each release paid once.

The oracle is the run without a crash, and for the ledger what reached the server.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from securesplit.privacy import mechanism
from securesplit.privacy.ledger import Ledger
from tests.client.test_regimes import STEP, with_releases
from tests.e2e.house import FROZEN, LAB, ROUND, policy_of, sentences
from tests.e2e.wreck import Wreck, dangerous

TEXTS = sentences(6, seed=5)
PRIVATE = {
    "frozen": FROZEN,
    "round": with_releases(ROUND, 9, 9, 9),
    "step": with_releases(STEP, 9, 9, 9),
}


@pytest.fixture
def wrecks(house, tmp_path, monkeypatch):
    """Makes runs, with a moment before and after everything that lasts."""
    made: list[Wreck] = []

    def make(policy, crashes=lambda _n: False, **options):
        job = house.job(rounds=2, epochs=options.pop("epochs", 1), blind=not policy.unsafe)
        made.append(Wreck.__new__(Wreck))
        made[-1].moments, made[-1].crashes = 0, crashes
        made[-1].__init__(house, job, policy, TEXTS, tmp_path / f"run{len(made)}", crashes, **options)
        return made[-1]

    with dangerous(monkeypatch, lambda: made[-1]):
        yield make
    for wreck in made:
        wreck._kept.close()


def quiet(monkeypatch):
    """Noise that depends on nothing but what it covers, so that two runs can be compared."""

    def like(rows):
        seed = int.from_bytes(hashlib.sha256(rows.numpy().tobytes()).digest()[:7], "little")
        return torch.randint(-50, 51, rows.shape, generator=torch.Generator().manual_seed(seed), dtype=rows.dtype)

    monkeypatch.setattr(mechanism, "discrete_gaussian_like", like)
    monkeypatch.setattr(
        "securesplit.privacy.gate.discrete_gaussian", lambda shape: np.arange(np.prod(shape)).reshape(shape) % 17
    )


def outcome(wreck):
    trained, _ = wreck.run()
    return wreck.adapters(), trained.curve, [r.losses for r in trained.rounds], trained.steps


@pytest.mark.parametrize("offset", range(5))
def test_a_run_that_dies_all_the_time_ends_as_one_that_does_not(wrecks, offset):
    policy = policy_of(LAB)
    calm = wrecks(policy, epochs=2)
    expected = outcome(calm)
    wreck = wrecks(policy, lambda n: n % 23 == offset * 4 + 3, epochs=2)
    assert outcome(wreck) == expected
    assert wreck.deaths + wreck.server_deaths > 8
    assert wreck.deaths > 2
    assert wreck.server_deaths > 2
    assert all(len(payloads) == 1 for payloads in wreck.releases().values()), "a step number had two contents"
    assert wreck.releases() == calm.releases()
    assert wreck.core.steps.taken == calm.core.steps.taken, "a step was learnt twice"
