"""No text gets into a log: not by a field, not by a row that somebody else wrote."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from securesplit.journal.events import KINDS, Accepted, Closed, Quota, Refused, read_event
from securesplit.journal.row import MAX_LINE, RowError, encode_row, instant, nanoseconds, parse_row
from tests.journal.logs import ALICE, EVENTS

HASH = bytes(32)


def test_every_kind_has_its_own_name_and_no_field_of_a_row():
    names = [kind.model_fields["kind"].default for kind in KINDS]
    assert len(set(names)) == len(names) == 17
    for kind in KINDS:
        assert not {"index", "at", "hash"} & set(kind.model_fields)


def test_no_field_takes_a_sentence():
    """Whatever a text field is, words with blanks, tokens, line feeds and PEM do not fit."""
    for kind in KINDS:
        for name, field in kind.model_fields.items():
            if field.annotation is not str:
                continue
            for text in (
                "the patient was",
                "a b",
                "x\n",
                "-----BEGIN",
                "sk live",
                "\u202e",
                "\ud800",
                "ß",
                "1" * 40000,
            ):
                fields = {"kind": kind.model_fields["kind"].default, name: text}
                with pytest.raises(ValidationError) as caught:
                    read_event(fields)
                assert any(error["loc"][-1] == name for error in caught.value.errors()), (kind, name, text)


@pytest.mark.parametrize("address", ["", "memory", "10.0.0.7:1", "[::1]:65535", "[fe80::1:2]:5"])
def test_addresses(address):
    assert Refused(stage="tls", code="SS-3205", address=address).address == address


@pytest.mark.parametrize(
    "address", ["gpu.example:443", "10.0.0.7", "10.0.0.7:1 x", "::1:5", "[::1%eth0]:5", "10.0.0.7:1\n"]
)
def test_what_is_no_address(address):
    with pytest.raises(ValidationError):
        Refused(stage="tls", code="SS-3205", address=address)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Refused(stage="tls", code="certificate expired", address="memory"),
        lambda: Refused(stage="elsewhere", code="SS-3205", address="memory"),
        lambda: Refused(stage="tls", code="SS-3205", address="memory", count=0),
        lambda: Refused(stage="tls", code="SS-3205", address="memory", peer="alice"),
        lambda: Closed(peer=ALICE, code="bye"),
        lambda: Quota(quota="bytes", code="SS-3040", limit=-1),
        lambda: Accepted(connection=1, address="memory", peer=ALICE, certificate="b" * 64, serial="zz", tls="TLSv1.3"),
        lambda: Accepted(connection=1, address="memory", peer=ALICE, certificate="b" * 64, serial="0A", tls="TLSv1.2"),
        lambda: Refused(stage="tls", code="SS-3205", address="memory", note="a note"),  # type: ignore[call-arg]
        lambda: Closed(steps=True),
    ],
)
def test_what_cannot_be_built(build):
    with pytest.raises(ValidationError):
        build()


@given(event=st.sampled_from(EVENTS), index=st.integers(0, 1 << 40), micros=st.integers(0, 1 << 52))
@settings(max_examples=60, deadline=None)
def test_a_row_there_and_back(event, index, micros):
    line, digest = encode_row(HASH, index, micros * 1000, event)
    row = parse_row(line, previous=HASH, index=index)
    assert (row.event, row.at, row.index, row.hash) == (event, micros * 1000, index, digest)
    assert line.endswith(b"\n")
    assert len(line) < MAX_LINE
    assert json.dumps(json.loads(line), sort_keys=True, separators=(",", ":")).encode() + b"\n" == line


@given(micros=st.integers(0, 1 << 52))
@settings(max_examples=60, deadline=None)
def test_times(micros):
    assert nanoseconds(instant(micros * 1000)) == micros * 1000


LINE = encode_row(HASH, 3, 0, EVENTS[2])[0]


@given(
    line=st.binary(max_size=60)
    | st.text(max_size=40).map(lambda t: json.dumps({"kind": t}).encode() + b"\n")
    | st.tuples(st.integers(0, len(LINE)), st.binary(max_size=8)).map(lambda t: LINE[: t[0]] + t[1] + LINE[t[0] :])
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["kind", "at", "hash", "index", "code", "log"]), inner, max_size=5)
        ),
    ).map(lambda v: json.dumps(v).encode() + b"\n"),
    first=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_only_row_errors_escape(line, first):
    try:
        row = parse_row(line, previous=None if first else HASH, index=0 if first else 3)
    except RowError as error:
        why = str(error)
    else:
        assert (line, row.event) == (LINE, EVENTS[2])
        return
    assert len(why) < 80


@pytest.mark.parametrize(
    "line", [b"[" * 100_000 + b"\n", b"1" * 5000 + b"\n", b"{" + b" " * MAX_LINE + b"}\n", b'{"a":1,"a":2}\n']
)
def test_lines_that_hurt_parsers(line):
    with pytest.raises(RowError):
        parse_row(line, previous=HASH, index=0)
