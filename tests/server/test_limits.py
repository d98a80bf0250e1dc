"""Quotas, room before a session is open, and the queue of learning steps: what a hostile client cannot have."""

from __future__ import annotations

import pytest

from securesplit.errors import ConnectionFailed, RemoteProtocolError, SecureSplitError
from securesplit.protocol.codec import Caps, encode
from securesplit.protocol.messages import Backward, Blob, Bye, Confirm, Failure, Forward, Hello, Secagg
from securesplit.protocol.session import Party, Session
from securesplit.server.attendance import Attendance
from securesplit.server.course import Ask, Pass
from securesplit.server.lanes import Lanes
from securesplit.server.quotas import Quotas
from securesplit.transport.limits import ClientLimits, Handshakes, Limits
from securesplit.transport.memory import MemoryServer
from tests.e2e.house import policy_of

POLICY = policy_of()
ROWS = Blob(dtype="f32", shape=(4, 32), data=bytes(512))
PARTY = Party(b"", b"", lambda _data: bytes(64), lambda *_: None)


def forward(step: int = 0, **changes) -> Forward:
    return Forward(**{"step": step, "lengths": (4,), "learn": True, "hidden": ROWS, **changes})


def test_quotas_count_by_client_and_name_what_is_used_up():
    quotas = Quotas(Limits(clients=ClientLimits(steps=2), client={"bob": ClientLimits(tokens=9, bytes=1000)}))
    for _ in range(2):
        quotas.charge("alice", 0, forward())
    with pytest.raises(SecureSplitError, match="quota of 2 steps") as caught:
        quotas.charge("alice", 0, forward())
    assert (caught.value.code, caught.value.exit_code, caught.value.quota, caught.value.limit) == (
        "SS-2040",
        3,
        "steps",
        2,
    )
    quotas.charge("bob", 999, forward())
    quotas.charge("bob", 1)
    with pytest.raises(SecureSplitError, match="1000 bytes"):
        quotas.charge("bob", 1)
    assert (quotas.used("bob").steps, quotas.used("bob").tokens) == (1, 4)
    quotas.charge("carol", 10**12, forward())


def test_a_message_gets_no_room_before_it_is_due():
    session = Session("server", PARTY, Caps(message_bytes=1 << 30))
    small = 1 << 17
    for message in (
        Hello(version=1, nonce=bytes(32), policy="0" * 64),
        forward(),
        Backward(step=0, gradient=ROWS),
        Bye(),
    ):
        assert session.allowance(encode(message)[:8]) == small, "nothing is open yet"
    assert {session.allowance(start) for start in (b"", b"SS", b"SS\x01\xff", bytes(8), b"GET / HT")} == {small}
    little = Session("server", PARTY, Caps(message_bytes=100))
    assert little.allowance(b"") == 100


def test_an_open_session_has_room_for_tensors_alone(house):
    core = house.core(house.job(), POLICY)
    link, _ = house.link(MemoryServer(core), POLICY)
    (number,) = core._connections
    whole, small = POLICY.limits.max_message_bytes, 1 << 17
    vector = Blob(dtype="u32", shape=(0,), data=b"")
    for message in (forward(), Backward(step=0, gradient=ROWS), Secagg(round=0, stage=0, body=b"", vector=vector)):
        assert core.allowance(number, encode(message)[:8]) == whole
    for message in (Bye(), Failure(code="SS-4001"), Confirm(signature=bytes(64))):
        assert core.allowance(number, encode(message)[:8]) == small
    assert core.allowance(99, b"") == 0
    link.close()


def test_one_learning_step_waits_for_its_turn_and_no_second_one():
    """Each waiting step holds a whole batch in memory."""
    names = ("a", "b", "c")
    lanes = Lanes((names,), Attendance(names, 60.0))
    first = Ask(1, "a", forward())
    assert lanes.ask(first, 0.0) == [Pass((first,))]
    assert lanes.ask(second := Ask(2, "b", forward()), 0.0) == []
    with pytest.raises(RemoteProtocolError) as caught:
        lanes.ask(Ask(2, "b", forward(1)), 0.0)
    assert caught.value.code == "SS-4025"
    assert lanes.ask(Ask(3, "c", forward()), 0.0) == []
    assert lanes.done(Ask(1, "a", Backward(step=0, gradient=forward().hidden)), 1.0) == [Pass((second,))]


def test_a_greeting_that_is_not_finished_gives_its_place_back(house):
    core = house.core(house.job(), POLICY, limits=Limits(handshakes=Handshakes(greeting_seconds=5.0)))
    server = MemoryServer(core)
    done, _ = house.link(server, POLICY, "bob")
    _, theirs = house.parties("alice")
    idle = server.connect("alice", theirs)
    server.tick(100.0)
    server.tick(104.0)
    assert not idle.closed
    server.tick(106.0)
    assert idle.closed
    assert idle.receive() == encode(Failure(code="SS-3053"))
    assert core.names == ("bob",)
    server.tick(10_000.0)
    done.close()


def test_strangers_are_not_connected(house):
    core = house.core(house.job(), POLICY, limits=Limits(guests=frozenset({"dave"})))
    core.welcome("alice")
    core.welcome("dave")
    with pytest.raises(ConnectionFailed, match="SS-3214"):
        core.welcome("mallory")
