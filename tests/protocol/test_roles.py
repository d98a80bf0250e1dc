"""Who may send what: the table is complete, and it holds."""

from __future__ import annotations

import pytest

from securesplit.errors import PolicyDenied
from securesplit.protocol.messages import (
    MESSAGES,
    Backward,
    Blob,
    Bye,
    Forward,
    Handover,
    Join,
    Mark,
    Message,
    RoundKept,
    RoundReady,
)
from securesplit.protocol.roles import MAY_SEND, require_right
from securesplit.protocol.states import TRANSITIONS

ROWS = Blob(dtype="f32", shape=(1, 2), data=bytes(8))


def forward(*, learn: bool) -> Forward:
    return Forward(step=0, lengths=(1,), learn=learn, hidden=ROWS)


def test_a_trainer_may_send_what_the_states_let_a_client_send_and_nothing_else():
    clients = {kind for state in TRANSITIONS.values() for kind in state["client"]}
    assert MAY_SEND["trainer"] == clients
    assert MAY_SEND["guest"] < MAY_SEND["trainer"]
    assert MAY_SEND["trainer"] <= set(MESSAGES.values())


@pytest.mark.parametrize(
    "message",
    [
        forward(learn=True),
        Backward(step=0, gradient=ROWS),
        RoundReady(round=0, dim=1, frozen="0" * 64),
        RoundKept(round=0, run=bytes(16), clients=("alice",)),
        Join(round=0, name="alice", certificate=b"der", key=bytes(32), signature=bytes(8)),
        Handover(to="alice", of="bob", asked=bytes(32), key=bytes(32), box=Blob(dtype="u8", shape=(0,), data=b"")),
        Mark(what="now", slot=1),
        Mark(what="ended"),
    ],
)
def test_a_guest_teaches_nothing_and_joins_no_sum(message: Message):
    require_right("trainer", message)
    with pytest.raises(PolicyDenied) as caught:
        require_right("guest", message)
    assert (caught.value.code, caught.value.exit_code) == ("SS-2041", 3)


def test_a_guest_generates():
    for message in (forward(learn=False), Bye()):
        require_right("guest", message)
