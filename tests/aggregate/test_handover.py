"""What is handed to one that comes late, against a server and clients that want to hand it something else.

Signatures are a toy here: a keyed hash by name, which is what ``verify`` is passed in for. The real ones: tests/e2e.
"""

from __future__ import annotations

import hashlib
import hmac
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.aggregate.handover import Answers, Common, Sealed, Wanted, common_of, seal_answer
from securesplit.aggregate.keys import Channel
from securesplit.errors import AggregationAborted, ConnectionFailed

ROSTER = ("alice", "bob", "carol", "dora", "erin")
VALUES = np.array([0.5, -1.25, 3.0, 0.0], dtype=np.float32)
HELD = Common(3, bytes(range(32)), VALUES)


def randomness(seed: int):
    return random.Random(seed).randbytes


def sign_as(name: str):
    return lambda data: hmac.digest(name.encode(), data, "sha256")


def verify(name: str, certificate: bytes, signature: bytes, data: bytes) -> None:
    if certificate != f"certificate of {name}".encode() or not hmac.compare_digest(sign_as(name)(data), signature):
        raise ConnectionFailed("SS-3213", "forged")


class Scene:
    """Dora asks; what the others do is up to the test."""

    def __init__(self, needed: int = 2, number: int = 1, seed: int = 1) -> None:
        self.channel = Channel(randomness(seed)(32))
        self.wanted = Wanted("job", "model", number, "dora", self.channel.public)
        self.answers = Answers(self.wanted, self.channel, roster=ROSTER, needed=needed, verify=verify)

    def answer(
        self,
        name: str,
        common: Common = HELD,
        *,
        whole: bool = True,
        wanted: Wanted | None = None,
        signer: str | None = None,
    ) -> Sealed:
        return seal_answer(
            wanted or self.wanted, common, name=name, certificate=f"certificate of {signer or name}".encode(),
            values=common.payload if whole else b"", sign=sign_as(signer or name), randomness=randomness(len(name)),
        )  # fmt: skip

    def takes(self, name: str, sealed: Sealed) -> Common | None:
        return self.answers.take(name, sealed)


def same(a: Common | None, b: Common) -> bool:
    return a is not None and (a.round, a.heard) == (b.round, b.heard) and np.array_equal(a.values, b.values)


def test_enough_who_say_the_same_are_believed_and_one_has_the_values():
    scene = Scene(needed=3)
    assert scene.takes("alice", scene.answer("alice", whole=False)) is None
    assert scene.takes("bob", scene.answer("bob")) is None
    assert same(scene.takes("carol", scene.answer("carol", whole=False)), HELD)


def test_the_values_may_come_last():
    scene = Scene(needed=2)
    for name in ("alice", "bob", "carol"):
        assert scene.takes(name, scene.answer(name, whole=False)) is None
    assert same(scene.takes("erin", scene.answer("erin")), HELD)


def test_one_who_answers_often_counts_once_and_by_its_last_answer():
    scene = Scene(needed=2)
    for _ in range(5):
        assert scene.takes("alice", scene.answer("alice")) is None
    later = replace(HELD, round=4)
    assert scene.takes("alice", scene.answer("alice", later)) is None
    assert scene.takes("bob", scene.answer("bob", whole=False)) is None, "alice says another round by now"
    assert same(scene.takes("carol", scene.answer("carol", later, whole=False)), later)


@pytest.mark.parametrize(
    "other",
    [
        replace(HELD, round=2),
        replace(HELD, heard=bytes(32)),
        replace(HELD, values=VALUES + np.float32(1e-6)),
        replace(HELD, values=VALUES[:3]),
    ],
    ids=["round", "heard", "values", "length"],
)
def test_those_who_hold_something_else_do_not_count_together(other):
    scene = Scene(needed=2)
    assert scene.takes("alice", scene.answer("alice")) is None
    assert scene.takes("bob", scene.answer("bob", other)) is None
    assert same(scene.takes("carol", scene.answer("carol", other, whole=False)), other)


def test_values_that_are_not_what_the_digest_says_are_not_taken():
    scene = Scene(needed=2)

    class Lies(Common):
        def digest(self, job: str, model: str) -> bytes:
            return HELD.digest(job, model)

    lie = Lies(HELD.round, HELD.heard, VALUES * 2)
    assert scene.takes("alice", scene.answer("alice", lie)) is None
    assert scene.takes("bob", scene.answer("bob", whole=False)) is None
    assert same(scene.takes("carol", scene.answer("carol")), HELD)


def test_rounds_that_the_asker_has_already_are_passed_over():
    scene = Scene(needed=1, number=4)
    assert scene.takes("alice", scene.answer("alice")) is None
    assert scene.answers.refused == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("job", "other"), ("model", "other"), ("round", 2), ("name", "erin"), ("key", bytes(31) + b"\x09")],
)
def test_an_answer_to_another_question_does_not_open(field, value):
    scene = Scene(needed=1)
    assert scene.takes("alice", scene.answer("alice", wanted=replace(scene.wanted, **{field: value}))) is None
    assert scene.answers.refused == ["alice"]


def test_strangers_impostors_and_the_asker_itself_do_not_count():
    scene = Scene(needed=1)
    for name in ("mallory", "dora"):
        assert scene.takes(name, scene.answer(name)) is None
    assert scene.takes("alice", scene.answer("alice", signer="mallory")) is None
    assert scene.takes("alice", scene.answer("bob")) is None, "bob's answer under alice's name"
    assert scene.answers.refused == ["alice"], "once, and no names that a server makes up"


@given(st.integers(0, 400), st.integers(1, 255))
@settings(deadline=None, max_examples=60)
def test_a_changed_byte_anywhere_is_no_answer(place, flip):
    scene = Scene(needed=1)
    sealed = scene.answer("alice")
    whole = bytearray(sealed.key + sealed.box)
    place %= len(whole)
    whole[place] ^= flip
    changed = Sealed(bytes(whole[:32]), bytes(whole[32:]))
    if place == 31 and flip == 0x80:  # The highest bit of an X25519 key is ignored, by RFC 7748: the same key.
        return
    assert scene.takes("alice", changed) is None
    assert scene.answers.refused == ["alice"]


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=200))
@settings(deadline=None, max_examples=60)
def test_noise_is_no_answer_and_no_accident(key, box):
    scene = Scene(needed=1)
    assert scene.takes("alice", Sealed(key, box)) is None
    assert scene.answers.refused == ["alice"]


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31)])
def test_a_key_of_low_order_is_answered_by_nobody(key):
    scene = Scene()
    with pytest.raises(AggregationAborted) as caught:
        scene.answer("alice", wanted=replace(scene.wanted, key=key))
    assert caught.value.code == "SS-6003"


def test_nobody_but_the_asker_reads_it():
    scene, other = Scene(needed=1), Scene(needed=1, seed=2)
    sealed = scene.answer("alice")
    assert HELD.payload not in sealed.box
    assert other.takes("alice", sealed) is None
    assert hashlib.sha256(HELD.payload).digest() not in sealed.box


def test_two_answers_of_one_client_have_keys_of_their_own():
    scene = Scene()
    boxes = {seal_answer(
        scene.wanted, HELD, name="alice", certificate=b"c", values=HELD.payload, sign=sign_as("alice"), randomness=randomness(seed)
    ) for seed in range(8)}  # fmt: skip
    assert len({box.key for box in boxes}) == len({box.box for box in boxes}) == 8


@given(st.integers(0, 1 << 20), st.binary(max_size=64), st.lists(st.floats(width=32, allow_nan=False), max_size=9))
@settings(deadline=None, max_examples=40)
def test_values_go_to_bytes_and_back(number, heard, values):
    held = Common(number, heard, np.array(values, dtype=np.float32))
    assert same(common_of(number, heard, held.payload), held)
