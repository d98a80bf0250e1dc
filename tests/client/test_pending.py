"""A round on disk: what is read is what was written, byte for byte, and only what this site's gate released."""

from __future__ import annotations

import stat

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from securesplit.client.pending import read_pending, write_pending
from securesplit.client.rounds import Brought, Kept
from securesplit.errors import AggregationAborted, PolicyDenied
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.gate import Gate
from securesplit.privacy.lattice import step_for
from securesplit.privacy.ledger import Ledger
from tests.e2e.house import ROUND, policy_of

LAB = policy_of()
KEPT = Kept(bytes(range(16)), ("alice", "bob", "carol"), bytes(32))


def brought(update, number=3):
    return Brought(None, LAB, update, 17, number, "f" * 64, None, b"origin", b"alike" * 4)


def again(path, gate):
    return read_pending(path, gate, folder=None, policy=LAB, answers=None, records=None)


def plain():
    return Gate(LAB, None).release_update(np.array([0.5, -0.25, 1e-300, -0.0]))


@pytest.mark.parametrize("kept", [None, KEPT])
def test_what_is_read_is_what_was_written(tmp_path, kept):
    gate, path = Gate(LAB, None), tmp_path / "round"
    assert again(path, gate) is None
    write_pending(path, gate, brought(plain()), kept)
    found = again(path, gate)
    assert found.kept == kept
    assert found.brought.update.vector.tobytes() == plain().vector.tobytes()
    for name in ("weight", "number", "frozen", "origin", "alike"):
        assert getattr(found.brought, name) == getattr(brought(plain()), name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_noised_update_comes_back_without_a_second_draw_or_charge(tmp_path):
    policy, path = policy_of(ROUND), tmp_path / "round"
    ledger = Ledger(tmp_path / "ledger")
    gate = Gate(policy, ledger)
    total = ClippedSum(3, gate.plan.update.clip, step_for(gate.plan.update.part))
    total.add(torch.tensor([0.01, 0.0, -0.01], dtype=torch.float64), ledger.key(b"r"))
    update = gate.release_update(total)
    write_pending(path, gate, brought(update))
    entries = list(ledger.entries())
    ledger.close()

    ledger = Ledger(tmp_path / "ledger")
    found = again(path, Gate(policy, ledger))
    assert np.array_equal(found.brought.update.vector, update.vector)
    assert (found.brought.update.noised, found.brought.update.honest) == (True, 1)
    assert list(ledger.entries()) == entries
    other = policy_of(ROUND, max_sequences=7)
    with pytest.raises(PolicyDenied, match="SS-2011"):
        again(path, Gate(other, ledger))
    ledger.close()
    stranger = Ledger(tmp_path / "elsewhere")
    with pytest.raises(PolicyDenied, match="SS-2011"):
        again(path, Gate(policy, stranger))
    stranger.close()


@pytest.mark.parametrize(
    ("field", "value"), [("vector", bytes(24)), ("noised", True), ("honest", 2), ("step", 0.5), ("receipt", "0" * 64)]
)
def test_what_was_changed_on_disk_is_not_taken_for_released(tmp_path, field, value):
    gate, path = Gate(LAB, None), tmp_path / "round"
    write_pending(path, gate, brought(plain()))
    fields = msgpack.unpackb(path.read_bytes())
    path.write_bytes(msgpack.packb({**fields, field: value}))
    with pytest.raises(PolicyDenied, match="SS-2011"):
        again(path, gate)


@given(st.binary(max_size=60))
def test_garbage_is_refused_by_its_code(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("pending") / "round"
    path.write_bytes(data)
    with pytest.raises(AggregationAborted, match="SS-6035"):
        again(path, Gate(LAB, None))


def test_zeros_of_one_that_does_not_learn_enter_any_sums():
    """In mode sequential they are the same in every round; pinned by their bytes, no client could ever leave or come back."""
    from dataclasses import replace

    nothing = Gate(LAB, None).release_update(np.zeros(4))
    idle = replace(brought(nothing), origin=b"")
    assert idle.idle
    assert idle.pinned(tried_again=True) == idle.pinned(tried_again=False) == b""
    # Zeros of one that learns are not public, and an update is never idle for want of a name.
    assert not brought(nothing).idle
    assert brought(nothing).pinned(tried_again=True) == b"origin"
    assert not replace(brought(plain()), origin=b"").idle
