"""The end of a round, by itself: who keeps its sum, who is waited for, and what is kept over a restart."""

from __future__ import annotations

import logging
import stat

import pytest

from securesplit.errors import InputError, RemoteProtocolError
from securesplit.protocol.messages import RoundKept, RoundReady, RoundStatus
from securesplit.server.closed import ClosedRuns, LastRound
from securesplit.server.endings import Ending, Move
from securesplit.server.gathering import Gathering
from securesplit.server.news import News
from securesplit.server.presence import Presence

NAMES = ("a", "b", "c", "d")
RUN, OTHER = b"r" * 16, b"o" * 16


def kept(number=3, run=RUN, clients=NAMES):
    return RoundKept(round=number, run=run, clients=clients)


def ready(number=3):
    return RoundReady(round=number, dim=4, frozen="0" * 64)


@pytest.fixture
def ending():
    made = Ending(ClosedRuns(), 3, 10.0)
    made.summed(3, RUN, NAMES, 0.0)
    return made


@pytest.fixture
def gathering():
    return Gathering(NAMES, 3, 10.0)


def test_a_round_closes_when_all_of_its_clients_keep_it(ending, gathering):
    for i, name in enumerate(NAMES, 1):
        assert not ending.due(gathering, 1.0)
        assert not ending.kept(name, kept(), 1.0)
        assert ending.missing == NAMES[i:]
    assert ending.due(gathering, 1.0)
    assert ending.move(gathering, 1.0) == Move(closes=True)
    assert ending.close() == NAMES
    assert not ending.open
    assert ending.kept("a", kept(), 2.0), "who asks again hears that it is closed"
    assert ending.kept("a", kept(2, OTHER), 2.0), "and so does who is behind"


def test_one_that_lacks_the_sum_is_helped_once_all_of_them_are_here(ending, gathering):
    for name in ("a", "b"):
        ending.kept(name, kept(), 1.0)
    gathering.add("c", ready(), 2.0)
    ending.ready("c", 3, 2.0)
    assert ending.move(gathering, 2.0) == Move(missing=frozenset("d"))
    ending.kept("d", kept(), 3.0)
    assert ending.move(gathering, 3.0) == Move(again=("c",))
    ending.drop("a")
    assert ending.move(gathering, 3.0) == Move(missing=frozenset("a")), (
        "who keeps it and is gone is needed all the same"
    )
    ending.kept("a", kept(), 4.0)
    assert gathering.pick(("c",)) == ready()
    assert ending.again() == NAMES
    ending.summed(3, OTHER, NAMES, 5.0)
    ending.kept("c", kept(run=OTHER), 6.0)
    assert ending.missing == ()


def test_after_the_patience_the_quorum_goes_on_and_less_than_it_is_let_go(ending, gathering):
    for name in ("a", "b", "c"):
        ending.kept(name, kept(), 1.0)
    assert not ending.due(gathering, 11.0)
    assert ending.due(gathering, 11.1)
    assert ending.move(gathering, 11.1) == Move(missing=frozenset("d"), closes=True, code="SS-6033")
    strict = Ending(ClosedRuns(), 4, 10.0)
    strict.summed(3, RUN, NAMES, 0.0)
    for name in ("a", "b"):
        strict.kept(name, kept(), 1.0)
    strict.ready("c", 3, 1.0)
    gathering.add("c", ready(), 1.0)
    assert strict.move(gathering, 20.0) == Move(missing=frozenset("d"), refused=("c", "a", "b"), code="SS-6010")
    strict.refuse(gathering, 20.0)
    assert (strict.waiting, gathering.rounds, strict.open) == (set(), {}, True)
    assert not strict.due(gathering, 30.0)


def test_who_is_ready_for_another_round_is_not_waited_for(ending, gathering):
    for name, number in zip(NAMES, (4, 4, 0, 4), strict=True):
        ending.ready(name, number, 1.0)
    assert ending.move(gathering, 1.0) == Move(closes=True)


def test_who_is_not_in_the_sum_gets_none_and_keeps_none(ending):
    with pytest.raises(RemoteProtocolError, match="SS-6033"):
        ending.ready("e", 3, 1.0)
    for name, message in (("e", kept()), ("e", kept(clients=(*NAMES, "e"))), ("a", kept(4, OTHER))):
        with pytest.raises(RemoteProtocolError, match="SS-4051"):
            ending.kept(name, message, 1.0)
    assert ending.missing == NAMES


def test_a_server_that_was_restarted_knows_which_round_is_open_and_waits_as_long_as_ever(tmp_path, gathering):
    path = tmp_path / "closed.json"
    Ending(ClosedRuns(path), 3, 10.0).summed(3, RUN, NAMES, 0.0)
    fresh = Ending(ClosedRuns(path), 3, 10.0)
    assert (fresh.number, fresh.open, fresh.missing) == (3, True, NAMES)
    assert not fresh.due(gathering, 1e9)
    assert not fresh.kept("b", kept(), 1e9)
    assert fresh.missing == ("a", "c", "d")
    for name, message in (
        ("a", kept(4)), ("a", kept(900)), ("a", kept(run=OTHER)), ("e", kept(clients=(*NAMES, "e"))), ("a", kept(clients=("b", "c", "d"))),
    ):  # fmt: skip
        with pytest.raises(RemoteProtocolError, match="SS-4051"):
            fresh.kept(name, message, 1e9)
    assert fresh.kept("a", kept(2, OTHER), 1e9), "an earlier round is closed, whoever says what of it"
    assert fresh.missing == ("a", "c", "d")


def test_what_is_closed_is_known_to_have_been_the_last_after_a_restart(tmp_path, ending):
    path = tmp_path / "closed.json"
    first = Ending(ClosedRuns(path), 3, 10.0)
    first.summed(3, RUN, NAMES, 0.0)
    first.close()
    fresh = Ending(ClosedRuns(path), 3, 10.0)
    assert not fresh.open
    assert fresh.kept("a", kept(3, OTHER), 0.0)
    with pytest.raises(RemoteProtocolError, match="SS-4051"):
        fresh.kept("a", kept(4, OTHER), 0.0)
    fresh.ready("a", 0, 0.0)
    fresh.summed(0, OTHER, NAMES, 1.0)
    assert (fresh.number, fresh.missing) == (0, NAMES), "the same job may begin anew"


def test_the_last_round_of_another_job_is_not_this_ones(tmp_path):
    path = tmp_path / "closed.json"
    ClosedRuns(path, "one").summed(LastRound(3, NAMES, (RUN,)))
    assert ClosedRuns(path, "one").last == LastRound(3, NAMES, (RUN,))
    assert ClosedRuns(path, "other").last is None


def test_a_disk_that_takes_nothing_does_not_take_the_round_away(tmp_path, caplog):
    found = ClosedRuns(tmp_path / "gone" / "closed.json")
    with caplog.at_level(logging.ERROR):
        found.summed(LastRound(3, NAMES, (RUN,)))
    assert found.last == LastRound(3, NAMES, (RUN,))
    assert "SS-1804" in caplog.text


def test_what_the_disk_did_not_take_is_unknown_after_a_restart(tmp_path, monkeypatch):
    """Else the round before would stand there for the last one, and all who keep this sum would be refused (SS-4051)."""
    path = tmp_path / "closed.json"
    first = ClosedRuns(path, "job")
    first.summed(LastRound(2, NAMES, (OTHER,)))
    first.add([OTHER])
    with monkeypatch.context() as full:

        def takes_nothing(*_args, **_named):
            raise InputError("SS-1804", "the disk is full", hint="")

        full.setattr("securesplit.server.closed.write_atomically", takes_nothing)
        first.summed(LastRound(3, NAMES, (RUN,)))
    fresh = Ending(ClosedRuns(path, "job"), 3, 10.0, NAMES)
    for name in NAMES[:3]:
        assert not fresh.kept(name, kept(), 0.0)
    fresh.hear({}, 0.0)
    assert (fresh.open, fresh.number) == (True, 3)


def test_one_word_does_not_keep_a_job_from_beginning(gathering):
    """No sum was ever made. One says that it has one, all others being ready, spoils the run that follows, and leaves."""
    fresh = Ending(ClosedRuns(), 3, 10.0, NAMES)
    for name in ("a", "b", "c"):
        gathering.add(name, ready(), 1.0)
        fresh.ready(name, 3, 1.0)
    assert not fresh.kept("d", kept(), 2.0)
    assert fresh.hear(gathering.rounds, 2.0) == ()
    assert fresh.move(gathering, 2.0).again == ("a", "b", "c")
    fresh.again()
    fresh.drop("d")
    assert fresh.move(gathering, 12.0) == Move(missing=frozenset("d"))
    assert fresh.move(gathering, 12.1) == Move(missing=frozenset("d"), void=True)
    fresh.void()
    assert fresh.hear(gathering.rounds, 13.0) == ()
    assert not fresh.open
    assert gathering.due(set(), 13.0), "and they begin without that one at once"


def test_nobody_draws_out_the_waiting_for_ever(ending, gathering):
    """One that begins the round anew again and again, or names a run of its own each time, while another one is gone for good."""
    for name in ("a", "b", "c"):
        ending.kept(name, kept(), 1.0)
    now = 1.0
    for _ in range(40):
        now += 9.0
        ending.ready("a", 3, now)
        ending.kept("a", kept(), now)
        with pytest.raises(RemoteProtocolError, match="SS-4051"):
            ending.kept("b", kept(run=int(now).to_bytes(16, "big")), now)
    assert ending.move(gathering, now).closes
    ending.close()
    assert len(ending._closed._runs) == 1


def test_a_sum_that_nobody_keeps_any_more_is_none_after_the_patience(tmp_path, gathering):
    """All begin anew, and one of them is gone for good: nobody has the sum that they would wait for."""
    path = tmp_path / "closed.json"
    Ending(ClosedRuns(path), 3, 10.0).summed(3, RUN, NAMES, 0.0)
    fresh = Ending(ClosedRuns(path), 3, 10.0)
    for name in ("a", "b", "c"):
        fresh.ready(name, 3, 5.0)
        gathering.add(name, ready(), 5.0)
    assert fresh.move(gathering, 15.0) == Move(missing=frozenset("d"))
    assert fresh.move(gathering, 15.1) == Move(missing=frozenset("d"), void=True)
    fresh.void()
    assert (fresh.open, fresh.number, ClosedRuns(path).last) == (False, -1, LastRound(2))


def test_a_sum_whose_keepers_are_all_away_is_not_forgotten(tmp_path, gathering):
    """The server was started again in the evening, and its clients in the morning: they have the sum on their disks."""
    path = tmp_path / "closed.json"
    Ending(ClosedRuns(path), 3, 10.0).summed(3, RUN, NAMES, 0.0)
    fresh = Ending(ClosedRuns(path), 3, 10.0)
    assert not fresh.due(gathering, 5.0), "it waits from now on"
    assert fresh.due(gathering, 15.1)
    assert fresh.move(gathering, 15.1) == Move(missing=frozenset(NAMES), code="SS-6010"), "nobody is refused"
    assert not fresh.due(gathering, 25.0), "and anew"
    fresh.ready("a", 3, 100.0)  # One was killed before it had the sum, and is back before the others.
    gathering.add("a", ready(), 100.0)
    assert fresh.move(gathering, 110.1) == Move(missing=frozenset("bcd"), refused=("a",), code="SS-6010")
    fresh.refuse(gathering, 110.1)
    for name in NAMES:
        assert not fresh.kept(name, kept(), 200.0)
    assert fresh.move(gathering, 200.0).closes


def test_what_is_closed_is_closed_after_a_restart(tmp_path, ending):
    path = tmp_path / "closed.json"
    first = Ending(ClosedRuns(path), 3, 10.0)
    first.summed(3, RUN, NAMES, 0.0)
    first.summed(3, OTHER, NAMES, 1.0)
    first.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    second = Ending(ClosedRuns(path), 3, 10.0)
    assert second.kept("a", kept(), 0.0)
    assert second.kept("b", kept(run=OTHER), 0.0)
    lost = Ending(ClosedRuns(), 3, 10.0, NAMES)
    assert not lost.kept("c", kept(run=b"n" * 16), 0.0), "of one that it does not know it cannot tell"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format":1,"runs":7}', '{"format":1,"runs":["zz"]}', '{"format":1,"runs":["00"]}']
)
def test_a_damaged_list_begins_anew(tmp_path, text, caplog):
    path = tmp_path / "closed.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        found = ClosedRuns(path)
    assert RUN not in found
    found.add([RUN])
    assert RUN in ClosedRuns(path)


def test_only_the_newest_runs_are_remembered(tmp_path):
    found = ClosedRuns(tmp_path / "closed.json")
    found.add(number.to_bytes(16, "big") for number in range(5000))
    again = ClosedRuns(tmp_path / "closed.json")
    assert (0).to_bytes(16, "big") not in again
    assert (4999).to_bytes(16, "big") in again


def test_news_is_told_once_and_again_when_it_changes():
    news, waits = News(), {"a": 3, "b": 4}
    first = [
        ("a", RoundStatus(round=3, closed=False, missing=("c", "d"))),
        ("b", RoundStatus(round=4, closed=False, missing=("c", "d"))),
    ]
    assert news.of(waits, {"d", "c"}) == first
    assert news.of(waits, {"d", "c"}) == []
    assert [name for name, _ in news.of(waits, {"d"})] == ["a", "b"]
    news.forget("a")
    assert [name for name, _ in news.of(waits, {"d"})] == ["a"]
    assert news.of(waits, set()) == []


def test_presence_takes_note_of_comings_and_goings_in_their_order():
    gone = []
    presence = Presence(gone.append)
    for name in NAMES:
        presence.join(name)
    presence.leave("a", 1.0)
    presence.leave("b", 2.0)
    presence.join("a")
    assert presence.lost(100.0, 5.0) == set(), "not settled yet"
    presence.settle()
    assert gone == ["a", "b"]
    assert (presence.lost(7.0, 5.0), presence.lost(7.1, 5.0)) == (set(), {"b"})
    for name in ("a", "c", "d"):
        presence.leave(name, 8.0)
    presence.settle()
    assert presence.lost(99.0, 5.0) == set(NAMES)
    assert presence.given_up(99.0, 5.0) == set(), "all were gone: who comes next waits for the rest"


def test_nobody_makes_a_restarted_server_believe_in_a_sum_of_its_own(gathering):
    """Whoever came first and named itself alone closed the round for those who lacked the sum, or had the others refused."""
    ending = Ending(ClosedRuns(), 3, 10.0)
    for few in (("a",), ("a", "b"), ("a", "a", "b")):
        with pytest.raises(RemoteProtocolError) as caught:
            ending.kept("a", kept(clients=few), 0.0)
        assert caught.value.code == "SS-4051"
    assert not ending.open
    for name in ("b", "c", "d"):
        assert not ending.open
        assert not ending.kept(name, kept(), 1.0)
        assert ending.hear({}, 1.0) == ()
    assert ending.missing == ("a",)
    assert ending.waiting == {"b", "c", "d"}
