"""How a client asks for what it missed, and how often it gives, against a server and a donor that want to wear it out."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from securesplit.aggregate.handover import Common, Wanted
from securesplit.aggregate.keys import Channel
from securesplit.client import handover
from securesplit.client.handover import HelpsLate, catch_up, take_over
from securesplit.errors import AggregationAborted, ConnectionFailed
from securesplit.policy.schema import Policy
from securesplit.privacy.gate import Gate
from securesplit.protocol.messages import Blob, Handover, Join
from tests.e2e.house import policy_of

LAB_POLICY: Policy = policy_of()
JOB = SimpleNamespace(digest="0" * 64, sums=SimpleNamespace(threshold=3, roster=("alice", "bob", "carol", "dora")))
HELD = Common(3, bytes(32), np.arange(100, dtype=np.float32))


class Line:
    """Stands for a link; what comes over it is up to the test."""

    def __init__(self, name: str, hands=()) -> None:
        self.name, self.job, self.model, self.alive = name, JOB, "1" * 64, True
        self.asked: list[Join] = []
        self.told: list[Handover] = []
        self.sums = self  # The part of a link that a secure sum speaks over.
        self.reconnects = 0
        self.hands = list(hands)
        self.drops = False

    def late(self, join: Join) -> bool:
        self.asked.append(join)
        if self.drops:
            raise ConnectionFailed("SS-3020", "gone")
        return True

    def handed(self, *, within: float) -> Handover:
        if self.hands:
            return self.hands.pop(0)
        time.sleep(within)
        raise ConnectionFailed("SS-3021", "silent")

    def tell(self, message: Handover) -> None:
        self.told.append(message)

    def reconnect(self, lost: ConnectionFailed, *, within: float) -> None:
        self.reconnects += 1

    def caught_up(self) -> None: ...


def asks(house, line: Line, within: float) -> Common | None:
    client = SimpleNamespace(link=line, job=JOB)
    return catch_up(client, house.folder(line.name), 1, progress=lambda _what: None, within=within)


def test_a_server_that_lets_it_in_and_drops_it_is_not_asked_without_a_break(house):
    line = Line("bob")
    line.drops = True
    with pytest.raises(ConnectionFailed):
        asks(house, line, within=1.0)
    assert 2 <= len(line.asked) < 12


def test_it_asks_anew_when_nothing_comes_of_it_so_that_another_gives(house, monkeypatch):
    monkeypatch.setattr(handover, "_ANEW", 0.05)
    line = Line("bob")
    with pytest.raises(AggregationAborted) as caught:
        asks(house, line, within=0.5)
    assert caught.value.code == "SS-6036"
    assert 2 <= len(line.asked) <= 5, "each time after twice as long"
    assert len({join.key for join in line.asked}) == len(line.asked)


def test_what_is_no_answer_is_not_counted_for_people_either(house):
    box = Blob(dtype="u8", shape=(40,), data=bytes(40))
    noise = [
        Handover(to="bob", of=name, asked=bytes(32), key=b"\x09" * 32, box=box) for name in ("alice", "carol", "eve")
    ]
    line = Line("bob", noise)
    with pytest.raises(AggregationAborted) as caught:
        asks(house, line, within=0.1)
    assert "0 of 2 others" in str(caught.value)
    assert "alice, carol" in str(caught.value)
    assert "eve" not in str(caught.value), "a name that the server made up"


def test_a_server_that_goes_on_sending_noise_does_not_hold_it_for_longer(house):
    box = Blob(dtype="u8", shape=(40,), data=bytes(40))
    noise = Handover(to="bob", of="alice", asked=bytes(32), key=b"\x09" * 32, box=box)
    line = Line("bob")

    def handed(*, within: float) -> Handover:
        time.sleep(0.01)
        return noise

    line.handed = handed
    began = time.monotonic()
    with pytest.raises(AggregationAborted) as caught:
        asks(house, line, within=0.3)
    assert caught.value.code == "SS-6036"
    assert time.monotonic() - began < 5


def test_digests_are_given_as_often_as_asked_and_values_so_often_only(house):
    line = Line("alice")
    gate = Gate(LAB_POLICY, None)
    client = SimpleNamespace(link=line, job=JOB, gate=gate)
    helps = HelpsLate(client, house.folder("alice"))
    helps.settle(HELD)
    bob = house.folder("bob")

    def ask(seed: int, *, whole: bool) -> int:
        channel = Channel(bytes([seed]) * 32)
        wanted = Wanted(JOB.digest, line.model, 1, "bob", channel.public)
        helps.asked(
            Join(round=1, name="bob", certificate=bob.cert_der, key=channel.public, signature=bob.sign(wanted.statement), whole=whole)
        )  # fmt: skip
        return len(line.told[-1].box.data)

    digests = [ask(10 + i, whole=False) for i in range(6)]
    values = [ask(20 + i, whole=True) for i in range(6)]
    assert min(values[:4]) > max(digests) + 300
    assert max(values[4:]) <= max(digests) + 8  # Signatures are not equally long.


def test_who_asked_meanwhile_does_no_harm_where_the_session_is_over(house):
    line = Line("alice")
    helps = HelpsLate(SimpleNamespace(link=line, job=JOB, gate=Gate(LAB_POLICY, None)), house.folder("alice"))
    helps.settle(HELD)
    bob, channel = house.folder("bob"), Channel(bytes([9]) * 32)
    statement = Wanted(JOB.digest, line.model, 1, "bob", channel.public).statement
    join = Join(round=1, name="bob", certificate=bob.cert_der, key=channel.public, signature=bob.sign(statement))

    def tell(message: Handover) -> None:
        assert line.alive, "SS-4101: what a session that is over does, in the place of the code that ended it"
        line.told.append(message)

    line.tell = tell
    helps.waits()
    helps.asked(join)
    line.alive = False  # The server has ended it, as by SS-6013, and the round is tried again.
    helps.goes_on()
    line.alive = True
    helps.asked(join)
    assert len(line.told) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"certificate": b"x"}, {"signature": bytes(8)}, {"key": bytes(32)}, {"key": b"\x09" * 32}, {"round": 2}, {"name": "carol"},
        {"name": "eve"}, {"round": 4},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_is_given_to_who_did_not_sign_for_it(house, changed):
    line = Line("alice")
    helps = HelpsLate(SimpleNamespace(link=line, job=JOB, gate=Gate(LAB_POLICY, None)), house.folder("alice"))
    helps.settle(HELD)
    bob, channel = house.folder("bob"), Channel(bytes([9]) * 32)
    statement = Wanted(JOB.digest, line.model, 1, "bob", channel.public).statement
    join = Join(
        round=1, name="bob", certificate=bob.cert_der, key=channel.public, signature=bob.sign(statement), whole=True
    )
    helps.asked(join.model_copy(update=changed))
    assert line.told == []


@pytest.mark.parametrize(
    "common",
    [
        Common(3, b"", np.zeros(5, dtype=np.float32)), Common(3, b"", np.full(4, np.nan, dtype=np.float32)),
        Common(9, b"", np.zeros(4, dtype=np.float32)), Common((1 << 31) - 1, b"", np.zeros(4, dtype=np.float32)),
    ],
    ids=["length", "nan", "round", "far"],
)  # fmt: skip
def test_what_is_none_of_the_job_is_not_taken_over(monkeypatch, common):
    monkeypatch.setattr(handover, "_common_factor", lambda _client: None)
    written = []
    job = SimpleNamespace(schedule=SimpleNamespace(rounds=8))
    gate = SimpleNamespace(received=lambda: None)
    held = np.zeros(4, dtype=np.float32)
    client = SimpleNamespace(
        job=job, gate=gate, read=lambda _factor: held, write=lambda *values: written.append(values)
    )
    with pytest.raises(AggregationAborted) as caught:
        take_over(client, common)
    assert caught.value.code == "SS-6037"
    assert written == []
    take_over(client, Common(8, b"", held))
    assert len(written) == 1
