"""The parser of requests: whatever the bytes and however they are cut, a request, a wait or a refusal by code."""

from __future__ import annotations

import itertools
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError
from securesplit.transport.http import Head, Request, Wire

SETTINGS = settings(max_examples=60, deadline=None)


def anybody(_head: Head) -> None:
    """Admits."""


def fed(wire: Wire, data: bytes, cuts: list[int]) -> Request | None:
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    for start, end in itertools.pairwise(edges):
        if (request := wire.receive(data[start:end])) is not None:
            return request
    return None


def taken(data: bytes, cuts: list[int]) -> Request | InputError | None:
    try:
        return fed(Wire(anybody), data, cuts)
    except InputError as error:
        return error


@SETTINGS
@given(
    body=st.binary(max_size=500),
    name=st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,20}", fullmatch=True).filter(
        lambda n: n.lower() not in {"host", "content-length", "transfer-encoding", "expect", "connection"}
    ),
    value=st.from_regex(r"[!-~]([ -~]{0,30}[!-~])?", fullmatch=True),
    chunks=st.booleans(),
    cuts=st.lists(st.integers(0, 2000), max_size=6),
)
def test_a_request_is_what_was_sent_however_it_is_cut(body, name, value, chunks, cuts):
    if chunks:
        framing, sent = "Transfer-Encoding: chunked", b"".join(
            b"%x\r\n%s\r\n" % (len(part), part) for part in (body[i : i + 7] for i in range(0, len(body), 7))
        ) + b"0\r\n\r\n"  # fmt: skip
    else:
        framing, sent = f"Content-Length: {len(body)}", body
    head = f"POST /v1/x?y=1 HTTP/1.1\r\nHost: h\r\n{name}: {value}\r\n{framing}\r\n\r\n".encode()
    request = fed(Wire(anybody), head + sent, cuts)
    assert request is not None
    assert (request.head.method, request.head.path, request.body) == ("POST", "/v1/x", body)
    assert value in request.head.all(name.lower())


@SETTINGS
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=4))
def test_any_bytes_are_a_request_a_wait_or_a_refusal(data, cuts):
    found = taken(data, cuts)
    assert found is None or (
        found.code in {"SS-1271", "SS-1273"} if isinstance(found, InputError) else b"HTTP/1.1" in data
    )


def test_a_head_is_judged_before_its_body_is_there():
    asked = []

    def nobody(head: Head) -> None:
        asked.append(head.path)
        raise InputError("SS-1274", "no")

    with pytest.raises(InputError, match="SS-1274"):
        Wire(nobody).receive(b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n")
    assert asked == ["/p"]


def test_a_body_at_the_bound_is_taken_and_one_above_it_is_not():
    for size, fits in ((64, True), (65, False)):
        for framing in (f"Content-Length: {size}\r\n\r\n".encode() + b"x" * size,
                        b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n0\r\n\r\n" % (size, b"x" * size)):  # fmt: skip
            wire = Wire(anybody, most_body=64)
            data = b"POST / HTTP/1.1\r\nHost: h\r\n" + framing
            if fits:
                assert wire.receive(data).body == b"x" * size
            else:
                with pytest.raises(InputError, match="SS-1273"):
                    wire.receive(data)


def test_a_second_request_is_not_read_from_the_same_connection():
    one = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
    wire = Wire(anybody)
    assert wire.receive(one + b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n").head.path == "/a"
    assert wire.receive(b"") is None


@pytest.mark.parametrize("refused", [False, True])
def test_whoever_asks_for_the_head_of_an_answer_gets_no_more(refused):
    def admit(head):
        if refused:
            raise InputError("SS-1271", "no", hint="No.")

    wire = Wire(admit)
    with suppress(InputError):
        wire.receive(b"HEAD /v1/models HTTP/1.1\r\nHost: h\r\n\r\n")
    told = wire.begin(404, (("content-type", "text/plain"),), length=5) + wire.part(b"hello") + wire.end()
    head, _, body = told.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 ")
    assert body == b""
