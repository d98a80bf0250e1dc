"""Bytes to messages and back: committed frames, round trips, and everything that is not a message."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from securesplit.errors import RemoteProtocolError
from securesplit.protocol import messages as kinds
from securesplit.protocol.codec import Caps, decode, encode
from securesplit.protocol.messages import MESSAGES, Backward, Blob, Bye, DropCache, Forward, Gradient, Hidden, Message

ROOT = Path(__file__).parents[2]
VECTORS = json.loads((ROOT / "tests" / "vectors" / "wire.json").read_text())
CODES = {"SS-4001", "SS-4002", "SS-4003", "SS-4004", "SS-4005"}
CAPS = Caps(message_bytes=1 << 20)


def built(row) -> Message:
    """The message that a vector describes."""
    fields = {}
    for name, value in row["fields"].items():
        if isinstance(value, dict) and "dtype" in value:
            value = Blob(dtype=value["dtype"], shape=tuple(value["shape"]), data=bytes.fromhex(value["hex"]))  # noqa: PLW2901
        elif isinstance(value, dict):
            value = bytes.fromhex(value["hex"])  # noqa: PLW2901
        elif isinstance(value, list):
            value = tuple(value)  # noqa: PLW2901
        fields[name] = value
    return getattr(kinds, row["message"])(**fields)


def refusal(data: bytes, caps: Caps = CAPS) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(data, caps)
    return caught.value.code


def outcome(data: bytes) -> Message | str:
    """The message, or the code of the refusal; any other exception is a fault and escapes."""
    try:
        return decode(data, CAPS)
    except RemoteProtocolError as error:
        return error.code


def framed(kind: int, header: bytes, body: bytes = b"") -> bytes:
    return b"SS" + bytes([1, kind]) + struct.pack("<I", len(header)) + header + body


# ---- committed frames ------------------------------------------------------------------------------------------------


def test_there_is_a_frame_for_every_kind_and_numbers_are_never_reused():
    assert {row["kind"]: row["message"] for row in VECTORS["good"]} == {k: m.__name__ for k, m in MESSAGES.items()}
    assert sorted(MESSAGES) == list(range(1, 23))


@pytest.mark.parametrize("row", VECTORS["good"], ids=lambda row: row["message"])
def test_a_committed_frame(row):
    message, frame = built(row), bytes.fromhex(row["frame"])
    assert encode(message) == frame
    assert decode(frame, CAPS) == message
    assert frame[:4] == b"SS\x01" + bytes([row["kind"]])


@pytest.mark.parametrize("row", VECTORS["bad"], ids=lambda row: row["why"])
def test_a_committed_refusal(row):
    assert refusal(bytes.fromhex(row["frame"]), Caps(message_bytes=1 << 20, width=row["width"])) == row["code"]


# ---- round trips -----------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_message_survives_the_wire(strategies, data):
    message = data.draw(strategies.any)
    again = decode(encode(message), Caps(message_bytes=1 << 20, width=strategies.width))
    assert type(again) is type(message)
    assert again == message
    assert encode(again) == encode(message)


# ---- everything else -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", VECTORS["good"], ids=lambda row: row["message"])
def test_every_truncation_is_refused(row):
    frame = bytes.fromhex(row["frame"])
    for end in range(len(frame)):
        assert refusal(frame[:end]) in CODES


@pytest.mark.parametrize("row", VECTORS["good"], ids=lambda row: row["message"])
def test_trailing_bytes_are_refused(row):
    frame = bytes.fromhex(row["frame"])
    for extra in (b"\0", b"\xc0", frame):
        assert refusal(frame + extra) in CODES


@pytest.mark.parametrize("row", VECTORS["good"], ids=lambda row: row["message"])
def test_every_flipped_bit_gives_a_refusal_or_another_valid_message(row):
    frame, message, codes = bytes.fromhex(row["frame"]), built(row), set()
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        other = outcome(bytes(flipped))
        if isinstance(other, str):
            codes.add(other)
        else:
            assert other != message or type(other) is not type(message)
            assert decode(encode(other), CAPS) == other
    assert codes
    assert codes <= CODES


@given(data=st.binary(max_size=200) | st.binary(max_size=200).map(lambda b: b"SS\x01" + b))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused_or_valid(data):
    assert isinstance(outcome(data), Message) or outcome(data) in CODES


HEADERS = st.dictionaries(
    st.sampled_from(["step", "lengths", "cache", "learn", "hidden", "gradient", "vector", "body", "round", "stage", "code", "job", "nonce"])
    | st.binary(max_size=3) | st.text(max_size=3),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=8) | st.binary(max_size=40)
        | st.sampled_from(["f32", "u32", [3], ["f32", [1, 3]], ["bf16", [0, 3]], ["f32", [1 << 40, 1]], ["f32", {}], [[], []], ["int8", [1, 3]], ["int8", [3]]]),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2), max_leaves=6,
    ), max_size=6,
)  # fmt: skip


@given(kind=st.integers(0, 17), header=HEADERS, body=st.binary(max_size=24))
@settings(max_examples=400, deadline=None)
def test_well_formed_headers_with_the_wrong_contents_are_refused_or_valid(kind, header, body):
    found = outcome(framed(kind, msgpack.packb(header), body))
    assert isinstance(found, Message) or found in CODES


# ---- caps ------------------------------------------------------------------------------------------------------------


def rows(count: int, width: int, dtype: str = "f32") -> bytes:
    size = {"f32": 4 * width, "bf16": 2 * width, "int8": 4 + width}[dtype]
    blob = Blob(dtype=dtype, shape=(count, width), data=bytes(size * count))
    return encode(Forward(step=0, lengths=(count,), learn=False, hidden=blob))


def test_the_cap_on_a_message_is_exact():
    frame = rows(2, 3)
    assert decode(frame, Caps(message_bytes=len(frame)))
    assert refusal(frame, Caps(message_bytes=len(frame) - 1)) == "SS-4002"


def test_width_and_types_are_those_that_were_agreed():
    assert decode(rows(2, 3), Caps(message_bytes=1 << 20, width=3))
    assert refusal(rows(2, 3), Caps(message_bytes=1 << 20, width=4)) == "SS-4005"
    for dtype in ("bf16", "int8"):
        assert decode(rows(2, 3, dtype), CAPS)
        assert refusal(rows(2, 3, dtype), Caps(message_bytes=1 << 20, width=4)) == "SS-4005"
        assert refusal(rows(2, 3, dtype), Caps(message_bytes=1 << 20, dtypes=frozenset({"f32"}))) == "SS-4005"
    assert refusal(rows(2, 3), Caps(message_bytes=1 << 20, dtypes=frozenset({"int8"}))) == "SS-4005"


def test_under_a_code_what_crosses_in_front_of_b_has_its_own_width():
    caps = Caps(message_bytes=1 << 20, width=5, code_width=2)
    blob = {n: Blob(dtype="f32", shape=(1, n), data=bytes(4 * n)) for n in (2, 5)}
    for n in (2, 5):
        in_front = [Forward(step=0, lengths=(1,), learn=False, hidden=blob[n]), Gradient(step=0, gradient=blob[n])]
        behind = [Hidden(step=0, hidden=blob[n]), Backward(step=0, gradient=blob[n])]
        good, bad = (in_front, behind) if n == 2 else (behind, in_front)
        assert [decode(encode(message), caps) for message in good] == good
        assert [refusal(encode(message), caps) for message in bad] == ["SS-4005"] * 2


@pytest.mark.parametrize("frame", [
    framed(4, msgpack.packb({"step": 0, "lengths": [1], "cache": 0, "learn": False, "hidden": ["f32", [1 << 30, 1 << 30]]})),
    framed(10, msgpack.packb({"round": 0, "stage": 0, "body": b"", "vector": ["u32", [(1 << 31) - 1]]})),
    framed(5, msgpack.packb({"step": 0, "hidden": ["bf16", [(1 << 31) - 1, (1 << 31) - 1]]})),
    framed(12, b"\xdd\xff\xff\xff\xff"),  # an array of 2^32 - 1
    framed(12, b"\xdf\xff\xff\xff\xff"),  # a map of as many
    framed(12, b"\x81\xa1a\xc6\xff\xff\xff\xff"),  # 4 GiB of bytes
    framed(12, b"\x81\xa1a\xdb\xff\xff\xff\xff"),  # 4 GiB of text
    framed(12, b"\x81\xa1a" + b"\xdc\x10\x00" * 500),  # arrays of 4096 inside each other
    framed(12, b"\x81\xa1a" * 5000),
    b"SS\x01\x0c\xff\xff\xff\xff",
], ids=lambda frame: frame[:24].hex())  # fmt: skip
def test_what_is_announced_is_not_allocated(frame):
    refusal(frame)  # once, so that imports and caches are out of the way
    tracemalloc.start()
    try:
        refusal(frame, Caps(message_bytes=1 << 40))
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("header", [
    b"\x81\xa1a" + b"\x91" * 100_000 + b"\xc0",  # arrays in arrays
    b"\x81\xa1a" + b"\x81\xa1a" * 100_000 + b"\xc0",  # maps in maps
    msgpack.packb({f"{i}": 0 for i in range(33)}),  # more keys than any message has fields
    msgpack.packb({"lengths": [1] * 4097}),
    msgpack.packb({"job": "x" * ((1 << 17) + 1)}),
    msgpack.packb({"cache": msgpack.ExtType(5, b"x")}),
    msgpack.packb({"cache": msgpack.Timestamp(0)}),
    b"\x82" + 2 * (msgpack.packb("cache") + msgpack.packb(1)),  # the same key twice, though with the same value
    b"\x81\xa1a\x82\xa1b\x01\xa1b\x02",  # the same inside
    b"\xdc\x00\x01\xc0",
    b"\xc0",
])  # fmt: skip
def test_bombs_and_oddities_of_msgpack_are_refused(header):
    assert refusal(framed(8, header)) == "SS-4001"


def test_an_empty_extension_is_no_value_of_any_field():
    assert refusal(framed(8, b"\x81\xa5cache\xc7\x00\x05")) in {"SS-4001", "SS-4004"}


def test_a_refusal_names_fields_and_never_repeats_what_was_sent():
    secret = "a patient's name"
    with pytest.raises(RemoteProtocolError) as caught:
        decode(framed(8, msgpack.packb({"cache": secret, secret: 1})), CAPS)
    assert "cache" in str(caught.value)
    assert secret not in str(caught.value) + str(caught.value.details) + caught.value.hint
    assert caught.value.__cause__ is None


# ---- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "shape", "data"), [
    ("f32", (1, 2), bytes(7)), ("f32", (1, 2), bytes(9)), ("f64", (1,), bytes(8)), ("f32", (), bytes(4)),
    ("f32", (1, 1, 1, 1), bytes(4)), ("f32", (-1, -1), bytes(4)), ("f32", (1 << 31, 0), b""), ("f32", [1, 1], bytes(4)),
    ("f32", (1.0, 1), bytes(4)), ("f32", (True, 1), bytes(4)), ("f32", (1, 1), "abcd"),
])  # fmt: skip
def test_a_blob_is_exact(dtype, shape, data):
    with pytest.raises(ValidationError):
        Blob(dtype=dtype, shape=shape, data=data)


def test_messages_do_not_change_and_do_not_show_their_bytes():
    message = decode(rows(1, 3), CAPS)
    with pytest.raises(ValidationError):
        message.step = 1
    assert "data" not in repr(message)
    with pytest.raises(ValidationError):
        DropCache(cache=1, note="x")
    assert encode(Bye()) == b"SS\x01\x0c\x01\x00\x00\x00\x80"


@pytest.mark.parametrize("code", ["SS-5001", "SS-1274", "SS-2010", "SS-4016", "SS-404"])
def test_a_server_declines_for_want_of_room_alone(code):
    """Any other code would be the client's own word, such as of its budget, in the server's mouth."""
    good = encode(kinds.Declined(step=0, code="SS-4040"))
    with pytest.raises(RemoteProtocolError):
        decode(good.replace(b"SS-4040", code.encode()), CAPS)
    with pytest.raises(ValidationError):
        kinds.Declined(step=0, code=code)
