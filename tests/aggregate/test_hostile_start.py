"""A hostile server, or a client by way of it, in stages 0 and 1: false adverts, false floors, false shares."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from securesplit.aggregate import wire
from securesplit.aggregate.config import Floors
from securesplit.aggregate.keys import statement
from securesplit.errors import AggregationAborted, RemoteProtocolError

ALL = ("amir", "bea", "chloe", "dan", "eve")
# Stage 0: adverts.


def adverts_with(cohort, whose, /, **changes):
    roster = cohort.told("amir", 0)
    parsed = [wire.decode(wire.Advertise, a) for a in roster.adverts]
    changed = [wire.encode(a.model_copy(update=changes) if a.name == whose else a) for a in parsed]
    return roster.model_copy(update={"adverts": tuple(changed)})


def test_a_swapped_key_breaks_the_adverts_signature(cohort_of):
    c = cohort_of().run(until=0)
    key = X25519PrivateKey.generate().public_key().public_bytes_raw()
    assert c.refusal("amir", 0, adverts_with(c, "bea", mask_key=key)) == "SS-6002"


def test_a_man_in_the_middle_with_his_own_certificate_is_refused(cohort_of):
    c = cohort_of().run(until=0)
    mallory = Ed25519PrivateKey.generate()
    advert = next(a for a in (wire.decode(wire.Advertise, a) for a in c.told("amir", 0).adverts) if a.name == "bea")
    forged = advert.model_copy(update={
        "certificate": mallory.public_key().public_bytes_raw(),
        "share_key": X25519PrivateKey.generate().public_key().public_bytes_raw(),
    })  # fmt: skip
    signature = mallory.sign(statement("advertise", c.config.digest, wire.unsigned(forged)))
    body = adverts_with(c, "bea", certificate=forged.certificate, share_key=forged.share_key, signature=signature)
    assert c.refusal("amir", 0, body) == "SS-6002"


def test_a_name_outside_the_roster_is_refused(cohort_of):
    c = cohort_of().run(until=0)
    assert c.refusal("amir", 0, adverts_with(c, "eve", name="mallory")) == "SS-6003"


def test_the_own_advert_must_come_back_unchanged(cohort_of):
    c = cohort_of().run(until=0)
    assert c.refusal("amir", 0, adverts_with(c, "amir", signature=bytes(64))) == "SS-6003"
    roster = c.told("bea", 0)
    assert (
        c.refusal("bea", 0, roster.model_copy(update={"adverts": roster.adverts[:1] + roster.adverts[2:]})) == "SS-6003"
    )


def test_duplicate_keys_duplicate_names_and_disorder_are_refused(cohort_of):
    c = cohort_of().run(until=0)
    roster = c.told("amir", 0)
    bea, chloe = (wire.decode(wire.Advertise, roster.adverts[i]) for i in (1, 2))
    assert c.refusal("amir", 0, adverts_with(c, "chloe", mask_key=bea.mask_key)) == "SS-6003"
    assert c.refusal("dan", 0, adverts_with(c, "chloe", mask_key=chloe.share_key)) == "SS-6003"
    assert c.refusal("bea", 0, roster.model_copy(update={"adverts": roster.adverts[::-1]})) == "SS-6003"
    assert (
        c.refusal("chloe", 0, roster.model_copy(update={"adverts": (*roster.adverts, roster.adverts[-1])})) == "SS-6003"
    )


def test_too_few_adverts_are_refused(cohort_of):
    c = cohort_of(threshold=4).run(until=0)
    roster = c.told("amir", 0)
    assert c.refusal("amir", 0, roster.model_copy(update={"adverts": roster.adverts[:3]})) == "SS-6010"


def test_a_key_of_low_order_is_refused(cohort_of):
    c = cohort_of().run(until=0)
    body = adverts_with(c, "bea", share_key=bytes(32))
    advert = next(a for a in (wire.decode(wire.Advertise, a) for a in body.adverts) if a.name == "bea")
    signature = c.identities["bea"].sign(statement("advertise", c.config.digest, wire.unsigned(advert)))
    assert c.refusal("amir", 0, adverts_with(c, "bea", share_key=bytes(32), signature=signature)) == "SS-6003"


@pytest.mark.parametrize(
    "changes", [{"model": "f" * 64}, {"frozen": "f" * 64}, {"threshold": 4}, {"scale": 999}, {"blind": True}]
)
def test_a_client_with_another_model_or_configuration_cannot_mix(cohort_of, config_of, changes):
    c = cohort_of().run(until=0)
    other = c.client("bea", config=config_of(**changes))
    roster = c.told("amir", 0)
    adverts = (roster.adverts[0], other.advertise(), *roster.adverts[2:])
    assert c.refusal("amir", 0, roster.model_copy(update={"adverts": adverts})) == "SS-6004"


@pytest.mark.parametrize("stage", range(5))
def test_messages_of_an_earlier_round_are_refused_at_every_stage(cohort_of, stage):
    old = cohort_of(round=1).run()
    new = cohort_of(round=2).run(until=stage)
    body, vector = next((body, vector) for to, s, body, vector in old.down if (to, s) == ("amir", stage))
    assert new.refusal("amir", stage, body, vector) == "SS-6006"


def test_the_server_refuses_messages_of_an_earlier_round_too(cohort_of):
    old, new = cohort_of(round=1), cohort_of(round=2)
    with pytest.raises(RemoteProtocolError) as error:
        new.server.receive("amir", 0, old.clients["amir"].advertise())
    assert error.value.code == "SS-6006"


# Floors.


@pytest.mark.parametrize(
    ("floors", "changes"),
    [
        (Floors(min_clients=3, min_threshold=4, max_update=1.0, blind=False), {"threshold": 3}),
        (Floors(min_clients=4, min_threshold=3, max_update=1.0, blind=False), {"min_clients": 3}),
        (Floors(min_clients=3, min_threshold=3, max_update=0.25, blind=False), {"clip": 0.5}),
        (Floors(min_clients=3, min_threshold=3, max_update=1.0, blind=True), {"blind": False}),
    ],
)
def test_no_server_lowers_a_clients_floors(cohort_of, config_of, floors, changes):
    c = cohort_of()
    with pytest.raises(AggregationAborted) as error:
        c.client("amir", config=config_of(**changes), floors=floors)
    assert error.value.code == "SS-6001"


def test_all_breaches_of_floors_are_told_at_once(cohort_of):
    with pytest.raises(AggregationAborted) as error:
        cohort_of().client("amir", floors=Floors(min_clients=9, min_threshold=9, max_update=0.1, blind=True))
    assert len(error.value.details) == 4


# Stage 1: shares.


def test_an_altered_box_names_its_sender(cohort_of):
    c = cohort_of().run(until=1)
    routed = c.told("amir", 1)
    sealed = tuple((n, box[:-1] + bytes([box[-1] ^ 1]) if n == "dan" else box) for n, box in routed.sealed)
    assert c.refusal("amir", 1, routed.model_copy(update={"sealed": sealed})) == "SS-6007"


def test_boxes_cannot_be_swapped_between_senders_or_receivers(cohort_of):
    c = cohort_of().run(until=1)
    routed, other = c.told("amir", 1), c.told("bea", 1)
    names = [n for n, _ in routed.sealed]
    swapped = tuple(zip(names, [box for _, box in routed.sealed][::-1], strict=True))
    assert c.refusal("amir", 1, routed.model_copy(update={"sealed": swapped})) == "SS-6007"
    misdirected = tuple((n, dict(c.told("amir", 1).sealed).get(n, b"\0" * 80)) for n, _ in other.sealed)
    assert c.refusal("bea", 1, other.model_copy(update={"sealed": misdirected})) == "SS-6007"


@pytest.mark.parametrize(
    ("members", "code"),
    [
        (("bea", "chloe", "dan", "eve"), "SS-6008"),  # without self
        (("amir", "bea", "bea"), "SS-6008"),
        (("bea", "amir", "chloe"), "SS-6008"),
        (("amir", "bea", "mallory"), "SS-6008"),
        (("amir", "bea"), "SS-6010"),
        (("amir", "bea", "chloe"), "SS-6008"),  # boxes of five come along
    ],
)
def test_a_wrong_set_of_members_is_refused(cohort_of, members, code):
    c = cohort_of().run(until=1)
    assert c.refusal("amir", 1, c.told("amir", 1).model_copy(update={"members": members})) == code


def test_a_client_that_tells_each_peer_another_part_of_the_blind_key_is_named(cohort_of, monkeypatch):
    c = cohort_of(blind=True)
    c.run(until=0)
    eve = c.clients["eve"]
    object.__setattr__(eve._secrets, "group", b"\x07" * 32)  # commits to one part, seals another
    queue = [(n, 0, wire.encode(c.told(n, 0)), None) for n in ALL]
    while queue and queue[0][1] == 0:
        to, stage, body, vector = queue.pop(0)
        for out in c.clients[to].receive(stage, body, vector):
            queue += [tuple(d) for d in c.send(to, *out)]
    body = next(body for to, stage, body, _ in queue if to == "amir")
    with pytest.raises(AggregationAborted) as error:
        c.clients["amir"].receive(1, body)
    assert error.value.code == "SS-6012"
    assert "eve" in error.value.what
