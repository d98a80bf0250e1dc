"""When a round begins, who is in it, and what the clock does. The protocol itself is tested under tests/aggregate."""

from __future__ import annotations

import numpy as np
import pytest

from securesplit.admit import round_config
from securesplit.aggregate import wire
from securesplit.aggregate.client import ClientRound
from securesplit.aggregate.config import Floors
from securesplit.errors import CheckFailed, RemoteProtocolError
from securesplit.pki.certificate import verify_signature
from securesplit.protocol.messages import (
    Blob,
    Failure,
    Handover,
    Join,
    RoundBegin,
    RoundKept,
    RoundReady,
    RoundStatus,
    Secagg,
)
from securesplit.protocol.words import vector_of, words_blob
from securesplit.server.closed import ClosedRuns, LastRound
from securesplit.server.sums import Outbound, Patience, Sums
from tests.e2e.house import CLIENTS

DIM, FROZEN = 5, "1" * 64
PATIENCE = Patience(stage=3.0, gather=30.0, reconnect=1.0)
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
    def config_of(run, ready):
        return round_config(job, model="0" * 64, run=run, number=ready.round, dim=ready.dim, frozen=ready.frozen)

    return Sums(roster=CLIENTS, quorum=2, patience=PATIENCE, config_of=config_of, randomness=Counter())


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


def test_a_group_whose_round_cannot_be_written_down_is_told_and_may_come_again(job):
    broken = [True]

    def config_of(run, ready):
        if broken:
            raise CheckFailed("SS-1585", "the log takes no row")
        return round_config(job, model="0" * 64, run=run, number=ready.round, dim=ready.dim, frozen=ready.frozen)

    sums = Sums(roster=CLIENTS, quorum=2, patience=PATIENCE, config_of=config_of, randomness=Counter())
    assert codes(gather(sums)) == dict.fromkeys(CLIENTS, "SS-1585")
    assert sums.aborted == 1
    broken.clear()
    assert {type(item.message) for item in gather(sums)} == {RoundBegin}


def codes(told):
    return {item.to: item.message.code for item in told if isinstance(item.message, Failure)}


def test_who_does_not_belong_is_refused(sums):
    with pytest.raises(RemoteProtocolError, match="SS-6003"):
        sums.ready("mallory", ready(), 0.0)


@pytest.mark.parametrize("other", [ready(number=1), ready(dim=DIM + 1), ready(frozen="2" * 64)])
@pytest.mark.parametrize("odd", CLIENTS)
def test_who_says_something_else_than_the_rest_is_refused_whenever_it_comes(sums, odd, other):
    """The first has no say: a client that begins anew from round 0 must not put out everybody else."""
    told = [item for name in CLIENTS for item in sums.ready(name, other if name == odd else ready(), 0.0)]
    assert codes(told) == {odd: "SS-6004"}
    assert {item.to for item in told if isinstance(item.message, RoundBegin)} == set(CLIENTS) - {odd}


def test_when_no_group_is_large_enough_all_are_told_why(sums):
    sums.ready("alice", ready(0), 0.0)
    sums.ready("bob", ready(1), 0.0)
    assert codes(sums.ready("carol", ready(2), 0.0)) == dict.fromkeys(CLIENTS, "SS-6004")
    assert sums.aborted == 1


def test_while_a_round_runs_only_a_later_one_may_be_waited_for(sums):
    gather(sums, number=3)
    for message in (ready(2), ready(3, dim=DIM + 1)):
        with pytest.raises(RemoteProtocolError, match="SS-6005"):
            sums.ready("alice", message, 1.0)
    # Alice was killed, or left behind: nobody waits for it in this round, and it waits for the next.
    assert sums.ready("alice", ready(4), 1.0) == []
    with pytest.raises(RemoteProtocolError, match="SS-6005"):
        sums.ready("bob", ready(2), 1.0)
    assert gather(sums, 2.0, ("bob", "carol"), number=4) == []
    assert (sums.finished, sums.aborted) == (0, 1), "nobody is left in round 3"
    assert [(type(item.message), item.message.round) for item in sums.tick(2.1)] == [(RoundBegin, 4)] * 3


def test_whoever_waits_for_the_next_round_has_the_whole_of_its_time(sums):
    gather(sums, 0.0)
    sums.ready("alice", ready(1), 1.0)
    sums.ready("bob", ready(1), 2.0)
    assert {item.message.stage for item in sums.tick(3.1)} == {wire.ABORT}, "carol said nothing"
    assert sums.tick(33.0) == []
    assert {item.message.round for item in sums.tick(33.2) if isinstance(item.message, RoundBegin)} == {1}


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


def test_one_that_leaves_while_others_gather_does_not_shorten_the_wait_for_those_who_never_came(sums):
    sums.ready("alice", ready(), 0.0)
    sums.leave("alice", 1.0)
    assert sums.tick(40.0) == []
    assert sums.aborted == 0, "nobody was waiting, so nothing was given up"
    sums.ready("alice", ready(), 99.0)
    sums.ready("bob", ready(), 100.0)
    assert sums.tick(128.9) == [], "carol may come yet"
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
    def impossible(run, ready):
        from securesplit.errors import InputError

        raise InputError("SS-1601", "no")

    sums = Sums(roster=CLIENTS, quorum=2, patience=PATIENCE, config_of=impossible, randomness=Counter())
    assert {item.message for item in gather(sums)} == {Failure(code="SS-6001")}


def test_a_whole_round_ends_with_the_plain_sum(sums, house, job):
    """Real clients, real certificates; the oracle is integer arithmetic on what they put in."""
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
    late = sums.receive("alice", Secagg(round=0, stage=0, body=b"", vector=EMPTY), 0.0)
    assert [(item.to, item.message.stage) for item in late] == [("alice", wire.ABORT)]


def masked(sums, house, job):
    """A round until its first vectors are due."""
    run, parties = next(i.message.run for i in gather(sums) if isinstance(i.message, RoundBegin)), {}
    for name in CLIENTS:
        folder = house.folder(name)
        config = round_config(job, model="0" * 64, run=run, number=0, dim=DIM, frozen=FROZEN)
        parties[name] = ClientRound(
            config, name, folder.cert_der, sign=folder.sign, verify=lambda *_: None, floors=Floors(3, 2, 1.0, blind=False),
            persist=lambda _answer: None,
        )  # fmt: skip
        parties[name].contribute(np.full(DIM, 0.1), 1)
    return parties


def say(sums, name, stage, body, vector=None, now=0.0):
    return sums.receive(name, Secagg(round=0, stage=stage, body=body, vector=words_blob(vector)), now)


def test_who_comes_back_inside_a_stage_is_not_left_behind(sums, house, job):
    parties = masked(sums, house, job)
    adverts = {name: party.advertise() for name, party in parties.items()}
    assert say(sums, "alice", 0, adverts["alice"]) == []
    sums.leave("alice", 1.0)
    assert sums.tick(1.9) == []
    sums.join("alice")
    assert sums.tick(2.5) == []
    assert say(sums, "alice", 0, adverts["alice"]) == [], "the stage is open, so nothing is due to it"
    say(sums, "bob", 0, adverts["bob"])
    rosters = say(sums, "carol", 0, adverts["carol"])
    assert {item.to for item in rosters} == set(CLIENTS)
    sums.leave("bob", 2.6)
    sums.join("bob")
    again = say(sums, "bob", 0, adverts["bob"])
    assert again == [item for item in rosters if item.to == "bob"], "what it missed comes once more"


def test_who_stays_away_is_left_behind_and_no_stage_has_to_run_out(sums, house, job):
    parties = masked(sums, house, job)
    for name in ("alice", "bob"):
        say(sums, name, 0, parties[name].advertise())
    sums.leave("carol", 0.5)
    assert sums.tick(1.4) == []
    # Two of three: fewer than min_clients, so the round is given up for those who are there.
    assert {item.to for item in sums.tick(1.6)} == {"alice", "bob"}
    assert sums.aborted == 1


def test_who_lost_the_beginning_is_told_it_again_and_who_lost_the_end_its_result(sums, house, job):
    parties = masked(sums, house, job)
    begin = sums.ready("bob", ready(), 0.0)
    assert [type(item.message) for item in begin] == [RoundBegin]
    pending = [(name, 0, party.advertise(), None) for name, party in parties.items()]
    last = {}
    while pending:
        name, *out = pending.pop(0)
        if out[0] == wire.UNMASK:
            last[name] = out
        for item in say(sums, name, *out):
            if item.message.stage == wire.UNMASK and item.to == "carol":
                lost = item
                continue
            due = parties[item.to].receive(item.message.stage, item.message.body, vector_of(item.message.vector))
            pending += [(item.to, *o) for o in due]
    assert (sums.finished, parties["carol"].result) == (1, None)
    assert say(sums, "carol", *last["carol"]) == [lost]
    assert sums.finished == 1
    late = sums.ready
    with pytest.raises(RemoteProtocolError, match="SS-6003"):
        late("mallory", ready(), 0.0)


def test_a_vector_that_is_being_added_does_not_hold_the_clock_up(sums):
    gather(sums)
    with sums._lock:
        assert sums.tick(1e9) == []
        sums.leave("alice", 0.0)
        sums.join("alice")
    assert sums.tick(1e9) != []


def test_nobody_waits_for_those_who_were_here_and_are_lost(sums):
    for name in CLIENTS:
        sums.join(name)
    sums.ready("alice", ready(), 0.0)
    sums.ready("bob", ready(), 0.0)
    sums.leave("carol", 1.0)
    assert sums.tick(1.9) == []
    assert any(isinstance(item.message, RoundBegin) for item in sums.tick(2.1))


def test_when_all_were_gone_the_first_to_come_back_wait_for_the_rest(sums):
    """A second run at the same server: nobody is taken for lost who has only not been started yet."""
    for name in CLIENTS:
        sums.join(name)
    for name in CLIENTS:
        sums.leave(name, 1.0)
    for name in ("alice", "bob"):
        sums.join(name)
        sums.ready(name, ready(), 50.0)
    assert sums.tick(51.0) == []
    sums.join("carol")
    assert [type(item.message) for item in sums.ready("carol", ready(), 52.0)] == [RoundBegin] * 3


# ---- rounds that are tried again ---------------------------------------------------------------------------------------


def lasting_of(job, closed):
    def config_of(run, ready):
        return round_config(job, model="0" * 64, run=run, number=ready.round, dim=ready.dim, frozen=ready.frozen)

    return Sums(roster=CLIENTS, quorum=2, patience=PATIENCE, config_of=config_of, randomness=Counter(), closed=closed)


@pytest.fixture
def lasting(job):
    return lasting_of(job, ClosedRuns())


def kept(number=0, clients=CLIENTS):
    return RoundKept(round=number, run=bytes(16), clients=clients)


def begun(told):
    return {item.to for item in told if isinstance(item.message, RoundBegin)}


def missing(told):
    return {item.to: item.message.missing for item in told if isinstance(item.message, RoundStatus)}


def test_who_waits_is_told_for_whom(lasting):
    for name in CLIENTS:
        lasting.join(name)
    assert missing(lasting.ready("alice", ready(), 0.0)) == {"alice": ("bob", "carol")}
    assert missing(lasting.ready("carol", ready(), 0.0)) == {"alice": ("bob",), "carol": ("bob",)}
    assert not lasting.due(0.1)
    lasting.leave("carol", 0.2)
    assert lasting.due(0.3)
    assert missing(lasting.tick(0.3)) == {"alice": ("bob", "carol")}
    assert not lasting.due(0.4)


def test_one_that_begins_a_running_round_anew_gives_up_its_place_and_waits_for_the_next_run(lasting, house, job):
    parties = masked(lasting, house, job)
    for name in ("alice", "carol"):
        say(lasting, name, 0, parties[name].advertise())
    assert lasting.ready("carol", ready(), 1.0) == [], "bob may still come"
    told = say(lasting, "bob", 0, parties["bob"].advertise())
    assert {item.to for item in told} == {"alice", "bob"}, (
        "what carol said before counts, and nothing more is due to it"
    )
    told = [*told, *lasting.tick(10.0)]
    assert {(item.to, item.message.stage) for item in told[2:]} == {("alice", wire.ABORT), ("bob", wire.ABORT)}
    lasting.ready("alice", ready(), 11.0)
    assert begun(lasting.ready("bob", ready(), 11.0)) == set(CLIENTS)


def test_who_keeps_a_sum_that_cannot_be_is_refused(lasting, sums):
    with pytest.raises(RemoteProtocolError, match="SS-4051"):
        sums.kept("alice", kept(), 0.0)
    for name, message, code in (
        ("mallory", kept(), "SS-6003"), ("alice", kept(clients=("alice", "mallory")), "SS-6003"),
        ("alice", kept(clients=("bob", "carol")), "SS-4051"),
    ):  # fmt: skip
        with pytest.raises(RemoteProtocolError, match=code):
            lasting.kept(name, message, 0.0)
    gather(lasting)
    with pytest.raises(RemoteProtocolError, match="SS-4051"):
        lasting.kept("alice", kept(5), 0.0)
    gather(lasting, 1.0, number=1)
    assert begun(lasting.tick(1.1)) == set(CLIENTS)
    assert [item.message.closed for item in lasting.kept("alice", kept(0), 1.0)] == [True], "the others are further on"


def test_after_a_restart_the_rest_gets_the_sum_from_those_who_keep_it(lasting):
    """Alice has the sum of the server that was killed, bob and carol begin the round again."""
    lasting.ready("bob", ready(4), 0.0)
    lasting.ready("carol", ready(4), 0.0)
    assert begun(lasting.kept("alice", kept(4), 1.0)) == set(CLIENTS)


def test_those_who_are_further_on_are_not_waited_for(lasting):
    """A server that lost its list: bob and carol wait for the next round already, and alice's last one has nobody left in it."""
    for name in ("bob", "carol"):
        lasting.ready(name, ready(1), 0.0)
    told = [item for item in lasting.kept("alice", kept(0), 1.0) if isinstance(item.message, RoundStatus)]
    assert (told[0].to, told[0].message.closed) == ("alice", True)
    assert begun(lasting.ready("alice", ready(1), 2.0)) == set(CLIENTS)


def test_no_run_over_fewer_than_those_of_a_sum_that_is_there_begins_after_a_restart(job, tmp_path):
    ClosedRuns(tmp_path / "closed").summed(LastRound(4, CLIENTS, (bytes(16),)))
    lasting = lasting_of(job, ClosedRuns(tmp_path / "closed"))
    for name in CLIENTS:
        lasting.join(name)
    lasting.leave("alice", 0.0)
    lasting.ready("bob", ready(4), 0.5)
    lasting.ready("carol", ready(4), 0.5)
    assert begun(lasting.tick(2.0)) == set(), "she may have it, and they would have another one"
    assert begun(lasting.kept("alice", kept(4), 3.0)) == set(CLIENTS)


def test_one_word_neither_stops_a_run_nor_lasts_for_ever_where_the_list_is_lost(lasting):
    """Alice may lie: whether bob and carol may sum without her they decide themselves (SS-6030)."""
    for name in CLIENTS:
        lasting.join(name)
    lasting.leave("alice", 0.0)
    lasting.ready("bob", ready(4), 0.5)
    lasting.ready("carol", ready(4), 0.5)
    assert begun(lasting.tick(2.0)) == {"bob", "carol"}
    assert lasting.kept("alice", kept(4), 3.0) == []
    assert lasting.aborted == 0
    for name in ("bob", "carol"):
        lasting.leave(name, 3.0)
    assert not lasting.due(3.5)
    lasting.tick(4.5)
    assert lasting.aborted == 1
    assert lasting.tick(33.0) == []
    assert lasting.due(33.1)
    assert codes(lasting.tick(33.1)) == {"alice": "SS-6010"}, "which is a loss, and she asks again"
    assert not lasting.due(99.0)


@pytest.mark.parametrize("clients", [("alice", "bob"), CLIENTS])
def test_a_quorum_that_says_the_same_is_believed_where_the_list_is_lost(lasting, clients):
    assert lasting.kept("alice", kept(4, clients), 0.0) == []
    told = lasting.kept("bob", kept(4, clients), 0.0)
    closed = {item.to for item in told if item.message.closed}
    assert closed == (set() if "carol" in clients else {"alice", "bob"})


# ---- clients that come late ------------------------------------------------------------------------------------------


def join(name, number=0, key=7):
    return Join(round=number, name=name, certificate=b"der", key=bytes([key]) * 32, signature=bytes(8))


@pytest.fixture
def elastic(job):
    def config_of(run, ready):
        return round_config(job, model="0" * 64, run=run, number=ready.round, dim=ready.dim, frozen=ready.frozen)

    made = Sums(
        roster=CLIENTS, quorum=2, patience=PATIENCE, config_of=config_of, randomness=Counter(), closed=ClosedRuns(), late=True
    )  # fmt: skip
    for name in CLIENTS:
        made.join(name)
    return made


def test_nobody_comes_late_where_nothing_is_handed_over(sums):
    with pytest.raises(RemoteProtocolError) as caught:
        sums.asks("alice", join("alice"), 0.0)
    assert caught.value.code == "SS-4052"


@pytest.mark.parametrize(("name", "said"), [("alice", "bob"), ("mallory", "mallory")])
def test_a_client_comes_late_in_its_own_name_and_from_the_roster(elastic, name, said):
    with pytest.raises(RemoteProtocolError) as caught:
        elastic.asks(name, join(said), 0.0)
    assert caught.value.code == "SS-6003"


def test_where_no_round_is_over_nobody_is_late(elastic):
    assert elastic.asks("alice", join("alice"), 0.0) == [Outbound("alice", RoundStatus(round=0, closed=False))]
    elastic.ready("bob", ready(0), 0.0)
    assert [item.to for item in elastic.asks("alice", join("alice"), 0.0)] == ["alice"], (
        "the others wait for this very round"
    )


def test_the_others_are_shown_who_is_late_by_what_they_are_ready_for(elastic):
    elastic.ready("bob", ready(3), 0.0)  # All that a server knows that was started anew.
    status, *shown = elastic.asks("alice", join("alice", 1), 0.0)
    assert status == Outbound("alice", RoundStatus(round=1, closed=True))
    assert [(item.to, item.message.whole) for item in shown] == [("bob", True), ("carol", False)]
    again = elastic.ready("carol", ready(3), 1.0)
    assert [item.to for item in again if isinstance(item.message, Join)] == ["carol"]
    elastic.ready("alice", ready(3), 2.0)
    assert not [item for item in elastic.ready("carol", ready(3), 3.0) if isinstance(item.message, Join)]


def test_whoever_was_helped_on_is_awaited_while_it_works(elastic):
    elastic.ready("bob", ready(1), 0.0)
    elastic.ready("carol", ready(1), 0.0)
    elastic.asks("alice", join("alice"), 0.0)
    box = Blob(dtype="u8", shape=(1,), data=b"x")
    given = Handover(to="alice", of="bob", asked=bytes([7]) * 32, key=bytes(32), box=box)
    assert elastic.answers("bob", given, 20.0) == [Outbound("alice", given)]
    assert not elastic.due(31.0), "thirty seconds after it was helped on, not after the first was ready"
    elastic.works("alice", 45.0, awaited=False)
    assert not elastic.due(74.0)
    assert elastic.due(76.0)


def test_a_round_that_is_over_is_not_gathered_for_again(elastic):
    for name in ("bob", "carol"):
        elastic.ready(name, ready(0), 0.0)
    elastic._ending.summed(0, bytes(16), ("bob", "carol"), 0.0)
    with pytest.raises(RemoteProtocolError) as caught:
        elastic.ready("alice", ready(0), 1.0)
    assert caught.value.code == "SS-6033"


def test_the_word_of_too_few_to_have_made_a_sum_keeps_nobody_from_beginning(house):
    job = house.job(blind=False)
    roster = (*CLIENTS, "mallory")

    def config_of(run, ready):
        return round_config(job, model="0" * 64, run=run, number=ready.round, dim=ready.dim, frozen=ready.frozen)

    made = Sums(
        roster=roster, quorum=3, patience=PATIENCE, config_of=config_of, randomness=Counter(), closed=ClosedRuns(), late=True
    )  # fmt: skip
    for name in roster:
        made.join(name)
    made.ready("mallory", ready(1000), 0.0)
    assert made.asks("alice", join("alice"), 0.0) == [Outbound("alice", RoundStatus(round=0, closed=False))]
    made.ready("bob", ready(3), 1.0)
    status, *_shown = made.asks("alice", join("alice"), 0.0)
    assert status == Outbound("alice", RoundStatus(round=0, closed=True)), "two others, with whom it is a quorum"
    assert made.asks("alice", join("alice", 3), 0.0) == [Outbound("alice", RoundStatus(round=3, closed=False))]


def test_what_nobody_asked_for_holds_nobody_up(elastic):
    elastic.ready("bob", ready(), 0.0)
    elastic.ready("carol", ready(), 0.0)
    box = Blob(dtype="u8", shape=(1,), data=b"x")
    given = Handover(to="bob", of="alice", asked=bytes(32), key=bytes(32), box=box)
    assert elastic.answers("alice", given, 29.0) == []
    assert elastic.due(31.0)


def test_one_that_comes_late_and_is_never_ready_is_not_awaited_for_ever(elastic):
    elastic.ready("bob", ready(1), 0.0)
    elastic.ready("carol", ready(1), 0.0)
    box = Blob(dtype="u8", shape=(1,), data=b"x")
    for second in range(0, 600, 20):
        elastic.asks("alice", join("alice", key=7), 0.0)
        elastic.answers("bob", Handover(to="alice", of="bob", asked=bytes([7]) * 32, key=bytes(32), box=box), second)
        elastic.works("alice", second + 1, awaited=False)
        if elastic.due(second + 2):
            break
    assert 30 < second <= 121


@pytest.mark.parametrize("resumed", [False, True])
def test_clients_that_all_begin_the_job_from_scratch_are_not_sent_to_ask_each_other(job, tmp_path, resumed):
    """The last run in this key folder was given up while its round 4 was open; nobody of it is here unless somebody says so."""
    ClosedRuns(tmp_path / "closed").summed(LastRound(4, CLIENTS, (bytes(16),)))

    def config_of(run, ready):
        return round_config(job, model="0" * 64, run=run, number=ready.round, dim=ready.dim, frozen=ready.frozen)

    made = Sums(
        roster=CLIENTS, quorum=2, patience=PATIENCE, config_of=config_of, randomness=Counter(),
        closed=ClosedRuns(tmp_path / "closed"), late=True,
    )  # fmt: skip
    for name in CLIENTS:
        made.join(name)
    if resumed:
        made.kept("carol", kept(4), 0.0)
    status = made.asks("alice", join("alice"), 0.0)[0].message
    assert status.closed is resumed
    if not resumed:
        assert begun(gather(made)) == set(CLIENTS)
        assert not made.asks("alice", join("alice"), 0.0)[0].message.closed


@pytest.mark.parametrize("asks_first", [True, False])
def test_one_that_stands_at_the_open_round_without_a_part_in_its_sum_is_behind_after_a_restart(
    job, tmp_path, asks_first
):
    ClosedRuns(tmp_path / "closed").summed(LastRound(4, ("bob", "carol"), (bytes(16),)))

    def config_of(run, ready):
        return round_config(job, model="0" * 64, run=run, number=ready.round, dim=ready.dim, frozen=ready.frozen)

    made = Sums(
        roster=CLIENTS, quorum=2, patience=PATIENCE, config_of=config_of, randomness=Counter(),
        closed=ClosedRuns(tmp_path / "closed"), late=True,
    )  # fmt: skip
    made.join("alice")
    if not asks_first:
        with pytest.raises(RemoteProtocolError, match="SS-6033"):
            made.ready("alice", ready(4), 0.0)
    assert made.asks("alice", join("alice", 4), 0.0)[0].message.closed


def test_who_stands_elsewhere_is_let_go_and_too_few_of_the_rest_wait_on(job):
    roster = (*CLIENTS, "dora")

    def config_of(run, ready):
        return round_config(job, model="0" * 64, run=run, number=ready.round, dim=ready.dim, frozen=ready.frozen)

    made = Sums(
        roster=roster, quorum=3, patience=PATIENCE, config_of=config_of, randomness=Counter(), closed=ClosedRuns(), late=True
    )  # fmt: skip
    for name in roster:
        made.join(name)
    out = []
    for name, number in (("carol", 0), ("dora", 0), ("alice", 3), ("bob", 3)):
        out += made.ready(name, ready(number), 0.0)
    gone = {item.to for item in out if isinstance(item.message, Failure)}
    assert gone == {"carol", "dora"}, "after a restart of the server: those at the later round are what they need"
    status, *shown = made.asks("carol", join("carol"), 0.0)
    assert status.message.closed
    assert {item.to for item in shown} == {"alice", "bob", "dora"}
    made.ready("carol", ready(3), 1.0)
    begun = made.ready("dora", ready(3), 1.0)
    assert {item.to for item in begun if isinstance(item.message, RoundBegin)} == set(roster)
