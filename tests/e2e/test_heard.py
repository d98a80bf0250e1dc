"""What a client opened in one blind round is part of what all must hold alike in the next, impossible or not."""

from __future__ import annotations

import numpy as np
import pytest

from securesplit.errors import AggregationAborted
from securesplit.server.sums import Sums
from tests.e2e.house import CLIENTS, FROZEN, policy_of
from tests.e2e.test_rounds import train_all


@pytest.mark.parametrize("added", [1, 1 << 30], ids=["inside its range", "beyond it, for every client that opens it"])
def test_a_sum_that_was_altered_for_one_client_ends_the_next_round_whatever_the_sum_was(house, monkeypatch, added):
    """Otherwise a server would learn from who goes on whether an altered sum was brought into its range: bits of the sum."""
    outbound = Sums._outbound

    def alter(number, delivery):
        vector = delivery.vector
        if number == 0 and vector is not None and vector.size:
            vector = vector.copy()
            # Beyond the range for everybody, and by another amount for one: after clipping all would look alike.
            vector[:-1] += np.uint32(added if delivery.to != "alice" else added + (1 << 20 if added > 1 else 0))
            vector[0] += np.uint32(delivery.to == "alice" and added == 1)
            delivery = delivery._replace(vector=vector)
        return outbound(number, delivery)

    monkeypatch.setattr(Sums, "_outbound", staticmethod(alter))
    policy = policy_of(FROZEN)
    core = house.core(house.job(rounds=2, epochs=1), policy)
    outcome = train_all(house, core, policy)
    assert set(outcome.errors) == set(CLIENTS)
    assert all(isinstance(error, AggregationAborted) for error in outcome.errors.values())
    assert {error.code for error in outcome.errors.values()} <= {"SS-6004", "SS-6010"}
    assert core.sums.finished == 1
