"""All clients' batches as one step: who is in it, and who keeps nobody waiting."""

from __future__ import annotations

import pytest

from securesplit.errors import RemoteProtocolError
from securesplit.protocol.messages import Backward, Blob, Forward
from securesplit.server.attendance import Attendance
from securesplit.server.course import Ask
from securesplit.server.together import Together

ROWS = Blob(dtype="f32", shape=(1, 1), data=bytes(4))


def forward(who: int, step: int = 0, *, learn: bool = True) -> Ask:
    return Ask(who, "abc"[who], Forward(step=step, lengths=(1,), learn=learn, hidden=ROWS))


def backward(who: int, step: int = 0) -> Ask:
    return Ask(who, "abc"[who], Backward(step=step, gradient=ROWS))


def ran(due) -> list[str]:
    return ["+".join(ask.name for ask in one.asks) for one in due]


def together() -> Together:
    return Together(Attendance(("a", "b", "c"), 30.0), patience=10.0)


def test_a_step_holds_everybody_in_the_rosters_order():
    course = together()
    for step in range(2):
        assert course.ask(forward(2, step), 0.0) == []
        assert course.ask(forward(0, step), 0.0) == []
        assert ran(course.ask(forward(1, step), 0.0)) == ["a+b+c"]
        assert [course.learns(n) for n in range(3)] == [True] * 3
        assert course.ask(backward(1, step), 0.0) == []
        assert course.ask(backward(2, step), 0.0) == []
        assert ran(course.ask(backward(0, step), 0.0)) == ["a+b+c"]
        for who in range(3):
            assert course.done(backward(who, step), 0.0) == []


def test_evaluation_waits_for_nobody():
    assert ran(together().ask(forward(1, learn=False), 0.0)) == ["b"]


def test_a_client_asks_once_and_brings_the_gradient_of_its_step():
    course = together()
    course.ask(forward(0), 0.0)
    with pytest.raises(RemoteProtocolError) as caught:
        course.ask(forward(0, 1), 0.0)
    assert caught.value.code == "SS-4025"
    for wrong in (backward(0), backward(1)):
        with pytest.raises(RemoteProtocolError) as caught:
            course.ask(wrong, 0.0)
        assert caught.value.code == "SS-4014"
    course.ask(forward(1), 0.0)
    course.ask(forward(2), 0.0)
    with pytest.raises(RemoteProtocolError):
        course.ask(backward(0, 1), 0.0)


def test_who_is_late_is_left_out_of_this_step_alone():
    course = together()
    course.ask(forward(0), 0.0)
    course.ask(forward(1), 5.0)
    assert course.tick(30.0) == ((), [])
    assert ran(course.tick(31.0)[1]) == ["a+b"]
    assert course.ask(forward(2), 32.0) == [], "a step is under way"
    course.ask(backward(0), 33.0)
    assert ran(course.ask(backward(1), 33.0)) == ["a+b"]
    assert course.done(backward(0), 33.0) == []
    assert course.done(backward(1), 33.0) == [], "a and b owe a step, too"
    course.ask(forward(0, 1), 34.0)
    assert ran(course.ask(forward(1, 1), 34.0)) == ["a+b+c"]


def test_a_slow_gradient_costs_its_owner_the_connection_and_the_others_go_on():
    course = together()
    for who in range(3):
        course.ask(forward(who), 0.0)
    course.ask(backward(0), 1.0)
    assert course.tick(10.0)[0] == ()
    assert course.tick(11.0)[0] == (1, 2)
    assert course.lost(1, 11.0) == []
    assert ran(course.lost(2, 11.0)) == ["a"]


def test_who_rests_or_leaves_is_not_waited_for():
    course = together()
    course.ask(forward(0), 0.0)
    assert course.rests("b", 0.0) == []
    assert ran(course.leaves("c", 0.0)) == ["a"]
    course.ask(backward(0), 0.0)
    course.done(backward(0), 0.0)
    course.rise()
    assert course.ask(forward(0, 1), 0.0) == [], "b owes a step again; c is gone for good"
    assert ran(course.ask(forward(1), 0.0)) == ["a+b"]


def test_a_client_that_came_back_is_in_the_step_by_its_new_connection():
    """A connection may be gone long before the server sees that."""
    course = together()
    course.ask(forward(0), 0.0)
    back = Ask(7, "a", Forward(step=0, lengths=(1,), learn=True, hidden=ROWS))
    assert course.ask(back, 1.0) == []
    assert course.lost(0, 2.0) == []
    course.ask(forward(1), 3.0)
    (run,) = course.ask(forward(2), 3.0)
    assert run.asks[0] is back


def test_nobody_is_absent_by_the_clock_of_one_who_went():
    course = together()
    course.ask(forward(0), 0.0)
    course.lost(0, 1.0)
    course.tick(2.0)
    course.ask(forward(0), 40.0)
    assert course.tick(41.0) == ((), [])


def test_a_guest_that_says_goodbye_is_nobody_to_wait_for():
    course = together()
    assert course.leaves("guest", 0.0) == []
    assert course._attendance.roster == ("a", "b", "c")
