"""Who stands where in the queue for memory: first sessions before second ones, whoever they are and however many each has."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.server.turns import Turns


def order(turns: Turns) -> list[int]:
    found = turns.standings()
    return sorted(found, key=lambda connection: found[connection])


def test_a_first_session_stands_before_everybodys_second():
    turns = Turns()
    for connection in (1, 2, 3, 4):
        turns.enter(connection, "greedy")
    turns.enter(5, "modest")
    turns.enter(6, "modest")
    assert order(turns) == [1, 5, 2, 6, 3, 4]
    assert turns.standings()[5] == (0, turns.standings()[6][1])


def test_whose_first_session_ends_is_next_after_those_who_waited():
    """The second session that moves up would have been before everybody, had it kept the age of its own."""
    turns = Turns()
    for connection in (1, 2):
        turns.enter(connection, "greedy")
    turns.enter(5, "modest")
    turns.leave(1)
    assert order(turns) == [5, 2]
    turns.enter(1, "greedy")
    assert order(turns) == [5, 2, 1]


def test_who_is_set_back_comes_after_everybody_of_its_kind():
    turns = Turns()
    for connection, client in ((1, "a"), (2, "b"), (3, "b"), (4, "a")):
        turns.enter(connection, client)
    assert order(turns) == [1, 2, 4, 3]
    turns.set_back("a")
    turns.set_back("nobody")
    assert order(turns) == [2, 1, 3, 4]


def test_who_enters_twice_keeps_its_place_and_who_left_leaves_nothing():
    turns = Turns()
    turns.enter(1, "a")
    turns.enter(2, "b")
    turns.enter(1, "a")
    assert order(turns) == [1, 2]
    for connection in (1, 2, 2):
        turns.leave(connection)
    assert turns.standings() == {}
    assert not turns


class Plain:
    """The rule once more, by lists: each client's sessions in a line, and the clients in the line of their firsts."""

    def __init__(self) -> None:
        self.lines: dict[str, list[int]] = {}  # Clients in the order in which their first sessions became the first.

    def enter(self, connection: int, client: str) -> None:
        line = self.lines.setdefault(client, [])
        if connection not in line:
            line.append(connection)

    def leave(self, connection: int) -> None:
        for client, line in list(self.lines.items()):
            if connection in line:
                first = line[0] == connection
                line.remove(connection)
                if first:
                    del self.lines[client]
                    self.lines |= {client: line} if line else {}

    def order(self) -> list[int]:
        longest = max(map(len, self.lines.values()), default=0)
        return [line[n] for n in range(longest) for line in self.lines.values() if n < len(line)]


STEP = st.tuples(st.booleans(), st.integers(0, 11))


@settings(deadline=None, max_examples=60)
@given(st.lists(STEP, max_size=40))
def test_the_order_is_that_of_plain_lines_and_first_sessions_lead_it(steps):
    turns, plain = Turns(), Plain()
    for enters, connection in steps:
        client = "abcd"[connection % 4]
        if enters:
            turns.enter(connection, client)
            plain.enter(connection, client)
        else:
            turns.leave(connection)
            plain.leave(connection)
        assert order(turns) == plain.order()
        clients = ["abcd"[connection % 4] for connection in order(turns)]
        assert len(set(clients[: len(set(clients))])) == len(set(clients)), "one of each before a second of anybody"
