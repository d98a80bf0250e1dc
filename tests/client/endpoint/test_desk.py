"""One client for many: in turn, a bounded queue, and a new session only where the old one may be broken."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pytest

from securesplit.client.endpoint.desk import Desk, Gave
from securesplit.errors import BudgetExhausted, ConnectionFailed, InputError, SecureSplitError


def staying() -> bool:
    return False


class Sessions:
    def __init__(self) -> None:
        self.opened = self.closed = 0
        self.refuse: SecureSplitError | None = None

    @contextmanager
    def __call__(self):
        if self.refuse is not None:
            raise self.refuse
        self.opened += 1
        try:
            yield object()
        finally:
            self.closed += 1


def test_a_session_is_kept_until_it_may_be_broken():
    sessions = Sessions()
    desk = Desk(sessions)
    first = desk.client()
    assert desk.client() is first
    assert not desk.failed(BudgetExhausted("SS-5001", "x"))
    assert not desk.failed(InputError("SS-1275", "x"))
    assert desk.client() is first
    assert desk.failed(ConnectionFailed("SS-3020", "x"))
    assert sessions.closed == 1
    sessions.refuse = ConnectionFailed("SS-3030", "x")
    with pytest.raises(ConnectionFailed):
        desk.client()
    sessions.refuse = None
    assert desk.client() is not first
    desk.end()
    assert (sessions.opened, sessions.closed) == (2, 2)


def test_seats_are_taken_in_turn_and_the_queue_is_bounded():
    desk = Desk(Sessions(), waiting=1, patience=0.3)
    order: list[str] = []

    def sit(name: str) -> None:
        try:
            with desk.seat(staying):
                order.append(name)
        except InputError as error:
            order.append(error.code)

    with desk.seat(staying):
        waits = threading.Thread(target=sit, args=("second",))
        waits.start()
        time.sleep(0.05)
        sit("third")
        assert order == ["SS-1277"], "there is room for one to wait"
    waits.join(5)
    assert order == ["SS-1277", "second"]
    with desk.seat(staying):
        late = threading.Thread(target=sit, args=("late",))
        late.start()
        late.join(5)
    assert order[2:] == ["SS-1277"], "and patience ends"
    sit("again")
    assert order[3:] == ["again"]


def test_who_leaves_the_queue_makes_room():
    desk = Desk(Sessions(), waiting=1)
    with desk.seat(staying), pytest.raises(Gave), desk.seat(lambda: True):
        pass
    with desk.seat(staying):
        pass
