"""Who comes late is shown to the others; one of them is asked for the values, another one when that one is gone."""

from __future__ import annotations

from securesplit.protocol.messages import Blob, Handover, Join
from securesplit.server.latecomers import Latecomers

HERE = ("alice", "bob", "carol")


def join(name="dora", key=1):
    return Join(round=1, name=name, certificate=b"der", key=bytes([key]) * 32, signature=bytes(8))


def handover(of, to="dora", key=1):
    box = Blob(dtype="u8", shape=(1,), data=b"x")
    return Handover(to=to, of=of, asked=bytes([key]) * 32, key=bytes(32), box=box)


def whole(shown):
    return [name for name, message in shown if message.whole]


def test_all_who_are_here_are_asked_and_one_for_the_values():
    late = Latecomers()
    shown = late.asks("dora", join(), {*HERE, "dora"}, 0.0)
    assert [name for name, _ in shown] == list(HERE)
    assert whole(shown) == ["alice"]
    assert {message.key for _, message in shown} == {bytes([1]) * 32}


def test_asked_in_vain_another_one_gives_the_values_and_in_the_end_the_first_again():
    late = Latecomers()
    givers = [whole(late.asks("dora", join(key=key), HERE, 60.0 * key)) for key in range(5)]
    assert givers == [["alice"], ["bob"], ["carol"], ["alice"], ["bob"]]


def test_when_the_giver_is_gone_whoever_speaks_next_gives():
    late = Latecomers()
    late.asks("dora", join(), HERE, 0.0)
    late.leaves("alice")
    assert whole(late.speaks("carol")) == ["carol"]
    assert whole(late.speaks("bob")) == []
    assert whole(late.speaks("carol")) == ["carol"], "of its next round"


def test_an_answer_goes_to_who_asked_by_that_key_and_to_nobody_else():
    late = Latecomers()
    late.asks("dora", join(key=1), HERE, 0.0)
    late.asks("dora", join(key=2), HERE, 0.0)
    assert late.answers("bob", handover("bob", key=1)) == [], "of an earlier question"
    assert late.answers("bob", handover("alice", key=2)) == [], "in another's name"
    assert late.answers("bob", handover("bob", to="erin", key=2)) == []
    assert late.answers("bob", handover("bob", key=2)) == [("dora", handover("bob", key=2))]


def test_who_works_again_is_shown_no_more_and_awaited_until_it_is_ready():
    late = Latecomers()
    late.asks("dora", join(), HERE, 0.0)
    assert not late.works("dora"), "nobody has helped it yet"
    late.answers("bob", handover("bob"))
    assert late.works("dora")
    assert late.speaks("alice") == []
    late.ready("dora")
    assert not late.works("dora")
    assert late.speaks("alice") == []


def test_two_who_come_late_at_once_are_shown_to_each_other_too():
    late = Latecomers()
    late.asks("dora", join(), (*HERE, "erin"), 0.0)
    shown = late.asks("erin", join("erin", 2), (*HERE, "dora"), 0.0)
    assert [name for name, _ in shown] == ["alice", "bob", "carol", "dora"]
    assert sorted(message.name for _, message in late.speaks("alice")) == ["dora", "erin"]
    late.leaves("dora")
    assert [message.name for _, message in late.speaks("alice")] == ["erin"]


def test_one_that_asks_all_the_time_troubles_the_others_once_in_a_while():
    late = Latecomers()
    shown = [late.asks("dora", join(key=key), HERE, key / 10) for key in range(25)]
    assert [number for number, asked in enumerate(shown) if asked] == [0, 10, 20]
    assert [message.key for _, message in late.speaks("bob")] == [bytes([24]) * 32], (
        "the last question is the one that counts"
    )
