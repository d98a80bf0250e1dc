"""The handshake binds a session to both certificates, both nonces, the policy, the job and the model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from securesplit.errors import RemoteProtocolError
from securesplit.policy.load import load_policy
from securesplit.protocol.codec import encode
from securesplit.protocol.messages import (
    Confirm,
    Hello,
    Welcome,
)
from securesplit.protocol.session import Party, statement
from securesplit.protocol.states import State
from tests.protocol.ends import (
    ALICE,
    GPU,
    JOB,
    MALLORY,
    MODEL,
    POLICY,
    Holder,
    carry,
    hail,
    offer,
    opened,
    pair,
    refused,
)

OFFER = load_policy(Path(__file__).parents[2] / "policies" / "balanced.toml")


def test_two_ends_open_a_session():
    client, server = opened()
    assert client.state is server.state is State.OPEN
    assert client.job == JOB
    assert client.welcome.model == MODEL
    assert server.hello.policy == POLICY
    assert client.data_to_send() == server.data_to_send() == []


def test_the_statement_binds_every_field():
    hello = Hello(version=1, nonce=b"n" * 32, policy=POLICY)
    welcome = Welcome(session=b"s" * 16, nonce=b"m" * 32, job="job", model=MODEL, signature=b"x" * 8, policy="offer")
    ends = {"client": b"client", "server": b"server", "agreed": "d" * 64}

    # The oracle: SHA-256 over length-prefixed parts, as docs/protocol.md states it.
    parts = [
        b"securesplit.v1 handshake", b"client", b"server", b"client", b"\1\0", b"n" * 32, b"m" * 32, b"s" * 16,
        POLICY.encode(), MODEL.encode(), b"job", b"offer", b"d" * 64,
    ]  # fmt: skip
    expected = hashlib.sha256(b"".join(len(p).to_bytes(8, "little") + p for p in parts)).digest()
    assert statement("client", hello, welcome, **ends) == expected

    others = [
        statement("server", hello, welcome, **ends),
        statement("client", hello, welcome, **{**ends, "agreed": ""}),
        statement("client", hello, welcome, **{**ends, "agreed": "e" * 64}),
        statement("client", hello, welcome, **{**ends, "client": b"clien", "server": b"tserver"}),
        statement("client", hello, welcome, **{**ends, "client": b"server", "server": b"client"}),
        *(statement("client", hello.model_copy(update=u), welcome, **ends) for u in ({"version": 2}, {"nonce": b"o" * 32}, {"policy": "c" * 64})),
        *(
            statement("client", hello, welcome.model_copy(update=u), **ends)
            for u in ({"session": b"t" * 16}, {"nonce": b"k" * 32}, {"job": "jobs"}, {"model": "c" * 64}, {"policy": "offers"})
        ),
    ]  # fmt: skip
    assert len({expected, *others}) == 1 + len(others)
    # The signature itself is what is computed from the statement, so it is not part of it.
    assert statement("client", hello, welcome.model_copy(update={"signature": b"y" * 8}), **ends) == expected


@pytest.mark.parametrize("change", ["nonce", "session", "job", "model", "signature"])
def test_a_changed_welcome_is_refused(change):
    client, server = pair()
    hail(client, server)
    offer(server)
    other = {
        "nonce": bytes(32), "session": bytes(16), "model": "c" * 64, "signature": bytes(71),
        "job": JOB.model_copy(update={"name": "another"}).canonical(),
    }[change]  # fmt: skip
    sent = server.welcome.model_copy(update={change: other})
    assert refused(client, encode(sent)) == "SS-4012"
    assert client.job is None


@pytest.mark.parametrize("field", ["policy", "nonce"])
def test_a_hello_changed_on_the_way_is_noticed_by_the_client(field):
    client, server = pair()
    client.hail(nonce=os.urandom(32), policy=POLICY)
    client.data_to_send()
    server.receive(encode(client.hello.model_copy(update={field: {"policy": "c" * 64, "nonce": bytes(32)}[field]})))
    offer(server)
    (welcome,) = server.data_to_send()
    assert refused(client, welcome) == "SS-4012"


def test_a_middle_box_that_terminates_tls_is_noticed_by_both_ends():
    # Alice sees Mallory's certificate and the GPU sees Mallory's; Mallory passes every byte on.
    client, server = pair(client_sees=MALLORY, server_sees=MALLORY)
    hail(client, server)
    offer(server)
    (welcome,) = server.data_to_send()
    assert refused(client, welcome) == "SS-4012"

    client, server = pair(server_sees=MALLORY)  # the server's side alone
    hail(client, server)
    offer(server)
    with pytest.raises(RemoteProtocolError):
        carry(server, client)


def test_a_client_without_the_key_of_its_certificate_is_refused():
    thief = Holder(MALLORY.key, ALICE.certificate)
    client, server = pair(client=thief)
    hail(client, server)
    offer(server)
    carry(server, client)
    client.confirm()
    (confirm,) = client.data_to_send()
    assert refused(server, confirm) == "SS-4012"


def test_a_server_without_the_key_of_its_certificate_is_refused():
    client, server = pair(server=Holder(MALLORY.key, GPU.certificate))
    hail(client, server)
    offer(server)
    (welcome,) = server.data_to_send()
    assert refused(client, welcome) == "SS-4012"


def test_the_servers_signature_is_not_the_clients():
    client, server = pair(client=GPU, server=GPU)  # even if both had one key
    hail(client, server)
    offer(server)
    assert refused(server, encode(Confirm(signature=server.welcome.signature))) == "SS-4012"


def test_a_replayed_confirm_is_refused():
    client, server = pair()
    hail(client, server)
    offer(server)
    carry(server, client)
    client.confirm()
    (confirm,) = client.data_to_send()
    server.receive(confirm)

    _, another = pair()
    another.receive(encode(client.hello))  # Mallory replays the whole client; the server's nonce is a new one
    offer(another)
    assert refused(another, confirm) == "SS-4012"


def test_a_replayed_welcome_is_refused():
    client, server = pair()
    hail(client, server)
    offer(server)
    (welcome,) = server.data_to_send()
    client.receive(welcome)
    fresh, _ = pair()
    fresh.hail(nonce=os.urandom(32), policy=POLICY)
    assert refused(fresh, welcome) == "SS-4012"


def test_a_signed_job_that_breaks_the_schema_is_refused():
    client, server = pair()
    hail(client, server)
    unsigned = Welcome(session=bytes(16), nonce=bytes(32), job='{"epsilon": 1e9}', model=MODEL, signature=bytes(8))
    signed = GPU.sign(statement("server", server.hello, unsigned, client=ALICE.certificate, server=GPU.certificate))
    assert refused(client, encode(unsigned.model_copy(update={"signature": signed}))) == "SS-4006"


def test_another_version_is_refused_by_the_server():
    _, server = pair()
    assert refused(server, encode(Hello(version=2, nonce=bytes(32), policy=POLICY))) == "SS-4003"


def test_whatever_a_verifier_raises_means_no():
    def broken(*_):
        raise KeyError("not what anybody expects")

    client, server = pair()
    client._party = Party(ALICE.certificate, GPU.certificate, ALICE.sign, broken)
    hail(client, server)
    offer(server)
    (welcome,) = server.data_to_send()
    assert refused(client, welcome) == "SS-4012"


def test_both_ends_know_the_policy_that_binds_them_and_a_client_must_say_it():
    client, server = pair()
    hail(client, server)
    server.offer(session=os.urandom(16), nonce=os.urandom(32), job=JOB, model=MODEL, policy=OFFER)
    carry(server, client)
    assert client.offered == OFFER
    client.confirm("e" * 64)
    carry(client, server)
    assert client.agreed == server.agreed == "e" * 64

    client, server = pair()
    hail(client, server)
    offer(server)
    carry(server, client)
    client.confirm("e" * 64)
    carry(client, server)
    assert client.agreed == server.agreed == POLICY, "without an offer there is nothing to agree on"


@pytest.mark.parametrize(("offered", "said"), [(True, ""), (False, "e" * 64)])
def test_a_confirm_that_names_no_policy_for_an_offer_or_one_for_none_is_refused(offered, said):
    client, server = pair()
    hail(client, server)
    server.offer(session=os.urandom(16), nonce=os.urandom(32), job=JOB, model=MODEL, policy=OFFER if offered else None)
    carry(server, client)
    own = statement(
        "client", client.hello, client.welcome, client=ALICE.certificate, server=GPU.certificate, agreed=said
    )
    assert refused(server, encode(Confirm(signature=ALICE.sign(own), policy=said))) == "SS-4030"


def test_an_agreed_policy_that_was_changed_on_the_way_breaks_the_signature():
    client, server = pair()
    hail(client, server)
    server.offer(session=os.urandom(16), nonce=os.urandom(32), job=JOB, model=MODEL, policy=OFFER)
    carry(server, client)
    client.confirm("e" * 64)
    (data,) = client.data_to_send()
    assert refused(server, data.replace(b"e" * 64, b"d" * 64)) == "SS-4012"


def test_an_offer_that_was_changed_on_the_way_breaks_the_signature():
    client, server = pair()
    hail(client, server)
    server.offer(session=os.urandom(16), nonce=os.urandom(32), job=JOB, model=MODEL, policy=OFFER)
    (data,) = server.data_to_send()
    assert refused(client, data.replace(b'"epsilon":8.0', b'"epsilon":9.0')) == "SS-4012"
