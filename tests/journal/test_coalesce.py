"""Floods: few rows, and the counts add up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.journal.coalesce import Coalescer
from securesplit.journal.events import Refused


def knock(host: int = 1, port: int = 1, code: str = "SS-3205") -> Refused:
    return Refused(stage="tls", code=code, address=f"10.0.{host // 250}.{host % 250}:{port}", connection=port)


def test_the_first_comes_at_once_and_the_rest_as_a_number():
    counting = Coalescer()
    assert counting.offer(knock(port=5), 0.0) == (knock(port=5),)
    for port in range(6, 10):
        assert counting.offer(knock(port=port), 0.5) == ()
    assert counting.due(0.9) == ()
    (row,) = counting.due(1.0)
    assert (row.count, row.address, row.connection) == (4, "10.0.0.1:0", 0)
    assert counting.due(5.0) == ()
    assert counting.offer(knock(port=7), 9.0) == (knock(port=7),)


def test_others_are_not_held_up():
    counting = Coalescer()
    for host in range(1, 5):
        assert counting.offer(knock(host), 0.0) == (knock(host),)
    assert counting.offer(knock(1, code="SS-3203"), 0.0) == (knock(1, code="SS-3203"),)


@given(knocks=st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 0.3)), max_size=400))
@settings(max_examples=50, deadline=None)
def test_no_refusal_is_left_out_and_memory_is_bounded(knocks):
    counting, now, rows = Coalescer(), 0.0, []
    for host, pause in knocks:
        now += pause
        rows += counting.offer(knock(host), now)
        assert len(counting._since) <= 1025
    rows += counting.due(now, all_of_them=True)
    assert sum(row.count for row in rows) == len(knocks)


def test_a_flood_from_everywhere_is_few_rows():
    counting, rows = Coalescer(), []
    for number in range(50_000):
        rows += counting.offer(knock(number), number / 50_000)
    rows += counting.due(1.0, all_of_them=True)
    assert len(rows) < 1100
    assert sum(row.count for row in rows) == 50_000
