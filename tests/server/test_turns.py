"""Whose learning step it is, against a plain model: at most one holder, first come first served, nobody lost."""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.protocol.messages import Blob, Forward
from securesplit.server.turns import Turns


def message(step: int) -> Forward:
    return Forward(step=step, lengths=(1,), learn=True, hidden=Blob(dtype="f32", shape=(1, 1), data=bytes(4)))


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.sampled_from(["take", "release", "forget"]), st.integers(1, 4)), max_size=40))
def test_turns_are_a_queue_with_one_holder(moves):
    turns, holder, queue = Turns(), None, deque()
    for number, (move, who) in enumerate(moves):
        step = message(number)
        if move == "take":
            if who in [c for c, _ in queue]:
                continue  # A client waits for its answer before it asks again.
            expected = holder in {None, who}
            assert turns.take(who, step, 0.0) is expected
            if expected:
                holder = who
            else:
                queue.append((who, step))
            continue
        if move == "forget":
            queue = deque((c, m) for c, m in queue if c != who)
        got = turns.release(who, 0.0) if move == "release" else turns.forget(who, 0.0)
        want = None
        if holder == who:
            want = queue.popleft() if queue else None
            holder = want[0] if want else None
        assert got == want


def test_a_turn_that_is_held_too_long_is_overdue_from_its_own_start():
    turns = Turns(patience=10.0)
    assert turns.overdue(1e9) is None
    turns.take(1, message(0), 100.0)
    turns.take(2, message(0), 100.0)
    assert turns.overdue(110.0) is None
    assert turns.overdue(110.1) == 1
    turns.release(1, 111.0)
    assert turns.overdue(120.0) is None
    assert turns.overdue(121.5) == 2


def test_another_step_of_the_holders_own_gives_it_no_more_time():
    """A trainer that never sends its gradient would keep everybody else waiting for ever."""
    turns = Turns(patience=10.0)
    turns.take(1, message(0), 0.0)
    turns.take(2, message(0), 0.0)
    assert turns.take(1, message(1), 9.0)
    assert turns.overdue(10.1) == 1
    turns.release(1, 11.0)
    turns.release(2, 12.0)
    assert turns.take(1, message(2), 13.0)
    assert turns.overdue(23.0) is None, "a new turn has the whole of its time"
