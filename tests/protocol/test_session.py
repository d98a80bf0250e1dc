"""Steps in their order, and whatever a peer may send instead."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import RemoteProtocolError
from securesplit.protocol import session as subject
from securesplit.protocol.codec import encode
from securesplit.protocol.messages import (
    Backward,
    Blob,
    Forward,
    Gradient,
    Hidden,
    Welcome,
)
from securesplit.protocol.states import State
from tests.protocol.ends import (
    JOB,
    SAMPLES,
    blob,
    carry,
    forward,
    in_state,
    opened,
    refused,
)


def test_a_learning_step_there_and_back():
    client, server = opened()
    for step in (0, 1, 7):
        client.send(forward(step))
        carry(client, server)
        server.send(Hidden(step=step, hidden=blob()))
        carry(server, client)
        client.send(Backward(step=step, gradient=blob()))
        carry(client, server)
        server.send(Gradient(step=step, gradient=blob()))
        carry(server, client)
    client.send(forward(7))  # a retry
    assert carry(client, server) == [forward(7)]


WRONG_TO_SERVER = {
    "a step that goes back": forward(2),
    "a gradient of an earlier step": Backward(step=2, gradient=blob()),
    "a gradient of a step to come": Backward(step=4, gradient=blob()),
    "a gradient with another number of rows": Backward(step=3, gradient=blob(rows=1)),
    "a gradient without rows": Backward(step=3, gradient=blob(rows=0)),
}


@pytest.mark.parametrize("message", WRONG_TO_SERVER.values(), ids=WRONG_TO_SERVER)
def test_the_server_refuses(message):
    _, server = opened()
    server.receive(encode(forward(3)))
    assert refused(server, encode(message)) == "SS-4013"


def test_the_server_refuses_a_gradient_of_a_step_that_does_not_learn():
    _, server = opened()
    server.receive(encode(forward(3, learn=False)))
    assert refused(server, encode(Backward(step=3, gradient=blob()))) == "SS-4013"


def test_the_server_refuses_a_gradient_before_any_step():
    _, server = opened()
    assert refused(server, encode(Backward(step=0, gradient=blob()))) == "SS-4013"


WRONG_TO_CLIENT = {
    "an answer to an earlier step": Hidden(step=2, hidden=blob()),
    "an answer to a step to come": Hidden(step=4, hidden=blob()),
    "an answer with another number of rows": Hidden(step=3, hidden=blob(rows=3)),
    "a gradient of another step": Gradient(step=2, gradient=blob()),
    "a gradient with another number of rows": Gradient(step=3, gradient=blob(rows=3)),
}


@pytest.mark.parametrize("message", WRONG_TO_CLIENT.values(), ids=WRONG_TO_CLIENT)
def test_the_client_refuses(message):
    client, _ = opened()
    client.send(forward(3))
    client.send(Backward(step=3, gradient=blob()))
    assert refused(client, encode(message)) == "SS-4013"


def test_the_client_refuses_answers_that_it_did_not_ask_for():
    client, _ = opened()
    assert refused(client, encode(Hidden(step=0, hidden=blob()))) == "SS-4013"
    client, _ = opened()
    client.send(forward(3))
    assert refused(client, encode(Gradient(step=3, gradient=blob()))) == "SS-4013"  # no Backward was sent yet
    client, _ = opened()
    client.send(forward(3))
    client.send(Backward(step=3, gradient=blob()))
    client.send(forward(4))
    assert refused(client, encode(Gradient(step=4, gradient=blob()))) == "SS-4013"


ZEROS = {"f32": bytes(16), "bf16": bytes(8), "int8": bytes(12)}


@pytest.mark.parametrize("codec", ZEROS)
def test_rows_are_of_the_jobs_codec_and_of_no_other(codec, monkeypatch):
    monkeypatch.setattr("tests.protocol.ends.JOB", JOB.model_copy(update={"codec": codec}))
    for dtype, data in ZEROS.items():
        client, server = opened()
        assert client.job.codec == codec
        rows = Blob(dtype=dtype, shape=(2, 2), data=data)
        client.send(Forward(step=0, lengths=(2,), learn=True, hidden=rows))
        sent = client.data_to_send()[0]
        if dtype == codec:
            server.receive(sent)
            server.send(Hidden(step=0, hidden=rows))
            carry(server, client)
        else:
            assert refused(server, sent) == "SS-4005"
            assert refused(client, encode(Hidden(step=0, hidden=rows))) == "SS-4005"


def test_a_narrowed_session_accepts_its_width_only():
    client, _ = opened()
    client.narrow(3)
    client.send(forward(0))
    client.receive(encode(Hidden(step=0, hidden=blob(width=3))))
    assert refused(client, encode(Hidden(step=0, hidden=blob(width=4)))) == "SS-4005"


# ---- the fuzzer ------------------------------------------------------------------------------------------------------

CODES = {
    "SS-4001",
    "SS-4002",
    "SS-4003",
    "SS-4004",
    "SS-4005",
    "SS-4006",
    "SS-4010",
    "SS-4012",
    "SS-4013",
    "SS-4031",
    "SS-4032",
}


@given(data=st.data(), state=st.sampled_from(State), role=st.sampled_from(["client", "server"]))
@settings(max_examples=300, deadline=None)
def test_only_remote_protocol_errors_escape(strategies, data, state, role):
    session = in_state(state, role)
    frames = st.one_of(
        st.binary(max_size=80),
        st.binary(max_size=80).map(lambda b: b"SS\x01" + b),
        strategies.any.map(encode),
        st.tuples(strategies.any.map(encode), st.integers(0, 1 << 16), st.integers(0, 255)).map(
            lambda t: t[0][: t[1] % len(t[0])] + bytes([t[2]]) + t[0][t[1] % len(t[0]) + 1 :]
        ),
    )
    for frame in data.draw(st.lists(frames, min_size=1, max_size=6)):
        try:
            session.receive(frame)
        except RemoteProtocolError as error:  # Any other exception is a fault and escapes.
            code = error.code
        else:
            continue
        assert code in CODES
        assert session.state is State.CLOSED
        return


@given(job=st.text(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(type(JOB).model_fields)), inner, max_size=4),
    max_leaves=10).map(json.dumps))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_no_job_text_gets_further_than_a_code(job):
    session = in_state(State.GREETING, "client")
    assert refused(session, encode(SAMPLES[Welcome].model_copy(update={"job": job}))) == "SS-4006"


@pytest.mark.parametrize("job", ["[" * 30_000, '{"name":' * 8000, "1" * 60_000, '"\\ud800"', "NaN", "1e999"])
def test_no_json_bomb_gets_further_than_a_code(job):
    session = in_state(State.GREETING, "client")
    assert refused(session, encode(SAMPLES[Welcome].model_copy(update={"job": job}))) == "SS-4006"


def test_the_session_uses_no_clock_no_randomness_and_no_network():
    for name in ("os", "time", "random", "secrets", "socket", "asyncio"):
        assert not hasattr(subject, name)
