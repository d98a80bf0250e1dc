"""The policy that a server offers, on a real handshake: looser ones are refused, stricter ones bind, and both ends know which."""

from __future__ import annotations

import json
import math

import pytest

from securesplit.client.dial import greet
from securesplit.client.verdict import judge
from securesplit.errors import PolicyDenied, RemoteProtocolError
from securesplit.policy.load import parse_policy
from securesplit.protocol.codec import decode
from securesplit.protocol.messages import Confirm, Failure, Forward
from securesplit.protocol.offer import parse_offer, require_short
from securesplit.protocol.session import Session
from securesplit.transport.memory import MemoryServer
from tests.e2e.house import ANY, FROZEN, LAB, SpyPipe, batches_of, policy_text, sentences

OWN = parse_policy(policy_text(FROZEN))
STRICT = parse_policy(policy_text(FROZEN.replace("epsilon = 8.0", "epsilon = 2.0"), buckets=[8, 16]))
LOOSE = parse_policy(policy_text(FROZEN.replace("epsilon = 8.0", "epsilon = 9.0"), max_sequences=9))
UNSAFE = parse_policy(policy_text(LAB))


def refused(house, offer, own=OWN):
    """What the client raised, and what it sent."""
    server = MemoryServer(house.core(house.job(), offer))
    mine, theirs = house.parties("alice")
    spy = SpyPipe(server.connect("alice", theirs))
    with pytest.raises(PolicyDenied) as caught:
        greet(spy, mine, own, name="alice", server="gpu")
    return caught.value, [decode(data, ANY) for data in spy.sent]


@pytest.mark.parametrize(("offer", "rules"), [
    (LOOSE, ["privacy.epsilon", "limits.max_sequences"]), (UNSAFE, ["privacy.mechanism", "aggregation.blind"]),
])  # fmt: skip
def test_a_looser_offer_is_refused_by_every_rule_and_nothing_is_sent(house, offer, rules):
    error, sent = refused(house, offer)
    assert (error.code, error.exit_code) == ("SS-2060", 3)
    assert [line.split(":")[0] for line in error.details] == rules
    assert not [m for m in sent if isinstance(m, Confirm | Forward)]
    assert sent[-1] == Failure(code="SS-2060"), "the server's operator reads why"


def test_an_offer_that_is_stricter_here_and_looser_there_is_refused(house):
    mixed = parse_policy(policy_text(FROZEN.replace("epsilon = 8.0", "epsilon = 1.0"), max_message_bytes=1 << 21))
    error, _ = refused(house, mixed)
    assert [line.split(":")[0] for line in error.details] == ["limits.max_message_bytes"]


def test_the_same_policy_binds_as_it_is(house):
    core = house.core(house.job(), OWN)
    link, spy = house.link(MemoryServer(core), OWN)
    (confirm,) = spy.messages(Confirm)
    assert link.policy is OWN
    assert confirm.policy == OWN.digest
    (connection,) = core._connections.values()
    assert connection.session.agreed == OWN.digest


def test_a_stricter_offer_binds_what_leaves(house, open_ledger):
    core = house.core(house.job(), STRICT)
    link, spy = house.link(MemoryServer(core), OWN)
    assert link.policy.digest == STRICT.digest
    (confirm,) = spy.messages(Confirm)
    (connection,) = core._connections.values()
    assert confirm.policy == STRICT.digest == connection.session.agreed
    client = house.client(link, link.bound(OWN), open_ledger())
    assert client.policy.privacy.epsilon == 2.0
    batch = batches_of(client, sentences(2, seed=1))[0]
    assert batch.tokens.shape[1] in (8, 16)
    client.loss(batch)
    # mu of epsilon 2 at delta 1e-5 is 0.47, and activations have 0.6 of its square: by what the ledger was charged.
    assert client.ledger.mu() == pytest.approx(0.4653 * math.sqrt(0.6), rel=1e-3)
    assert spy.messages(Forward)


def test_a_policy_that_is_not_the_dialled_one_is_held_to_the_session_too(house):
    link, _ = house.link(MemoryServer(house.core(house.job(), STRICT)), OWN)
    other = parse_policy(policy_text(FROZEN.replace("epsilon = 8.0", "epsilon = 4.0")))
    assert link.bound(OWN) is link.policy
    assert link.bound(other).privacy.epsilon == 2.0


def test_without_an_offer_the_clients_own_policy_holds(house, monkeypatch):
    core = house.core(house.job(), UNSAFE)
    offer = Session.offer
    monkeypatch.setattr(Session, "offer", lambda self, **said: offer(self, **{**said, "policy": None}))
    link, spy = house.link(MemoryServer(core), OWN)
    assert link.policy is OWN
    assert spy.messages(Confirm)[0].policy == ""
    (connection,) = core._connections.values()
    assert connection.session.agreed == OWN.digest


@pytest.mark.parametrize("spoil", [
    lambda t: "x", lambda t: "[" * 9999, lambda t: "null", lambda t: t.replace(",", ", ", 1), lambda t: t.replace("8.0", "8"),
    lambda t: t.replace('"name":"tiny"', '"name":"tiny","name":"tiny"'), lambda t: t.replace("8.0", "NaN"), lambda t: t + " ",
    lambda t: t.replace('"epsilon":8.0', '"epsilon":-1.0'), lambda t: json.dumps({"name": "x"}),
])  # fmt: skip
def test_an_offer_has_one_spelling(spoil):
    text = OWN.canonical().decode()
    assert parse_offer(text) == OWN
    assert parse_offer("") is None
    assert spoil(text) != text
    with pytest.raises(RemoteProtocolError, match="SS-4030"):
        parse_offer(spoil(text))


def test_a_policy_that_no_welcome_has_room_for_is_not_served():
    require_short(OWN)
    long = OWN.model_copy(update={"purpose": "x" * (1 << 15)})
    with pytest.raises(Exception, match="SS-1103"):
        require_short(long)


def test_the_verdict_tells_all_that_a_handshake_would(house):
    job = house.job(blind=False)
    found = judge(OWN, job=job, offer=LOOSE)
    assert [(b.source, b.rule) for b in found.refusals] == [
        ("offer", "privacy.epsilon"), ("offer", "limits.max_sequences"), ("job", "aggregation.blind"),
    ]  # fmt: skip
    assert (found.refusals[0].policy, found.refusals[0].other) == (8.0, 9.0)
    assert (found.refusals[2].policy, found.refusals[2].other) == (True, False)
    assert not found.admitted
    assert found.agreed is None
    fine = judge(OWN, job=house.job(), offer=STRICT)
    assert fine.admitted
    assert fine.agreed is not None
    assert fine.agreed.digest == STRICT.digest
    asked = parse_policy(policy_text(FROZEN) + "\n[leakage]\ntoken_recovery = 0.2\nmax_age_days = 3")
    assert len(judge(asked, job=house.job()).open_questions) == 1
