"""Bodies: one encoding, nothing but codes for garbage."""

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.aggregate import wire
from securesplit.errors import RemoteProtocolError

HEAD = {"session": bytes(16), "round": 1, "cfg": bytes(32)}
BODIES = [
    wire.Advertise(**HEAD, name="a", certificate=b"c", mask_key=bytes(32), share_key=bytes(32), commit_self=bytes(32), commit_group=b"", signature=bytes(64)),
    wire.Roster(**HEAD, adverts=(b"x", b"y")),
    wire.Shares(**HEAD, sealed=(("b", bytes(80)),), signature=bytes(64)),
    wire.Routed(**HEAD, members=("a", "b"), sealed=(("b", bytes(112)),)),
    wire.Masked(**HEAD, vector_digest=bytes(32), signature=bytes(64)),
    wire.Survivors(**HEAD, survivors=("a",), dropped=("b",)),
    wire.Consistent(**HEAD, signature=bytes(64)),
    wire.Bundle(**HEAD, signatures=(("a", bytes(64)),)),
    wire.Unmask(**HEAD, self_shares=(("a", bytes(32)),), seed_shares=(), signature=bytes(64)),
    wire.Result(**HEAD, survivors=("a",)),
    wire.Abort(**HEAD, code="SS-6010"),
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda b: type(b).__name__)
def test_a_body_comes_back_as_it_was(body):
    data = wire.encode(body)
    assert wire.decode(type(body), data) == body
    assert msgpack.unpackb(data)["round"] == 1


@pytest.mark.parametrize("body", BODIES, ids=lambda b: type(b).__name__)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_damaged_body_is_refused_or_means_something_else(body, data):
    whole = bytearray(wire.encode(body))
    at = data.draw(st.integers(0, len(whole) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "grow"])):
        case "flip":
            whole[at] ^= data.draw(st.integers(1, 255))
        case "cut":
            del whole[at]
        case _:
            whole.insert(at, data.draw(st.integers(0, 255)))
    if bytes(whole) == wire.encode(body):
        return
    try:
        parsed = wire.decode(type(body), bytes(whole))
    except RemoteProtocolError:
        parsed = None
    assert parsed != body


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=300), kind=st.sampled_from(BODIES))
def test_garbage_gives_the_code_and_nothing_else(data, kind):
    with pytest.raises(RemoteProtocolError) as error:
        wire.decode(type(kind), data)
    assert error.value.code == "SS-6014"


def refused(kind, data):
    with pytest.raises(RemoteProtocolError) as error:
        wire.decode(kind, data)
    return error.value.code == "SS-6014"


def test_another_encoding_of_the_same_body_is_refused():
    fields = {**HEAD, "survivors": ["a"]}
    assert wire.decode(wire.Result, msgpack.packb(fields))
    assert refused(wire.Result, msgpack.packb(dict(reversed(fields.items()))))
    assert refused(wire.Result, msgpack.packb(fields) + b"\0")
    assert refused(wire.Result, msgpack.packb(fields).replace(b"\x01\xa3cfg", b"\xcc\x01\xa3cfg"))


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1}, {"round": -1}, {"round": 1 << 53}, {"round": True}, {"round": 1.0}, {"session": b"short"}, {"cfg": "text" * 8},
        {"survivors": "abc"}, {"survivors": [""]}, {"survivors": ["x" * 129]}, {"survivors": [b"a"]}, {"survivors": ["a"] * 257}, {"survivors": None},
    ],
)  # fmt: skip
def test_fields_that_break_their_rules_are_refused(changes):
    assert refused(wire.Result, msgpack.packb({**HEAD, "survivors": ["a"], **changes}))


def test_size_and_depth_are_capped():
    assert refused(wire.Result, bytes(wire.MAX_BODY + 1))
    assert refused(wire.Result, b"\x91" * 5000)
    assert refused(wire.Roster, b"\xdf\xff\xff\xff\xff")


@pytest.mark.parametrize("code", ["SS-4001", "SS-60001", "boom", "SS-6\N{ARABIC-INDIC DIGIT ZERO}00"])
def test_an_abort_carries_a_code_of_this_family_only(code):
    assert refused(wire.Abort, msgpack.packb({**HEAD, "code": code}))


def test_the_signature_is_the_only_thing_left_out_of_what_is_signed():
    for body in BODIES:
        inside = msgpack.unpackb(wire.unsigned(body))
        assert set(type(body).model_fields) - set(inside) <= {"signature"}


def test_bodies_do_not_print_what_they_hold():
    assert {repr(b) for b in BODIES} == {f"{type(b).__name__}(round=1)" for b in BODIES}
    assert {str(b) for b in BODIES} == {"round=1"}
