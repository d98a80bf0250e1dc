"""Who may send what, when: the table against a second one, for every state, role and message, on both ends."""

from __future__ import annotations

import pytest

from securesplit.errors import LocalProtocolError, RemoteProtocolError
from securesplit.protocol.codec import encode
from securesplit.protocol.messages import (
    MESSAGES,
    Backward,
    Bye,
    Confirm,
    Declined,
    DropCache,
    Failure,
    Forward,
    Gradient,
    Handover,
    Hello,
    Hidden,
    Join,
    KeepAnchor,
    Mark,
    RoundBegin,
    RoundKept,
    RoundReady,
    RoundStatus,
    Run,
    Seal,
    Secagg,
    Welcome,
)
from securesplit.protocol.states import TRANSITIONS, State
from tests.protocol.ends import (
    SAMPLES,
    forward,
    in_state,
    opened,
)

# Written out once more, by hand, from docs/protocol.md.
ENDS = {Failure, Bye}
ALLOWED = {
    ("new", "client"): {Hello, *ENDS}, ("new", "server"): ENDS,
    ("greeting", "client"): ENDS, ("greeting", "server"): {Welcome, *ENDS},
    ("offered", "client"): {Confirm, *ENDS}, ("offered", "server"): ENDS,
    ("open", "client"): {Forward, Backward, DropCache, KeepAnchor, RoundReady, RoundKept, Run, Join, Handover, Secagg, Seal, Mark, *ENDS},
    ("open", "server"): {Hidden, Declined, Gradient, RoundBegin, RoundStatus, Join, Handover, Secagg, Seal, Mark, *ENDS},
    ("closed", "client"): set(), ("closed", "server"): set(),
}  # fmt: skip
FOLLOWS = {Hello: State.GREETING, Welcome: State.OFFERED, Confirm: State.OPEN, Failure: State.CLOSED, Bye: State.CLOSED}


def test_the_table_knows_every_state_role_and_message():
    assert set(SAMPLES) == set(MESSAGES.values())
    assert set(TRANSITIONS) == set(State)
    assert all(set(row) == {"client", "server"} for row in TRANSITIONS.values())


@pytest.mark.parametrize("kind", sorted(SAMPLES, key=lambda m: m.KIND), ids=lambda m: m.__name__)
@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("state", list(State), ids=lambda s: s.value)
def test_every_state_role_and_message(state, role, kind):
    sample, allowed = SAMPLES[kind], kind in ALLOWED[state.value, role]
    after = FOLLOWS.get(kind, State.OPEN)

    sender = in_state(state, role)
    if allowed:
        sender.send(sample)
        assert sender.state is after
        assert sender.data_to_send() == [encode(sample)]
    else:
        with pytest.raises(LocalProtocolError) as caught:
            sender.send(sample)
        assert caught.value.code == "SS-4101"
        assert sender.state is state
        assert sender.data_to_send() == []

    receiver = in_state(state, "server" if role == "client" else "client")
    if allowed:
        assert receiver.receive(encode(sample)) == sample
        assert receiver.state is after
        assert receiver.data_to_send() == []
    else:
        with pytest.raises(RemoteProtocolError) as remote:
            receiver.receive(encode(sample))
        assert remote.value.code == "SS-4010"
        assert receiver.state is State.CLOSED
        assert receiver.data_to_send() == ([] if state is State.CLOSED else [encode(Failure(code="SS-4010"))])


def test_an_end_is_told_a_code_once_and_nothing_more():
    client, server = opened()
    server.fail("SS-9999")
    server.fail("SS-8888")
    assert server.data_to_send() == [encode(Failure(code="SS-9999"))]
    assert client.receive(encode(Failure(code="SS-9999"))) == Failure(code="SS-9999")
    assert client.state is State.CLOSED
    with pytest.raises(LocalProtocolError):
        client.send(forward())
