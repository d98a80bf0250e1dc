"""The server among honest, late, lying and clumsy clients, and what it refuses without ending the round."""

import numpy as np
import pytest

from securesplit.aggregate import boxes, client, recover, wire
from securesplit.errors import AggregationAborted, LocalProtocolError, RemoteProtocolError

ALL = ("amir", "bea", "chloe", "dan", "eve")


def test_a_client_that_lies_about_its_shares_is_outvoted(cohort_of, signed_of):
    c = cohort_of(blind=True)
    original = c.server._take_shares

    def lie(name, answer):
        if name == "amir":
            wrong = tuple((n, bytes(31) + b"\x07") for n, _ in answer.self_shares)
            answer = answer.model_copy(update={"self_shares": wrong})
            c.server._answers[name] = answer
            return
        original(name, answer)

    c.server._take_shares = lie
    c.run(vanish={"eve": wire.MASKED})
    assert signed_of(c.clients["bea"].result.ring_sum) == c.plain_sum(("amir", "bea", "chloe", "dan"))


def test_lies_by_too_many_abort_with_the_commitment_code(cohort_of, monkeypatch):
    original = boxes.split

    def broken(secret, xs, threshold, randomness):
        shares = original(secret, xs, threshold, randomness)
        return tuple(type(s)(s.x, bytes(32)) for s in shares) if xs and broken.on else shares

    broken.on = True
    monkeypatch.setattr(boxes, "split", broken)
    c = cohort_of().run()
    assert c.server.aborted == "SS-6012"
    assert all(member.result is None for member in c.clients.values())


def test_a_repeated_message_is_ignored_and_a_changed_one_refused(cohort_of):
    c = cohort_of()
    for name in ALL[:-1]:
        c.send(name, 0, c.clients[name].advertise(), None)
    name, stage, body, _ = c.up[0]
    assert c.server.receive(name, stage, body) == []
    other = c.client(name).advertise()
    with pytest.raises(RemoteProtocolError) as error:
        c.server.receive(name, stage, other)
    assert error.value.code == "SS-6005"
    assert c.server.waiting_for == ("eve",)


def test_a_late_client_is_told_so_and_disturbs_nobody(cohort_of, signed_of):
    c = cohort_of()
    c.run(vanish={"eve": wire.SHARES}, until=wire.MASKED)
    deliveries = c.server.receive("eve", wire.SHARES, b"whatever")
    assert [(d.to, d.stage, wire.decode(wire.Abort, d.body).code) for d in deliveries] == [("eve", 15, "SS-6013")]
    assert c.server.stage == wire.CONSISTENT


def test_the_server_waits_for_nobody_whose_connection_is_gone(cohort_of, signed_of):
    c = cohort_of()
    queue = c.start()
    assert c.server.stage == wire.SHARES
    assert c.server.leave("bea") == []
    assert c.server.waiting_for == ("amir", "chloe", "dan", "eve")
    for to, stage, body, vector in queue:
        if to != "bea":
            for out in c.clients[to].receive(stage, body, vector):
                queue += c.send(to, *out)
    assert c.server.result.survivors == ("amir", "chloe", "dan", "eve")
    assert c.server.leave("amir") == []


def test_a_clients_abort_counts_as_leaving(cohort_of):
    c = cohort_of()
    c.start()
    out = c.clients["dan"].abort("SS-3201")
    assert wire.decode(wire.Abort, out.body).code == "SS-6005"
    c.server.receive("dan", *out)
    assert "dan" not in c.server.waiting_for


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (lambda v: None, "SS-6014"),
        (lambda v: v[:-1], "SS-6014"),
        (lambda v: v.astype(np.int64), "SS-6014"),
        (lambda v: v + np.uint32(1), "SS-6002"),
    ],
)
def test_a_wrong_masked_vector_is_refused_and_the_round_goes_on_without_it(cohort_of, fault, code):
    c = cohort_of()
    queue = c.start()
    refused = None
    while queue:
        to, stage, body, vector = queue.pop(0)
        for out in c.clients[to].receive(stage, body, vector):
            if to == "amir" and out.stage == wire.MASKED:
                with pytest.raises(RemoteProtocolError) as refused:
                    c.server.receive(to, out.stage, out.body, fault(out.vector))
                queue += c.server.leave("amir")
            else:
                queue += c.send(to, *out)
    assert refused.value.code == code
    assert c.server.result.survivors == ALL[1:]


def test_the_server_refuses_strangers_and_misplaced_vectors(cohort_of):
    c = cohort_of()
    body = c.clients["amir"].advertise()
    for name, stage, vector, code in [
        ("mallory", 0, None, "SS-6003"), ("bea", 0, None, "SS-6003"), ("amir", 1, None, "SS-6005"),
        ("amir", 0, np.zeros(3, dtype=np.uint32), "SS-6014"),
    ]:  # fmt: skip
        with pytest.raises(RemoteProtocolError) as error:
            c.server.receive(name, stage, body, vector)
        assert error.value.code == code
    assert c.server.waiting_for == ALL


def test_an_update_is_needed_once_and_in_time(cohort_of):
    c = cohort_of()
    member = c.clients["amir"]
    with pytest.raises(LocalProtocolError) as error:
        member.contribute(np.zeros(3), 1)
    assert error.value.code == "SS-6011"
    member.contribute(c.updates["amir"], 1)
    with pytest.raises(LocalProtocolError) as error:
        member.contribute(c.updates["amir"], 1)
    assert error.value.code == "SS-6005"


def test_a_client_without_an_update_sends_no_vector(cohort_of):
    c = cohort_of()
    queue = []
    for name, member in c.clients.items():
        if name != "eve":
            member.contribute(c.updates[name], 1)
        queue += c.send(name, 0, member.advertise(), None)
    while queue and c.clients["eve"].state is not client.State.ABORTED:
        to, stage, body, vector = queue.pop(0)
        if to == "eve" and stage == wire.SHARES:
            with pytest.raises(LocalProtocolError) as error:
                c.clients[to].receive(stage, body, vector)
            assert error.value.code == "SS-6005"
            break
        for out in c.clients[to].receive(stage, body, vector):
            queue += c.send(to, *out)
    assert c.clients["eve"].state is client.State.ABORTED


def test_the_server_checks_signatures_when_it_can(cohort_of):
    c = cohort_of()
    advert = wire.decode(wire.Advertise, c.clients["amir"].advertise())
    forged = wire.encode(advert.model_copy(update={"signature": bytes(64)}))
    with pytest.raises(RemoteProtocolError) as error:
        c.server.receive("amir", 0, forged)
    assert error.value.code == "SS-6002"


def test_secrets_are_dropped_when_the_round_is_over(cohort_of):
    c = cohort_of(blind=True).run()
    for member in c.clients.values():
        assert (member._secrets, member._held, member._group) == (None, {}, b"")
        with pytest.raises(LocalProtocolError):
            member.receive(0, b"")


def test_shares_of_dropped_clients_are_checked_against_their_public_key(cohort_of):
    c = cohort_of().run(vanish={"eve": wire.MASKED}, until=wire.UNMASK)
    opening = recover.Opening("eve", tuple(recover.Share(i, bytes(32)) for i in (1, 2, 3)))
    with pytest.raises(AggregationAborted) as error:
        recover.unmask(
            np.zeros(8, dtype=np.uint32), c.config, c.server._peers, t2=c.server._t2, pairs=recover.Pairs(frozenset()),
            survivors=[], dropped=[opening],
        )  # fmt: skip
    assert error.value.code == "SS-6012"
