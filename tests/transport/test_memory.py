"""The in-memory twin: the same order of actions as the shell, and the same errors at the pipe."""

from __future__ import annotations

import pytest

from securesplit.errors import ConnectionFailed
from securesplit.protocol.session import Party
from securesplit.protocol.transcript import Recorder, Transcript
from securesplit.transport.actions import Action, Close, Send, Work
from securesplit.transport.memory import MemoryServer

PARTY = Party(b"", b"", lambda data: data, lambda *_: None)


class Scripted:
    """A core that does what its messages say, and writes down what happened."""

    def __init__(self) -> None:
        self.log: list[object] = []
        self.count = 0

    def welcome(self, name) -> None:
        assert name

    def connect(self, name, party) -> int:
        self.count += 1
        self.log.append(("connect", name))
        return self.count

    def receive(self, connection, data) -> list[Action]:
        self.log.append(("receive", connection, data))
        match data:
            case b"work":
                return [Send(connection, b"before"), Work(connection, lambda: b"result"), Send(connection, b"after")]
            case b"close":
                return [Send(connection, b"last"), Close(connection, "SS-4001"), Send(connection, b"too late")]
            case b"to 1":
                return [Send(1, b"hello"), Send(9, b"nobody"), Close(9, "")]
        return []

    def complete(self, connection, result) -> list[Action]:
        self.log.append(("complete", connection, result))
        return [Send(connection, result)]

    def disconnect(self, connection) -> list[Action]:
        self.log.append(("disconnect", connection))
        return [Send(1, b"%d left" % connection)]

    def tick(self, now) -> list[Action]:
        self.log.append(("tick", now))
        return [Send(1, b"tick")]


def drain(pipe):
    out = []
    while True:
        try:
            out.append(pipe.receive())
        except ConnectionFailed:
            return out


def test_actions_are_carried_out_in_order_and_a_result_before_what_follows():
    core = Scripted()
    pipe = MemoryServer(core).connect("alice", PARTY)
    pipe.send(b"work")
    assert drain(pipe) == [b"before", b"result", b"after"]
    assert core.log == [("connect", "alice"), ("receive", 1, b"work"), ("complete", 1, b"result")]


def test_messages_reach_other_connections_and_absent_ones_are_no_fault():
    server = MemoryServer(Scripted())
    first, second = server.connect("alice", PARTY), server.connect("bob", PARTY)
    second.send(b"to 1")
    assert drain(first) == [b"hello"]
    assert drain(second) == []
    server.tick(5.0)
    assert drain(first) == [b"tick"]


def test_a_closed_connection_gives_what_was_sent_before_and_then_the_code():
    core = Scripted()
    server = MemoryServer(core)
    first, second = server.connect("alice", PARTY), server.connect("bob", PARTY)
    second.send(b"close")
    assert second.receive() == b"last"
    for use in (second.receive, lambda: second.send(b"x")):
        with pytest.raises(ConnectionFailed, match="SS-3020"):
            use()
    assert drain(first) == [b"2 left"]
    second.close()
    assert core.log.count(("disconnect", 2)) == 1


def test_closing_tells_the_core_once_and_silence_is_a_timeout_at_once():
    core = Scripted()
    server = MemoryServer(core)
    server.connect("alice", PARTY)
    pipe = server.connect("bob", PARTY)
    with pytest.raises(ConnectionFailed, match="SS-3021"):
        pipe.receive(30)
    pipe.close()
    pipe.close()
    assert core.log.count(("disconnect", 2)) == 1


def test_recorders_hold_exactly_the_bytes_of_their_client(tmp_path):
    recorder = Recorder(tmp_path, peer="alice", number=1)
    (tmp_path / "transcript.json").write_text("{}")
    server = MemoryServer(Scripted(), {"alice": recorder})
    alice, bob = server.connect("alice", PARTY), server.connect("bob", PARTY)
    alice.send(b"work")
    bob.send(b"work")
    recorder.close()
    transcript = Transcript.load(tmp_path)
    assert transcript.peers == ((1, "alice"),)
    assert list(transcript.frames(1)) == [(0, b"work"), (1, b"before"), (1, b"result"), (1, b"after")]
