"""Who steps when, in modes where clients of one lane step one after another: against plain models of a queue and of a wheel."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import RemoteProtocolError
from securesplit.protocol.messages import Backward, Blob, Forward
from securesplit.server.attendance import Attendance
from securesplit.server.course import Ask, Average, Pass
from securesplit.server.lanes import Lanes

ROWS = Blob(dtype="f32", shape=(1, 1), data=bytes(4))


def forward(who: int, step: int = 0, *, learn: bool = True) -> Ask:
    return Ask(who, "abcdefgh"[who], Forward(step=step, lengths=(1,), learn=learn, hidden=ROWS))


def backward(who: int, step: int = 0) -> Ask:
    return Ask(who, "abcdefgh"[who], Backward(step=step, gradient=ROWS))


def lanes_of(*members: str, patience: float = 120.0, late: float = 60.0, **options) -> Lanes:
    roster = tuple(name for names in members for name in names)
    return Lanes(tuple(tuple(m) for m in members), Attendance(roster, late), patience=patience, **options)


def ran(due) -> list:
    """Names of who runs, with 0 for a mean."""
    return [0 if isinstance(one, Average) else "+".join(ask.name for ask in one.asks) for one in due]


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.sampled_from(["ask", "done", "lost"]), st.integers(0, 3)), max_size=40))
def test_one_lane_is_a_queue_with_one_holder(moves):
    lanes, holder, queue = lanes_of("abcd"), None, deque()
    for number, (move, who) in enumerate(moves):
        if move == "ask":
            if who in [c for c, _ in queue]:
                continue  # A client waits for its answer before it asks again.
            step = forward(who, number)
            wanted = [Pass((step,))] if holder in {None, who} else []
            if wanted:
                holder = who
            else:
                queue.append((who, step))
            assert lanes.ask(step, 0.0) == wanted
            continue
        if move == "lost":
            queue = deque((c, m) for c, m in queue if c != who)
        got = lanes.done(backward(who), 0.0) if move == "done" else lanes.lost(who, 0.0)
        wanted = []
        if holder == who:
            following = queue.popleft() if queue else None
            holder = following[0] if following else None
            wanted = [Pass((following[1],))] if following else []
        assert got == wanted


def test_a_turn_that_is_held_too_long_is_overdue_from_its_own_start():
    lanes = lanes_of("abc", patience=10.0)
    assert lanes.tick(1e9) == ((), [])
    lanes = lanes_of("abc", patience=10.0)
    lanes.ask(forward(1), 100.0)
    lanes.ask(forward(2), 100.0)
    assert lanes.tick(110.0)[0] == ()
    assert lanes.tick(110.1)[0] == (1,)
    lanes.done(backward(1), 111.0)
    assert lanes.tick(120.0)[0] == ()
    assert lanes.tick(121.5)[0] == (2,)


def test_another_step_of_the_holders_own_gives_it_no_more_time():
    """A trainer that never sends its gradient would keep everybody else waiting for ever."""
    lanes = lanes_of("abc", patience=10.0)
    lanes.ask(forward(1), 0.0)
    lanes.ask(forward(2), 0.0)
    assert ran(lanes.ask(forward(1, 1), 9.0)) == ["b"]
    assert lanes.tick(10.5)[0] == (1,)


@settings(deadline=None, max_examples=60)
@given(st.permutations([0, 1, 2] * 3), st.randoms(use_true_random=False))
def test_in_the_rosters_order_the_order_of_asking_does_not_matter(asking, rng):
    """Each client makes three steps, and may ask for its next one as soon as its last is done."""
    del rng
    lanes, left, waiting, order = lanes_of("abc", order="roster"), [3, 3, 3], set(), []
    pending = list(asking)
    due: list = []
    while any(left):
        while pending:
            who = pending.pop(0)
            if who not in waiting and left[who]:
                waiting.add(who)
                due += lanes.ask(forward(who, 3 - left[who]), 0.0)
        assert len(due) == 1, "one at a time, and never nobody while all have asked"
        (run,) = due
        who = run.asks[0].connection
        order.append(who)
        left[who] -= 1
        waiting.discard(who)
        due = [] if left[who] else lanes.rests("abc"[who], 0.0)
        due += lanes.done(backward(who), 0.0)
        pending = [0, 1, 2]
    assert order == [0, 1, 2] * 3


def test_who_is_late_is_left_out_and_may_come_back():
    lanes = lanes_of("abc", order="roster", late=30.0)
    assert lanes.ask(forward(1), 0.0) == [], "a is first"
    assert lanes.tick(30.0) == ((), [])
    assert ran(lanes.tick(31.0)[1]) == ["b"]
    assert lanes.ask(forward(0), 32.0) == []
    lanes.ask(forward(2), 32.0)
    assert ran(lanes.done(backward(1), 33.0)) == ["c"]
    assert ran(lanes.done(backward(2), 34.0)) == ["a"]


def test_copies_are_averaged_when_all_have_made_their_steps():
    lanes = lanes_of("a", "b", "c", every=2, replicated=True)
    for step in range(2):
        for who in (0, 1):
            assert ran(lanes.ask(forward(who, step), 0.0)) == ["abc"[who]]
            assert lanes.done(backward(who, step), 0.0) == []
    assert lanes.ask(forward(0, 2), 1.0) == [], "a has made its two steps and waits for c"
    assert lanes.ask(forward(1, 2, learn=False), 1.0) == [], "and so does b's evaluation"
    assert ran(lanes.ask(forward(2), 1.0)) == ["c"]
    lanes.done(backward(2), 1.0)
    assert ran(lanes.ask(forward(2, 1), 1.0)) == ["c"]
    assert ran(lanes.done(backward(2, 1), 1.0)) == [0, "a", "b"]
    assert ran(lanes.ask(forward(2, 2), 1.0)) == ["c"]


def test_who_rests_or_leaves_is_not_waited_for():
    lanes = lanes_of("a", "b", "c", every=1, replicated=True)
    lanes.ask(forward(0), 0.0)
    lanes.done(backward(0), 0.0)
    assert lanes.ask(forward(0, 1), 0.0) == []
    assert lanes.rests("b", 0.0) == []
    assert ran(lanes.leaves("c", 0.0)) == [0, "a"]
    assert ran(lanes.done(backward(0, 1), 0.0)) == [0], "nobody else owes a step"
    lanes.rise()
    assert ran(lanes.ask(forward(0, 2), 0.0)) == ["a"]
    assert lanes.done(backward(0, 2), 0.0) == [], "b owes one again"
    assert lanes.ask(forward(0, 3), 0.0) == []
    assert ran(lanes.rests("b", 0.0)) == [0, "a"]


def test_without_a_number_of_steps_copies_are_averaged_before_the_sum():
    lanes = lanes_of("a", "b", replicated=True)
    for step in range(3):
        lanes.ask(forward(0, step), 0.0)
        lanes.done(backward(0, step), 0.0)
    assert ran(lanes.rests("a", 0.0)) == []
    lanes.ask(forward(1), 0.0)
    assert lanes.done(backward(1), 0.0) == []
    assert ran(lanes.rests("b", 0.0)) == [0]
    assert lanes.rests("b", 0.0) == [], "one mean is enough"


def test_a_mean_waits_for_a_pending_graph_and_for_nobody_who_is_gone():
    lanes = lanes_of("a", "b", every=1, replicated=True, late=30.0)
    lanes.ask(forward(0), 0.0)
    lanes.ask(forward(1), 0.0)
    assert lanes.done(backward(0), 0.0) == []
    assert lanes.ask(forward(0, 1), 0.0) == []
    assert lanes.lost(1, 1.0) == [], "b may be back"
    assert ran(lanes.tick(40.0)[1]) == [0, "a"]
    assert ran(lanes.ask(forward(1, 1), 41.0)) == ["b"]


def test_a_gradient_out_of_turn_does_not_cost_the_holder_its_graph():
    lanes = lanes_of("ab")
    lanes.ask(forward(0), 0.0)
    assert lanes.ask(forward(1), 0.0) == []
    with pytest.raises(RemoteProtocolError) as caught:
        lanes.ask(backward(1), 0.0)
    assert caught.value.code == "SS-4014"
    assert ran(lanes.ask(backward(0), 0.0)) == ["a"]


def test_whoever_waits_for_a_mean_is_not_forgotten_when_others_go_on():
    """b's turn has set back the only clock once; b rests then, c is silent, and a waited for ever."""
    lanes = lanes_of("a", "b", "c", every=1, replicated=True, late=30.0)
    lanes.ask(forward(0), 0.0)
    lanes.done(backward(0), 0.0)
    assert lanes.ask(forward(0, 1), 0.0) == []
    lanes.ask(forward(1), 1.0)
    lanes.done(backward(1), 2.0)
    lanes.rests("b", 2.0)
    assert lanes.tick(30.0) == ((), [])
    assert ran(lanes.tick(31.0)[1]) == [0, "a"]


def test_progress_in_one_lane_does_not_make_another_wait_longer():
    lanes = lanes_of("ab", "cd", order="roster", every=100, replicated=True, late=30.0)
    assert lanes.ask(forward(1), 0.0) == [], "a is first, and silent"
    for step in range(8):
        for who in (2, 3):
            lanes.ask(forward(who, step), 5.0 * step)
            lanes.done(backward(who, step), 5.0 * step)
    assert ran(lanes.tick(36.0)[1]) == ["b"]


def test_a_clock_of_nobody_makes_nobody_absent():
    lanes = lanes_of("abc", order="roster", late=30.0)
    assert lanes.ask(forward(1), 0.0) == []
    lanes.lost(1, 1.0)
    lanes.tick(2.0)
    assert lanes.ask(forward(1), 31.0) == []
    assert lanes.tick(40.0) == ((), []), "nobody was waited for between"


def test_a_sum_that_begins_without_one_averages_the_copies():
    lanes = lanes_of("a", "b", "c", replicated=True)
    for who in (0, 1):
        lanes.ask(forward(who), 0.0)
        lanes.done(backward(who), 0.0)
        assert lanes.rests("ab"[who], 0.0) == [], "c may come yet"
    assert ran(lanes.begins(10.0)) == [0]
    assert lanes.begins(11.0) == [], "another try of the same sum"


def test_the_mean_before_a_sum_waits_for_a_pending_graph():
    lanes = lanes_of("a", "b", replicated=True)
    lanes.ask(forward(0), 0.0)
    lanes.done(backward(0), 0.0)
    lanes.ask(forward(1), 0.0)
    lanes.rests("a", 0.0)
    assert lanes.begins(10.0) == []
    assert lanes.ask(forward(0, 1, learn=False), 11.0) == [], "an evaluation is of the mean"
    guest = Ask(7, "guest", Forward(step=0, lengths=(1,), learn=False, hidden=ROWS))
    assert lanes.ask(guest, 11.0) == [Pass((guest,))]
    assert ran(lanes.done(backward(1), 12.0)) == [0, "a"]
    assert ran(lanes.ask(forward(1, 1), 13.0)) == ["b"]
