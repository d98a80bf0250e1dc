"""A recorded round is checked by somebody who was not there: every alteration is found, by the check that is named for it."""

import hashlib
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from securesplit.aggregate import wire
from securesplit.aggregate.config import Floors
from securesplit.aggregate.record import RoundRecord, decode_record, encode_record, record_round, seal
from securesplit.aggregate.roster import peers_of
from securesplit.aggregate.verify import verify_round
from securesplit.errors import InputError
from tests.aggregate.recorded import MADE, World, detail, failed, signatures_by, t3_of, warnings


@pytest.fixture
def world(cohort_of) -> World:
    return World(cohort_of(threshold=4))


@pytest.fixture
def blind(cohort_of) -> World:
    return World(cohort_of(threshold=4, blind=True))


# --- records that hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", ["amir", "dan", "gpu"])
def test_an_honest_record_holds(world, maker):
    record = world.record(maker)
    report = world.report(decode_record(encode_record(record)))
    assert (failed(report), warnings(report)) == (set(), set())
    assert report.t3 == t3_of(record)
    assert report.signers == record.survivors == ("amir", "bea", "chloe", "dan")
    assert report.clients == record.members == world.cohort.config.roster
    assert [check.name for check in report.checks] == [
        "configuration", "roster", "maker", "time", "adverts", "identities", "members", "survivors", "quorum", "signers",
        "agreement", "signatures", "result",
    ]  # fmt: skip


def test_what_the_clients_signed_is_what_the_specification_says(world):
    record = world.record()
    assert record.signatures == signatures_by(world.cohort, record, record.survivors)


def test_a_blind_round_holds_and_needs_what_only_clients_know(blind):
    record = blind.record()
    assert len(record.alike) == 32
    assert failed(blind.report(record)) == set()
    assert failed(blind.report(blind.sealed(record.model_copy(update={"alike": bytes(32)}), "amir"))) == {"agreement"}
    assert record.signatures == signatures_by(blind.cohort, record, record.survivors)


def test_a_servers_record_of_a_blind_round_holds_beside_a_clients(blind):
    server, amir = blind.record("gpu"), blind.record()
    assert (server.alike, server.sum_digest) == (b"", b"")
    alone = blind.report(server)
    assert failed(alone) == {"agreement"}
    assert "client's record" in detail(alone, "agreement")
    assert failed(blind.report(server, alikes=[bytes(32), amir.alike])) == set()
    assert failed(blind.report(server, alikes=[bytes(32)])) == {"agreement"}
    told = blind.sealed(server.model_copy(update={"sum_digest": amir.sum_digest}), "gpu")
    assert "hidden from it" in detail(blind.report(told), "result")


def test_a_round_with_encryption_binds_the_keys_on_their_way(cohort_of):
    cohort = cohort_of(threshold=4, blind=True, backend="bfv")
    cohort.start()
    adverts = [body for _, stage, body, _ in sorted(cohort.up, key=lambda sent: sent[0]) if stage == 0]
    record = record_round(
        cohort.config, peers_of(cohort.config, adverts), role="client", maker="amir", made=MADE, members=cohort.config.roster,
        survivors=cohort.config.roster, alike=b"a" * 32, sum_digest=bytes(32),
    )  # fmt: skip
    record = record.model_copy(update={"signatures": signatures_by(cohort, record, cohort.config.roster)})

    def checked(**changes: object) -> set[str]:
        key = cohort.identities["amir"]
        sealed = seal(record.model_copy(update=changes), key.public_key().public_bytes_raw(), key.sign)
        return failed(verify_round(sealed, cohort.verify, now=MADE))

    assert checked() == set()


@pytest.mark.parametrize(
    "vanish",
    [{"eve": 2, "dan": 2}, {"eve": 0, "dan": 0}, {"eve": 1, "dan": 1}, {"eve": 3, "dan": 3}, {"eve": 4, "dan": 4}],
)
def test_an_aborted_round_holds_without_a_sum(cohort_of, vanish):
    world = World(cohort_of(threshold=4), vanish)
    assert world.cohort.server.aborted == "SS-6010"
    for maker in ("amir", "gpu"):
        report = world.report(world.record(maker))
        assert failed(report) == set()
        assert "SS-6010" in detail(report, "result")


def test_one_bad_signature_is_named_and_costs_only_itself(cohort_of):
    world = World(cohort_of(threshold=3))
    record = world.record()
    signatures = dict(record.signatures) | {"bea": bytes(64)}
    report = world.report(
        world.sealed(record.model_copy(update={"signatures": tuple(sorted(signatures.items()))}), "amir")
    )
    assert (failed(report), warnings(report)) == (set(), {"signatures"})
    assert detail(report, "signatures").endswith("bea")
    assert report.signers == ("amir", "chloe", "dan")


def test_a_server_may_leave_its_record_unsealed_and_a_client_may_not(world):
    bare = {"certificate": b"", "seal": b""}
    report = world.report(world.record("gpu").model_copy(update=bare))
    assert (failed(report), warnings(report)) == (set(), {"maker"})
    assert failed(world.report(world.record("amir").model_copy(update=bare))) == {"maker"}
    assert warnings(world.report(world.record("gpu"), verify_server=None)) == {"maker"}


# --- records that do not ----------------------------------------------------------------------------------------------


def other_advert(world: World, cohort_of) -> tuple[bytes, ...]:
    other = World(cohort_of(threshold=4, round=2)).record()
    return (other.adverts[0], *world.record().adverts[1:])


def flip(data: bytes, at: int = -1) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def impostor(record: RoundRecord) -> tuple[bytes, ...]:
    """Bea's advert, signed well, but under a certificate of another key."""
    key, advert = Ed25519PrivateKey.generate(), wire.decode(wire.Advertise, record.adverts[1])
    advert = advert.model_copy(update={"certificate": key.public_key().public_bytes_raw()})
    said = b"ssa-1|advertise|" + hashlib.sha256(b"ssa-1/cfg|" + record.config).digest() + wire.unsigned(advert)
    return (
        record.adverts[0],
        wire.encode(advert.model_copy(update={"signature": key.sign(said)})),
        *record.adverts[2:],
    )


ALL_BOUND = {"adverts", "members", "agreement"}
CASES = {
    "threshold lowered": (lambda r, w: {"config": replace(w.cohort.config, threshold=3).canonical()}, ALL_BOUND),
    "another clip": (lambda r, w: {"config": replace(w.cohort.config, clip=0.25).canonical()}, ALL_BOUND),
    "another round": (lambda r, w: {"config": replace(w.cohort.config, round=2).canonical()}, ALL_BOUND),
    "illegal": (lambda r, w: {"config": r.config.replace(b'"threshold":4', b'"threshold":1')}, {"configuration"}),
    "a space": (lambda r, w: {"config": r.config + b" "}, {"configuration"}),
    "advert out of order": (lambda r, w: {"adverts": r.adverts[::-1]}, {"adverts", "agreement"}),
    "advert twice": (lambda r, w: {"adverts": (r.adverts[0], *r.adverts)}, {"adverts", "agreement"}),
    "advert left out": (lambda r, w: {"adverts": r.adverts[:-1]}, {"members", "agreement"}),
    "adverts too few": (lambda r, w: {"adverts": r.adverts[:3]}, ALL_BOUND),
    "advert unsigned": (lambda r, w: {"adverts": (*r.adverts[:-1], flip(r.adverts[-1]))}, {"identities", "agreement"}),
    "advert is junk": (lambda r, w: {"adverts": (*r.adverts[:-1], b"junk")}, ALL_BOUND),
    "impostor": (lambda r, w: {"adverts": impostor(r)}, {"identities", "agreement"}),
    "member left out": (lambda r, w: {"members": r.members[:-1]}, {"agreement"}),
    "member invented": (lambda r, w: {"members": (*r.members, "zoe")}, {"members", "agreement"}),
    "members out of order": (lambda r, w: {"members": r.members[::-1]}, {"members", "agreement"}),
    "survivor removed": (lambda r, w: {"survivors": r.survivors[:-1]}, {"quorum", "signers", "agreement"}),
    "survivor added": (lambda r, w: {"survivors": r.members}, {"agreement"}),
    "survivor twice": (lambda r, w: {"survivors": ("amir", *r.survivors)}, {"survivors", "agreement"}),
    "survivor invented": (lambda r, w: {"survivors": (*r.survivors, "zoe")}, {"survivors", "agreement"}),
    "signatures swapped": (lambda r, w: {"signatures": tuple(zip(r.survivors, [s for _, s in r.signatures][::-1], strict=True))}, {"agreement"}),
    "signature removed": (lambda r, w: {"signatures": r.signatures[1:]}, {"agreement"}),
    "signature flipped": (lambda r, w: {"signatures": (*r.signatures[:-1], ("dan", flip(r.signatures[-1][1])))}, {"agreement"}),
    "signer twice": (lambda r, w: {"signatures": (r.signatures[0], *r.signatures)}, {"signers"}),
    "signer who dropped": (lambda r, w: {"signatures": (*r.signatures, ("eve", bytes(64)))}, {"signers"}),
    "no signatures": (lambda r, w: {"signatures": ()}, {"agreement"}),
    "value of blind rounds": (lambda r, w: {"alike": bytes(32)}, {"result", "agreement"}),
    "no sum": (lambda r, w: {"sum_digest": b""}, {"result"}),
    "half a sum": (lambda r, w: {"sum_digest": r.sum_digest[:16]}, {"result"}),
    "aborted with a sum": (lambda r, w: {"aborted": "SS-6010"}, {"result"}),
    "another maker": (lambda r, w: {"maker": "bea"}, {"maker"}),
    "a maker who dropped": (lambda r, w: {"maker": "eve"}, {"maker"}),
    "a stranger": (lambda r, w: {"maker": "zoe"}, {"maker"}),
    "a server": (lambda r, w: {"role": "server"}, {"maker"}),
    "from the future": (lambda r, w: {"made": MADE + 100_000}, {"time"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_alteration_is_found_even_if_the_maker_seals_it(world, case):
    change, expected = CASES[case]
    record = world.record()
    altered = record.model_copy(update=change(record, world))
    assert altered != record
    assert failed(world.report(world.sealed(altered, "amir"))) == expected
    # Somebody else than the maker cannot even seal it.
    found = failed(world.report(altered))
    assert found == {"configuration"} or found >= expected | {"maker"}


def test_an_advert_of_another_round_is_found(world, cohort_of):
    altered = world.record().model_copy(update={"adverts": other_advert(world, cohort_of)})
    report = world.report(world.sealed(altered, "amir"))
    assert failed(report) >= ALL_BOUND - {"members"}
    assert "SS-6006" in detail(report, "adverts")


@pytest.mark.parametrize("field", ["made", "sum_digest", "aborted", "maker", "certificate"])
def test_what_only_the_seal_covers_is_covered(world, field):
    other = {"made": MADE - 5, "sum_digest": bytes(32), "aborted": "SS-6010", "maker": "bea", "certificate": bytes(32)}[
        field
    ]
    assert "maker" in failed(world.report(world.record().model_copy(update={field: other})))


def test_all_faults_are_told_at_once(world):
    record = world.record(made=MADE + 100_000, survivors=("amir", "zoe"), sum_digest=b"", adverts=(b"junk",))
    assert failed(world.report(record, pinned_roster=("amir",))) == {
        "roster", "time", "adverts", "members", "survivors", "quorum", "signers", "agreement", "result",
    }  # fmt: skip


def test_the_roster_is_pinned_or_looked_at(world):
    record, roster = world.record(), world.cohort.config.roster
    assert warnings(world.report(record, pinned_roster=None)) == {"roster"}
    report = world.report(record, pinned_roster=(*roster[1:], "zoe"))
    assert failed(report) == {"roster"}
    assert "not of the pinned roster: amir" in detail(report, "roster")
    assert "missing of the pinned roster: zoe" in detail(report, "roster")
    assert failed(world.report(record, pinned_roster=roster[::-1])) == set()


def test_a_policy_is_kept_or_every_breach_is_named(world):
    loose = Floors(min_clients=3, min_threshold=4, max_update=0.5, blind=False)
    assert failed(world.report(world.record(), floors=loose)) == set()
    strict = Floors(min_clients=4, min_threshold=5, max_update=0.1, blind=True)
    report = world.report(world.record(), floors=strict)
    assert failed(report) == {"floors"}
    assert all(word in detail(report, "floors") for word in ("threshold", "min_clients", "clip", "visible"))


def test_names_cannot_command_a_terminal(world):
    evil = "\x1b[2J\x07zoe"
    report = world.report(world.record(members=(evil,), survivors=(evil,), signatures=((evil, bytes(64)),)))
    assert failed(report) >= {"members", "quorum", "agreement"}
    assert "?[2J?zoe" in detail(report, "members")


@pytest.mark.parametrize("repaired", [False, True])
@given(places=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 7)), min_size=1, max_size=3))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flip_of_bits_crashes_or_passes(world, repaired, places):
    record = world.record()
    good = encode_record(record)
    data = bytearray(good[:-32] if repaired else good)
    for place, bit in places:
        data[place % len(data)] ^= 1 << bit
    file = bytes(data) + (hashlib.sha256(b"ssa-1/file|" + bytes(data)).digest() if repaired else b"")
    try:
        read = decode_record(file)
    except InputError:  # The file says at once that it is damaged.
        return
    assert world.report(read).valid == (file == good)
