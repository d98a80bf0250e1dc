"""Which of a client's connections speaks in secure sums, by itself."""

from __future__ import annotations

import pytest

from securesplit.protocol.messages import Blob, Join, RoundBegin, RoundKept, RoundReady, Secagg
from securesplit.server.speakers import Speakers
from securesplit.server.sums import Outbound

BEGIN = RoundBegin(round=0, run=bytes(16))
OPEN = {1: "alice", 2: "bob", 3: "alice"}


class Heard:
    """Secure sums that write down what they are told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __getattr__(self, what: str):
        return lambda name, *_: self.calls.append((what, name)) or [Outbound(name, BEGIN)]


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def speakers(heard):
    return Speakers(heard)


def test_what_is_for_a_client_goes_to_the_connection_that_spoke_last_of_the_sum(speakers):
    told = [Outbound("alice", BEGIN), Outbound("carol", BEGIN)]
    assert list(speakers.addressed(told, OPEN)) == [(1, BEGIN), (3, BEGIN)], "nobody spoke yet: to all of hers"
    speakers.speaks("alice", 3)
    assert list(speakers.addressed(told, OPEN)) == [(3, BEGIN)]
    del (left := dict(OPEN))[3]
    assert list(speakers.addressed(told, left)) == [(1, BEGIN)], "that one is gone"


def test_a_client_leaves_when_its_last_connection_goes_or_the_one_that_spoke(speakers, heard):
    speakers.speaks("alice", 3)
    speakers.gone("alice", 1, others=True, now=0.0)
    assert heard.calls == []
    speakers.gone("alice", 3, others=True, now=0.0)
    speakers.gone("bob", 2, others=False, now=0.0)
    assert heard.calls == [("leave", "alice"), ("leave", "bob")]


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (RoundReady(round=0, dim=4, frozen="0" * 64), "ready"),
        (RoundKept(round=0, run=bytes(16), clients=("alice",)), "kept"),
        (Join(round=0, name="alice", certificate=b"d", key=bytes(32), signature=bytes(8)), "asks"),
        (Secagg(round=0, stage=0, body=b"", vector=Blob(dtype="u32", shape=(0,), data=b"")), "receive"),
    ],
)
def test_each_message_is_for_one_thing_that_sums_do(speakers, heard, message, what):
    assert speakers.said("alice", message, 1.0) == [Outbound("alice", BEGIN)]
    assert heard.calls == [(what, "alice")]
