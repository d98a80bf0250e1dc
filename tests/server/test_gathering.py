"""Who decides when clients are ready for different things, and how long they wait."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.protocol.messages import RoundReady
from securesplit.server.gathering import Gathering

ROSTER = ("a", "b", "c", "d", "e")


def ready(number: int) -> RoundReady:
    return RoundReady(round=number, dim=4, frozen="0" * 64)


@pytest.fixture
def gathering():
    return Gathering(ROSTER, 3, 10.0)


def test_nobody_is_never_due(gathering):
    assert not gathering.due(set(ROSTER), 1e9)


def test_all_are_due_at_once_and_the_largest_group_decides(gathering):
    for name, number in zip(ROSTER, (0, 7, 7, 3, 7), strict=True):
        assert not gathering.due(set(), 0.0)
        gathering.add(name, ready(number), 0.0)
    assert gathering.due(set(), 0.0)
    group, enough = gathering.take()
    assert (group.message, group.names, set(group.others), enough) == (ready(7), ("b", "c", "e"), {"a", "d"}, True)
    assert not gathering.due(set(ROSTER), 1e9), "nobody waits any more"


def test_of_two_groups_alike_the_one_that_waits_for_longer_decides(gathering):
    for at, (name, number) in enumerate((("a", 1), ("b", 2), ("c", 2), ("d", 1))):
        gathering.add(name, ready(number), float(at))
    group, enough = gathering.take()
    assert (group.names, enough) == (("a", "d"), False)


def test_nobody_waits_for_the_lost_where_enough_are_ready(gathering):
    gathering.add("a", ready(0), 0.0)
    gathering.add("b", ready(0), 0.0)
    assert not gathering.due({"c", "d", "e"}, 1.0), "too few; they may come back"
    gathering.add("c", ready(0), 1.0)
    assert not gathering.due({"d"}, 1.0)
    assert gathering.due({"d", "e"}, 1.0)


def test_the_first_waits_so_long_and_saying_it_again_changes_nothing(gathering):
    gathering.add("a", ready(0), 0.0)
    gathering.add("a", ready(0), 9.0)
    assert not gathering.due(set(), 10.0)
    assert gathering.due(set(), 10.1)
    gathering.restart(20.0)
    assert not gathering.due(set(), 30.0)
    assert gathering.due(set(), 30.1)
    gathering.drop("a")
    gathering.drop("nobody")
    assert not gathering.due(set(), 1e9)


def test_an_odd_one_that_was_first_does_not_shorten_the_time_of_the_rest(gathering):
    gathering.add("a", ready(0), 0.0)
    gathering.add("b", ready(5), 9.0)
    gathering.add("c", ready(5), 9.5)
    assert not gathering.due(set(), 10.5)
    assert gathering.due(set(), 19.1)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(ROSTER), st.integers(0, 2), st.floats(0, 100)), min_size=1, max_size=20))
def test_whoever_was_ready_is_named_once_and_no_other_group_is_larger(said):
    gathering, last = Gathering(ROSTER, 3, 10.0), {}
    for name, number, at in said:
        gathering.add(name, ready(number), at)
        last[name] = number
    group, enough = gathering.take()
    assert sorted((*group.names, *group.others)) == sorted(last)
    sizes = [sum(1 for n in last.values() if n == number) for number in set(last.values())]
    assert len(group.names) == max(sizes)
    assert enough == (max(sizes) >= 3)
    assert {last[name] for name in group.names} == {group.message.round}
    assert all(last[name] != group.message.round for name in group.others)


def test_while_the_one_that_all_wait_for_is_at_work_nobody_has_waited(gathering):
    """In mode sequential the others are ready at once; a sum without the one that learns would be a sum of zeros."""
    for name in ("a", "b", "c", "d"):
        gathering.add(name, ready(0), 0.0)
    gathering.worked = 9.0
    assert not gathering.due(set(), 18.0)
    assert gathering.due(set(), 19.1)
