"""A record's file: what is in it, what is not, and that only the one encoding is read."""

import hashlib
import json
import os
from dataclasses import fields

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.record import (
    MAX_RECORD,
    RoundRecord,
    decode_record,
    encode_record,
    parse_config,
    read_record,
    record_round,
    seal,
)
from securesplit.aggregate.roster import Peers
from securesplit.errors import InputError


def packed_file(fields: object) -> bytes:
    """What a forger writes: any map, with the hash that belongs to it."""
    packed = msgpack.packb(fields, use_bin_type=True)
    return packed + hashlib.sha256(b"ssa-1/file|" + packed).digest()


def refusal(data: bytes) -> str:
    with pytest.raises(InputError) as seen:
        decode_record(data)
    assert (seen.value.exit_code, bool(seen.value.hint)) == (2, True)
    return seen.value.code


@pytest.fixture
def record(cohort_of) -> RoundRecord:
    cohort = cohort_of(seed="record").run({"eve": 2})
    server, amir = cohort.server, cohort.clients["amir"]
    draft = record_round(
        cohort.config, server._peers, role="client", maker="amir", made=1_700_000_000, members=server._members,
        survivors=amir.result.survivors, sum_digest=hashlib.sha256(amir.result.ring_sum.tobytes()).digest(),
    )  # fmt: skip
    return seal(draft, b"certificate", cohort.identities["amir"].sign)


def test_a_file_gives_the_record_back_and_the_record_the_file(record):
    data = encode_record(record)
    assert decode_record(data) == record
    assert encode_record(decode_record(data)) == data
    assert parse_config(record.config).roster == ("amir", "bea", "chloe", "dan", "eve")


def test_it_holds_the_adverts_as_they_came(cohort_of):
    cohort = cohort_of().run()
    sent = tuple(sorted(body for _, stage, body, _ in cohort.up if stage == 0))
    made = record_round(cohort.config, cohort.server._peers, role="server", maker="server", made=0)
    assert tuple(sorted(made.adverts)) == sent


@pytest.mark.parametrize("blind", [False, True])
def test_it_holds_no_secret_no_update_and_no_weight(cohort_of, blind):
    cohort = cohort_of(blind=blind)
    cohort.start()
    secrets = [client._secrets for client in cohort.clients.values()]
    contributions = [client.contribution for client in cohort.clients.values()]
    held = [part for s in secrets for part in (s.seed, s.self_mask, s.group) if part]
    assert len(held) == (15 if blind else 10)
    cohort = cohort_of(blind=blind, seed="s").run()
    record = record_round(
        cohort.config, cohort.server._peers, role="server", maker="server", made=0, members=cohort.server._members,
        survivors=cohort.server._survivors,
    )  # fmt: skip
    data = encode_record(record)
    assert not any(part in data for part in held)
    assert not any(vector.tobytes() in data for vector in contributions)
    # The set of fields is closed, so nothing else can come in by and by without this test being asked.
    assert set(RoundRecord.model_fields) == {
        "format", "config", "role", "maker", "made", "adverts", "members", "survivors", "signatures", "alike",
        "sum_digest", "aborted", "certificate", "seal",
    }  # fmt: skip
    assert "signatures" not in repr(record)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"format": True}, {"role": "auditor"}, {"maker": ""}, {"maker": b"amir"}, {"maker": "x" * 129}, {"made": -1},
        {"made": 1.0}, {"made": 1 << 37}, {"adverts": b""}, {"adverts": [b"x" * 16385]}, {"members": "amir"}, {"members": [1]},
        {"members": ["a"] * 257}, {"signatures": [["amir"]]}, {"signatures": [["amir", b"short"]]}, {"signatures": [["amir", b"x" * 1025]]},
        {"alike": bytes(33)}, {"sum_digest": bytes(33)}, {"sum_digest": None}, {"aborted": "no"}, {"aborted": None}, {"config": b""},
        {"config": "{}"}, {"certificate": bytes(8193)}, {"seal": bytes(1025)},
        {"shares": []},
    ],
)  # fmt: skip
def test_wrong_types_and_lengths_are_refused(record, change):
    plain = record.model_dump()
    assert decode_record(packed_file(plain)) == record
    assert refusal(packed_file(plain | change)) == "SS-1620"


def test_only_the_one_encoding_is_read(record):
    plain, data = record.model_dump(), encode_record(record)
    for other in (
        packed_file(dict(reversed(plain.items()))),
        packed_file({k: v for k, v in plain.items() if k != "seal"}),
        packed_file([plain]), packed_file(plain)[:-1], data + b"\0", b"\0" + data, data[:-32], b"", data[:31],
        data[:-32] + b"\xc0" + hashlib.sha256(b"ssa-1/file|" + data[:-32] + b"\xc0").digest(),
        packed_file(0), b"\x91" * 5000 + hashlib.sha256(b"ssa-1/file|" + b"\x91" * 5000).digest(),
        bytes(MAX_RECORD + 1),
    ):  # fmt: skip
        assert refusal(other) == "SS-1620"


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_arbitrary_bytes_are_refused_and_nothing_else_happens(data):
    junk = data.draw(st.binary(max_size=200))
    assert refusal(junk) == "SS-1620"
    assert refusal(junk + hashlib.sha256(b"ssa-1/file|" + junk).digest()) == "SS-1620"


def test_a_file_that_cannot_be_read_is_named(tmp_path, record):
    good = tmp_path / "good.record"
    good.write_bytes(encode_record(record))
    assert read_record(good) == record
    (tmp_path / "torn.record").write_bytes(encode_record(record)[:-7])
    for name in ("none.record", "torn.record", "."):
        with pytest.raises(InputError) as seen:
            read_record(tmp_path / name)
        assert seen.value.code == "SS-1620"
        assert str(tmp_path / name) in seen.value.what


# --- configurations ---------------------------------------------------------------------------------------------------


@given(
    st.integers(3, 20), st.integers(0, (1 << 53) - 1), st.integers(1, 1 << 20), st.floats(1e-9, 1e9), st.integers(1, 60), st.booleans(),
    st.binary(min_size=16, max_size=16),
)  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_parsing_inverts_canonical(clients, number, dim, clip, w_max, blind, session):
    config = RoundConfig(
        session_id=session, round=number, roster=tuple(f"client-{i:02d} \N{SNOWMAN}" for i in range(clients)), threshold=clients // 2 + 1,
        min_clients=3, dim=dim, scale=1000, clip=clip, w_max=w_max, model="0" * 64, frozen="a" * 64, blind=blind,
    )  # fmt: skip
    assert parse_config(config.canonical()) == config


def test_every_field_of_a_configuration_is_needed_and_has_its_type(config_of):
    text = config_of(clip=1.0).canonical()
    plain = json.loads(text)
    assert {field.name for field in fields(RoundConfig)} <= set(plain)

    def refused(value: object) -> None:
        with pytest.raises(InputError) as seen:
            parse_config(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())
        assert seen.value.code in {"SS-1601", "SS-1620"}

    for name in plain:
        refused({key: value for key, value in plain.items() if key != name})
        for wrong in (None, [], {}, "x", 0.5, "1", -1, [1], 10**30, float("nan")):
            if wrong != plain[name] and (name, wrong) != ("clip", 0.5):
                refused(plain | {name: wrong})
    assert plain["round"] == 1
    refused(plain | {"round": True})
    refused(plain | {"blind": 0})
    refused(plain | {"clip": 1})
    refused(plain | {"extra": 1})
    refused([plain])


def test_another_spelling_of_the_same_configuration_is_refused(config_of):
    text = config_of().canonical()
    deep = b"[" * 100_000
    for other in (text + b" ", b" " + text, text.replace(b",", b", "), text.upper(), b"\xef\xbb\xbf" + text, b"", b"null", deep,
                  text.replace(b"00010203", b"0001020G"), text.replace(b'"round":1', b'"round":1,"round":1'), os.urandom(40)):  # fmt: skip
        with pytest.raises(InputError):
            parse_config(other)


def test_a_record_can_be_made_before_anybody_is_known(config_of):
    early = record_round(config_of(), Peers((), b""), role="client", maker="amir", made=5, aborted="SS-6010")
    assert decode_record(encode_record(early)) == early
    assert (early.adverts, early.members, early.sum_digest, early.aborted) == ((), (), b"", "SS-6010")


def test_a_round_that_broke_off_says_so_by_its_first_fault(cohort_of):
    """Otherwise a lost connection would look like a round that ended without the signers it needs."""
    member = cohort_of().clients["amir"]
    member.advertise()
    member.abort("SS-3020")
    member.abort("SS-6005")
    record = member.record(made=0)
    assert (record.aborted, record.survivors, record.sum_digest) == ("SS-3020", (), b"")
