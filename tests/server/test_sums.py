"""When a round begins, who is in it, and what the clock does. The protocol itself is tested under tests/aggregate."""

from __future__ import annotations

import pytest

from securesplit.admit import round_config
from securesplit.aggregate import wire
from securesplit.aggregate.client import ClientRound
from securesplit.aggregate.config import Floors
from securesplit.errors import RemoteProtocolError
from securesplit.pki.certificate import verify_signature
from securesplit.protocol.messages import Blob, Failure, RoundBegin, RoundReady, Secagg
from securesplit.server.sums import Sums
from tests.e2e.house import CLIENTS

DIM, FROZEN = 5, "1" * 64
EMPTY = Blob(dtype="u32", shape=(0,), data=b"")


class Counter:
    """Run names that can be told apart."""

    def __init__(self):
        self.count = 0

    def __call__(self, length):
        self.count += 1
        return self.count.to_bytes(length, "big")


@pytest.fixture
def job(house):
    return house.job(blind=False)


@pytest.fixture
def sums(job):
    def config_of(run, number, dim, frozen):
        return round_config(job, model="0" * 64, run=run, number=number, dim=dim, frozen=frozen)

    return Sums(
        roster=CLIENTS, quorum=2, stage_seconds=3.0, gather_seconds=30.0, config_of=config_of, randomness=Counter()
    )


def ready(number=0, dim=DIM, frozen=FROZEN):
    return RoundReady(round=number, dim=dim, frozen=frozen)


def gather(sums, now=0.0, names=CLIENTS, number=0):
    out = []
    for name in names:
        out += sums.ready(name, ready(number), now)
    return out


def test_a_round_begins_when_the_whole_roster_is_ready(sums):
    assert sums.ready("alice", ready(), 0.0) == []
    assert sums.ready("carol", ready(), 1.0) == []
    begun = sums.ready("bob", ready(), 2.0)
    assert {item.to for item in begun} == set(CLIENTS)
    assert {item.message for item in begun} == {RoundBegin(round=0, run=(1).to_bytes(16, "big"))}


def test_who_does_not_belong_or_says_something_else_is_refused(sums):
    sums.ready("alice", ready(), 0.0)
    for name, message, code in (
        ("mallory", ready(), "SS-6003"),
        ("alice", ready(), "SS-6005"),
        ("bob", ready(number=1), "SS-6004"),
        ("bob", ready(dim=DIM + 1), "SS-6004"),
        ("bob", ready(frozen="2" * 64), "SS-6004"),
    ):
        with pytest.raises(RemoteProtocolError, match=code):
            sums.ready(name, message, 0.0)
    gather(sums, names=("bob", "carol"))
    with pytest.raises(RemoteProtocolError, match="SS-6005"):
        sums.ready("alice", ready(1), 0.0)


def test_a_message_of_another_round_is_refused(sums):
    stray = Secagg(round=0, stage=0, body=b"", vector=EMPTY)
    with pytest.raises(RemoteProtocolError, match="SS-6006"):
        sums.receive("alice", stray, 0.0)
    gather(sums)
    with pytest.raises(RemoteProtocolError, match="SS-6006"):
        sums.receive("alice", stray.model_copy(update={"round": 1}), 0.0)
    with pytest.raises(RemoteProtocolError):
        sums.receive("alice", stray, 0.0)


def test_without_a_quorum_those_who_wait_are_told_and_let_go(sums):
    sums.ready("alice", ready(), 5.0)
    assert sums.tick(34.9) == []
    told = sums.tick(35.1)
    assert [(item.to, item.message) for item in told] == [("alice", Failure(code="SS-6010"))]
    assert sums.aborted == 1
    assert sums.tick(1e6) == []
    # Afterwards a round may still begin.
    assert len(gather(sums, 1e6)) == 3


def test_one_that_leaves_while_others_gather_does_not_shorten_the_wait(sums):
    sums.ready("alice", ready(), 0.0)
    sums.leave("alice", 1.0)
    assert sums.tick(40.0) == []
    assert sums.aborted == 0, "nobody was waiting, so nothing was given up"
    sums.ready("bob", ready(), 100.0)
    assert sums.tick(101.0) == []
    sums.ready("carol", ready(), 102.0)
    assert sums.tick(129.0) == []
    assert [item.message.round for item in sums.tick(131.0) if isinstance(item.message, RoundBegin)] == [0, 0]


def test_a_stage_that_runs_out_ends_the_round_for_all_and_another_may_begin(sums):
    gather(sums, 10.0)
    assert sums.tick(12.9) == []
    ended = sums.tick(13.1)
    assert {item.to for item in ended} == set(CLIENTS)
    assert all(item.message.stage == wire.ABORT for item in ended)
    assert (sums.finished, sums.aborted) == (0, 1)
    again = [item.message for item in gather(sums, 20.0) if isinstance(item.message, RoundBegin)]
    assert {m.run for m in again} == {(2).to_bytes(16, "big")}, "a run's name is never used twice"


def test_numbers_that_make_no_round_are_given_up(job):
    def impossible(run, number, dim, frozen):
        from securesplit.errors import InputError

        raise InputError("SS-1601", "no")

    sums = Sums(
        roster=CLIENTS, quorum=2, stage_seconds=3.0, gather_seconds=30.0, config_of=impossible, randomness=Counter()
    )
    assert {item.message for item in gather(sums)} == {Failure(code="SS-6001")}


def test_a_whole_round_ends_with_the_plain_sum(sums, house, job):
    """Real clients, real certificates; the oracle is integer arithmetic on what they put in."""
    import numpy as np

    begun = gather(sums)
    run = begun[0].message.run
    parties = {}
    for name in CLIENTS:
        folder = house.folder(name)

        def verify(who, certificate, signature, data, folder=folder):
            assert folder.verify_peer(certificate, "client").name == who
            verify_signature(certificate, signature, data)

        parties[name] = ClientRound(
            round_config(job, model="0" * 64, run=run, number=0, dim=DIM, frozen=FROZEN), name, folder.cert_der,
            sign=folder.sign, verify=verify, floors=Floors(3, 2, 1.0, blind=False), persist=lambda _record: None,
        )  # fmt: skip
        parties[name].contribute(np.random.default_rng(len(name)).normal(scale=0.1, size=DIM), 2)
    pending = [(name, 0, party.advertise(), None) for name, party in parties.items()]
    while pending:
        name, stage, body, vector = pending.pop(0)
        words = np.zeros(0, dtype=np.uint32) if vector is None else vector
        blob = Blob(dtype="u32", shape=(len(words),), data=words.astype("<u4").tobytes())
        for item in sums.receive(name, Secagg(round=0, stage=stage, body=body, vector=blob), 0.0):
            back = np.frombuffer(item.message.vector.data, dtype="<u4") if item.message.vector.data else None
            answers = parties[item.to].receive(item.message.stage, item.message.body, back)
            pending += [(item.to, out.stage, out.body, out.vector) for out in answers]
    total = sum(p.contribution.astype(np.uint64) for p in parties.values()) % (1 << 32)
    assert all(np.array_equal(p.result.ring_sum, total) for p in parties.values())
    assert (sums.finished, sums.aborted) == (1, 0)
    assert np.array_equal(sums.last.ring_sum, total)
    with pytest.raises(RemoteProtocolError, match="SS-6006"):
        sums.receive("alice", Secagg(round=0, stage=0, body=b"", vector=EMPTY), 0.0)
