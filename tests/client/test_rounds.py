"""A client's line to a secure sum when the connection breaks: what is said again, what is passed over, and when it gives up.

The pipe is a script of what arrives; a real server, a real network and real sums are in tests/e2e/test_reconnect.py.
"""

from __future__ import annotations

import time

import pytest

from securesplit.aggregate import wire
from securesplit.client.dial import greet
from securesplit.client.link import Link
from securesplit.client.rounds import RECONNECTS, _Line
from securesplit.errors import ConnectionFailed, PolicyDenied, RemoteProtocolError
from securesplit.protocol.codec import decode, encode
from securesplit.protocol.job import Sums
from securesplit.protocol.messages import Blob, Failure, Message, RoundBegin, RoundReady, Secagg
from securesplit.transport.actions import Core
from securesplit.transport.memory import MemoryServer
from tests.e2e.house import ANY, build_house, policy_of

POLICY = policy_of()
EMPTY = Blob(dtype="u32", shape=(0,), data=b"")
BEGIN = RoundBegin(round=3, run=bytes(16))
ROSTER = Secagg(round=3, stage=wire.ADVERTISE, body=b"roster", vector=EMPTY)
ROUTED = Secagg(round=3, stage=wire.SHARES, body=b"boxes", vector=EMPTY)
MINE = Secagg(round=3, stage=wire.SHARES, body=b"mine", vector=EMPTY)


class Script:
    """A pipe that gives these messages and then breaks; what was sent is kept."""

    def __init__(self, *arriving: Message, deaf: bool = False) -> None:
        self.arriving = list(arriving)
        self.sent: list[Message] = []
        self.deaf, self.closed = deaf, False

    def send(self, data: bytes) -> None:
        if self.deaf:
            raise ConnectionFailed("SS-3020", "the connection was closed")
        self.sent.append(decode(data, ANY))

    def receive(self, timeout: float | None = None) -> bytes:
        del timeout
        if not self.arriving:
            raise ConnectionFailed("SS-3020", "the connection was closed")
        return encode(self.arriving.pop(0))

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("house"))


@pytest.fixture
def opened(house):
    """Makes open links over scripts, which redial to the next script."""
    core = house.core(house.job(), POLICY)

    def make(first: Script, *later: Script, job=None) -> Link:
        def one(script: Script, core: Core) -> Link:
            link, _ = house.link(MemoryServer(core), POLICY)
            link._pipe = script
            return link

        scripts, again = iter(later), core if job is None else house.core(job, POLICY)

        def redial(within: float) -> Link:
            assert within >= 1.0
            following = next(scripts, None)
            if following is None:
                raise ConnectionFailed("SS-3033", "cannot reach the server")
            return one(following, again)

        link = one(first, core)
        link.redial = redial
        return link

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(Sums, "patience", property(lambda _: 0.3))


def ready(line: _Line) -> bytes:
    return line.ready(3, dim=4, frozen="0" * 64, step=0.0)


def test_a_beginning_that_was_lost_is_asked_for_again(opened):
    first, second = Script(), Script(BEGIN)
    assert ready(_Line(opened(first, second))) == BEGIN.run
    assert first.closed
    assert first.sent == second.sent == [RoundReady(round=3, dim=4, frozen="0" * 64)]


def test_what_an_earlier_round_left_behind_is_passed_over(opened):
    late = Secagg(round=2, stage=wire.ABORT, body=b"left behind", vector=EMPTY)
    assert ready(_Line(opened(Script(late, late, BEGIN)))) == BEGIN.run


def test_the_beginning_of_another_round_is_refused(opened):
    with pytest.raises(RemoteProtocolError, match="SS-4018"):
        ready(_Line(opened(Script(BEGIN.model_copy(update={"round": 4})))))


def test_a_beginning_that_is_told_twice_is_passed_over_and_another_one_is_refused(opened):
    line = _Line(opened(Script(BEGIN, BEGIN, ROSTER)))
    ready(line)
    assert line.hear(MINE) == ROSTER
    line = _Line(opened(Script(BEGIN, BEGIN.model_copy(update={"run": b"\1" * 16}), ROSTER)))
    ready(line)
    with pytest.raises(RemoteProtocolError, match="SS-4010"):
        line.hear(MINE)


def test_what_was_said_last_is_said_again_byte_for_byte_and_nothing_else(opened):
    first, second, third = Script(ROSTER), Script(), Script(ROUTED)
    line = _Line(opened(first, second, third))
    assert line.hear(MINE) == ROSTER
    line.say(MINE)
    assert line.hear(MINE) == ROUTED
    assert [encode(m) for m in (*first.sent, *second.sent, *third.sent)] == [encode(MINE)] * 3


def test_what_comes_twice_is_taken_once_and_what_differs_is_taken(opened):
    other = ROUTED.model_copy(update={"body": b"others"})
    line = _Line(opened(Script(ROSTER, ROSTER, ROUTED, other)))
    assert [line.hear(MINE) for _ in range(3)] == [ROSTER, ROUTED, other], "the protocol decides about those"


def test_a_message_that_cannot_be_sent_goes_over_the_next_connection(opened):
    last = Script(ROUTED)
    line = _Line(opened(Script(deaf=True), Script(deaf=True), last))
    line.say(MINE)
    assert last.sent == [MINE]


def test_a_server_that_drops_at_once_is_given_up(opened):
    line = _Line(opened(*[Script() for _ in range(RECONNECTS + 5)]))
    with pytest.raises(ConnectionFailed, match="SS-3020"):
        line.hear(MINE)
    assert line._left == -1


def test_a_server_that_is_gone_is_given_up_in_time(opened):
    begin = time.monotonic()
    with pytest.raises(ConnectionFailed, match="SS-3020"):
        _Line(opened(Script())).hear(MINE)
    assert 0.05 < time.monotonic() - begin < 2


def test_without_a_way_to_dial_the_loss_is_told_as_it_is(house):
    link = house.link(MemoryServer(house.core(house.job(), POLICY)), POLICY)[0]
    link._pipe = Script()
    with pytest.raises(ConnectionFailed, match="SS-3020"):
        _Line(link).hear(MINE)


def test_another_job_ends_it_and_the_new_session_is_closed(opened, house):
    second = Script(ROUTED)
    with pytest.raises(RemoteProtocolError, match="SS-4023"):
        _Line(opened(Script(), second, job=house.job(name="other"))).hear(MINE)
    assert second.closed
    assert MINE not in second.sent


def test_a_job_that_the_policy_refuses_ends_it_at_once(opened):
    link = opened(Script())

    def refused(within):
        raise PolicyDenied("SS-2001", "no")

    link.redial = refused
    with pytest.raises(PolicyDenied):
        _Line(link).hear(MINE)


def test_what_the_server_says_by_a_code_is_no_reason_to_come_back(opened):
    second = Script(ROUTED)
    with pytest.raises(Exception, match="SS-6013") as caught:
        _Line(opened(Script(Failure(code="SS-6013")), second)).hear(MINE)
    assert caught.value.exit_code == 5
    assert second.sent == []


def test_a_farewell_does_not_dial(opened):
    second = Script()
    begin = time.monotonic()
    _Line(opened(Script(deaf=True), second)).farewell(MINE)
    assert second.sent == []
    assert time.monotonic() - begin < 0.2


def test_the_greeting_has_less_patience_than_a_round(house, monkeypatch):
    """A server, or a network, that falls silent inside the handshake."""
    waited: list[float | None] = []

    class Silent(Script):
        def receive(self, timeout: float | None = None) -> bytes:
            waited.append(timeout)
            raise ConnectionFailed("SS-3021", "nothing arrived")

    mine, _ = house.parties("alice")
    for options in ({}, {"opening": 3.0}):
        with pytest.raises(ConnectionFailed):
            greet(Silent(), mine, POLICY, name="alice", server="gpu", patience=600.0, **options)
    assert waited == [20.0, 3.0]
