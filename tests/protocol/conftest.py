from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st

from securesplit.protocol.messages import (
    ITEM_BYTES,
    Backward,
    Blob,
    Bye,
    Confirm,
    Declined,
    DropCache,
    Failure,
    Forward,
    Gradient,
    Handover,
    Hello,
    Hidden,
    Join,
    Mark,
    RoundBegin,
    RoundKept,
    RoundReady,
    RoundStatus,
    Run,
    Seal,
    Secagg,
    Welcome,
)

STEP = st.integers(0, (1 << 53) - 1)
SMALL = st.integers(0, (1 << 31) - 1)
DIGEST = st.binary(min_size=32, max_size=32).map(bytes.hex)
NONCE = st.binary(min_size=32, max_size=32)
NAME = st.binary(min_size=16, max_size=16)
SIGNATURE = st.binary(min_size=8, max_size=80)
NAMES = st.lists(st.text(min_size=1, max_size=12), max_size=5).map(tuple)
WIDTH = 3


@st.composite
def int8_rows(draw, count: int, width: int) -> bytes:
    """Rows as docs/protocol.md allows them under int8, by struct alone."""
    out = b""
    for _ in range(count):
        steps = draw(st.lists(st.integers(-127, 127), min_size=width, max_size=width))
        if draw(st.booleans()) and width:
            steps[draw(st.integers(0, width - 1))] = draw(st.sampled_from([-127, 127]))
        full = max(map(abs, steps), default=0) == 127
        scale = draw(st.floats(2.0**-126, 2.0**120, width=32)) if full else 0.0
        out += struct.pack(f"<f{width}b", scale, *(steps if full else [0] * width))
    return out


@st.composite
def blobs(draw, shape: tuple[int, ...] | None = None, dtypes: tuple[str, ...] = ("f32", "bf16", "int8")) -> Blob:
    shape = shape or (draw(st.integers(0, 5)), WIDTH)
    dtype, size = draw(st.sampled_from(dtypes)), 1
    if dtype == "int8":
        return Blob(dtype=dtype, shape=shape, data=draw(int8_rows(*shape)))
    for side in shape:
        size *= side
    data = draw(st.binary(min_size=size * ITEM_BYTES[dtype], max_size=size * ITEM_BYTES[dtype]))
    return Blob(dtype=dtype, shape=shape, data=data)


@st.composite
def forwards(draw) -> Forward:
    lengths = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    cache = draw(st.just(0) | SMALL)
    learn = draw(st.booleans()) and not cache
    gain = draw(st.floats(0, 1, exclude_min=True))
    hidden = draw(blobs((sum(lengths), WIDTH)))
    return Forward(step=draw(STEP), lengths=lengths, cache=cache, learn=learn, gain=gain, hidden=hidden)


MESSAGES_OF = {
    Hello: st.builds(Hello, version=st.integers(0, (1 << 16) - 1), nonce=NONCE, policy=DIGEST),
    Welcome: st.builds(Welcome, session=NAME, nonce=NONCE, job=st.text(max_size=40), model=DIGEST, signature=SIGNATURE),
    Confirm: st.builds(Confirm, signature=SIGNATURE),
    Forward: forwards(),
    Hidden: st.builds(Hidden, step=STEP, hidden=blobs()),
    Backward: st.builds(Backward, step=STEP, gradient=blobs()),
    Gradient: st.builds(Gradient, step=STEP, gradient=blobs()),
    DropCache: st.builds(DropCache, cache=st.integers(1, (1 << 31) - 1)),
    Declined: st.builds(Declined, step=STEP, code=st.sampled_from(["SS-4017", "SS-4040", "SS-4041"])),
    RoundReady: st.builds(RoundReady, round=SMALL, dim=st.integers(1, (1 << 28) - 1), frozen=DIGEST),
    Run: st.builds(Run, run=NAME),
    Join: st.builds(
        Join, round=SMALL, name=st.text(min_size=1, max_size=12), certificate=st.binary(min_size=1, max_size=40), key=NONCE,
        signature=SIGNATURE, whole=st.booleans(),
    ),
    Handover: st.builds(
        Handover, to=st.text(min_size=1, max_size=12), of=st.text(min_size=1, max_size=12), asked=NONCE, key=NONCE,
        box=st.integers(0, 6).flatmap(lambda n: blobs((n,), ("u8",))),
    ),
    RoundBegin: st.builds(RoundBegin, round=SMALL, run=NAME),
    RoundKept: st.builds(RoundKept, round=SMALL, run=NAME, clients=NAMES.filter(bool)),
    RoundStatus: st.builds(RoundStatus, round=SMALL, closed=st.booleans(), missing=NAMES),
    Secagg: st.builds(
        Secagg, round=SMALL, stage=st.integers(0, 15), body=st.binary(max_size=40),
        vector=st.integers(0, 6).flatmap(lambda n: blobs((n,), ("u32",))),
    ),
    Seal: st.builds(
        Seal, number=SMALL, stream=NONCE, log=NAME, rows=st.integers(0, (1 << 63) - 1), head=NONCE, signature=SIGNATURE
    ),
    Mark: st.one_of(
        st.builds(Mark, what=st.just("use"), name=NONCE, code=st.sampled_from(["", "SS-4095"])),
        st.builds(Mark, what=st.sampled_from(["now", "ended"]), slot=st.integers(0, 256), name=st.just(b"") | NONCE),
    ),
    Failure: st.builds(Failure, code=st.integers(0, 9999).map(lambda n: f"SS-{n:04d}")),
    Bye: st.builds(Bye),
}  # fmt: skip


@pytest.fixture(scope="session")
def strategies() -> SimpleNamespace:
    """Hypothesis strategies for messages: ``of[class]``, ``any`` and the width of their tensors."""
    return SimpleNamespace(of=MESSAGES_OF, any=st.one_of(*MESSAGES_OF.values()), width=WIDTH)
