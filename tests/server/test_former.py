"""States of B's adapters by name: what is kept, for how long, and what a broken disk does."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError
from securesplit.server import former as module
from securesplit.server.former import FormerStates, name_of


def state(value: float):
    return (torch.full((2, 3), float(value)), torch.arange(4.0) + value)


def files(path):
    return sorted(file.stem for file in path.glob("*.safetensors"))


def test_a_name_is_the_digest_of_shapes_and_values():
    wanted = hashlib.sha256(b"securesplit.former.v1|")
    for values in state(1.0):
        wanted.update(json.dumps(list(values.shape)).encode() + b"|" + values.numpy().tobytes())
    assert name_of(state(1.0)) == wanted.digest()
    assert name_of(state(1.0)) != name_of(state(1.5)) != name_of(())
    assert name_of((torch.zeros(6),)) != name_of((torch.zeros(2, 3),))


@pytest.mark.parametrize("durable", [True, False])
@given(steps=st.lists(st.tuples(st.sampled_from(["alice", "bob"]), st.integers(0, 2), st.integers(0, 4)), max_size=12))
@settings(deadline=None, max_examples=15)
def test_slots_hold_the_last_state_and_nothing_else_is_kept(tmp_path_factory, durable, steps):
    path = tmp_path_factory.mktemp("former") / "states" if durable else None
    states, held = FormerStates(path), {}
    for client, slot, value in steps:
        held[client, slot] = states.keep(client, slot, state(value))
    for again in (states, *([FormerStates(path)] if durable else [])):
        for value in range(5):
            found = again.find(name_of(state(value)))
            if name_of(state(value)) in held.values():
                assert all(torch.equal(a, b) for a, b in zip(found, state(value), strict=True))
            else:
                assert found is None
    if durable and steps:
        assert files(path) == sorted({name.hex() for name in held.values()})
    assert not durable or len(states._memory) <= 2, "the rest lies on the disk"


def test_the_end_of_a_sum_is_one_state_for_all_who_share_it_until_the_next(tmp_path):
    states = FormerStates(tmp_path / "f")
    assert states.keep_ended("alice", 1) == b""
    shared, own = state(1), state(2)
    states.ended({"alice": shared, "bob": shared, "carol": own})
    assert files(tmp_path / "f") == sorted([name_of(shared).hex(), name_of(own).hex()])
    states = FormerStates(tmp_path / "f")  # Started again between the sum and the mark.
    assert states.keep_ended("alice", 1) == name_of(shared)
    states.ended({"alice": state(3), "bob": state(3)})
    assert states.keep_ended("carol", 1) == b"", "not the end of an earlier sum"
    assert states.keep_ended("alice", 2) == name_of(state(3))
    assert states.find(name_of(shared)) is not None
    assert states.find(name_of(own)) is None
    assert files(tmp_path / "f") == sorted([name_of(shared).hex(), name_of(state(3)).hex()])


def test_a_disk_that_takes_nothing_leaves_what_was(tmp_path, monkeypatch):
    states = FormerStates(tmp_path / "f")
    first = states.keep("alice", 1, state(1))

    def full(path, data, *, mode):
        raise InputError("SS-1804", "cannot write", hint="Make room.")

    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(OSError, match="SS-1804"):
        states.keep("alice", 1, state(2))
    with pytest.raises(OSError, match="SS-1804"):
        states.ended({"alice": state(3)})
    assert states.find(first) is not None
    assert states.find(name_of(state(2))) is None


def test_what_is_damaged_is_not_there_and_is_written_anew(tmp_path):
    path = tmp_path / "f"
    name = FormerStates(path).keep("alice", 1, state(1))
    (path / ".left.tmp").write_bytes(b"x")
    (path / f"{'0' * 64}.safetensors").write_bytes(b"of nobody")
    file = path / f"{name.hex()}.safetensors"
    whole = file.read_bytes()
    for wrong in (b"", whole[:-1], whole[:-1] + b"\x01"):
        file.write_bytes(wrong)
        states = FormerStates(path)
        assert states.find(name) is None
    assert [entry.name for entry in sorted(path.iterdir())] == [file.name, "index.json"]
    assert states.keep("alice", 2, state(1)) == name
    assert file.read_bytes() == whole
    (path / "index.json").write_text('{"slots": 3}')
    assert FormerStates(path).find(name) is not None, "by its contents it is known all the same"
    (path / "index.json").unlink()
    (path / "index.json").mkdir()
    with pytest.raises(InputError, match="SS-1292"):
        FormerStates(path)


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_a_damaged_index_costs_no_state(tmp_path, cut):
    """Checkpoints name states by their contents; half a line of an index must not delete them all."""
    path = tmp_path / "states"
    states = FormerStates(path)
    names = [states.keep("alice", slot, state(float(slot))) for slot in range(3)]
    (path / "index.json").write_bytes((path / "index.json").read_bytes()[:cut])
    again = FormerStates(path)
    assert all(again.find(name) is not None for name in names)
    fresh = again.keep("alice", 0, state(7.0))
    last = FormerStates(path)
    assert all(last.find(name) is not None for name in (*names, fresh))
