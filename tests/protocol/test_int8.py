"""The codec int8 as it is read: what a row says, the one way to say it, and everything that no row says."""

from __future__ import annotations

import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from securesplit.errors import RemoteProtocolError
from securesplit.protocol import int8
from securesplit.protocol.codec import Caps, decode, encode
from securesplit.protocol.messages import Blob, Hidden, size_of
from securesplit.protocol.transcript import array_of
from tests.protocol.conftest import int8_rows

SMALLEST, LARGEST = 2.0**-126, 2.0**120


def row(scale: float | bytes, *steps: int) -> bytes:
    """One row, by struct alone."""
    return (scale if isinstance(scale, bytes) else struct.pack("<f", scale)) + struct.pack(f"{len(steps)}b", *steps)


def acceptable(data: bytes, width: int) -> bool:
    """The rule of docs/protocol.md, byte by byte."""
    for at in range(0, len(data), 4 + width):
        (scale,), steps = struct.unpack_from("<f", data, at), struct.unpack_from(f"{width}b", data, at + 4)
        if data[at : at + 4] == bytes(4):
            if any(steps):
                return False
        elif not (SMALLEST <= scale <= LARGEST) or max(map(abs, steps), default=0) != 127:
            return False
    return True


def refused(data: bytes, shape: tuple[int, ...]) -> bool:
    """Whether bytes are refused, as a blob and in a whole message alike."""
    whole = encode(Hidden.model_construct(step=0, hidden=Blob.model_construct(dtype="int8", shape=shape, data=data)))
    try:
        blob = Blob(dtype="int8", shape=shape, data=data)
    except ValidationError:
        with pytest.raises(RemoteProtocolError) as caught:
            decode(whole, Caps(message_bytes=1 << 24))
        assert caught.value.code == "SS-4005"
        assert caught.value.__cause__ is None
        return True
    assert decode(whole, Caps(message_bytes=1 << 24)).hidden == blob
    return False


def test_a_row_is_its_scale_and_one_byte_a_coordinate():
    data = row(0.5, 127, -3, 0) + row(0.0, 0, 0, 0) + row(SMALLEST, 1, -127, 2) + row(LARGEST, -127, 127, 1)
    found = array_of(Blob(dtype="int8", shape=(4, 3), data=data))
    assert found.dtype == np.float32
    expected = [
        [63.5, -1.5, 0],
        [0, 0, 0],
        [2.0**-126, -127 * 2.0**-126, 2.0**-125],
        [-127 * LARGEST, 127 * LARGEST, LARGEST],
    ]
    assert found.tolist() == expected
    assert found.flags.writeable
    assert not np.signbit(found[1]).any()


@given(data=st.data(), width=st.integers(1, 6), count=st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_every_value_is_the_product_rounded_once(data, width, count):
    rows = data.draw(int8_rows(count, width))
    blob = Blob(dtype="int8", shape=(count, width), data=rows)
    found = array_of(blob)
    assert found.shape == (count, width)
    for i in range(count):
        at = i * (4 + width)
        (scale,), steps = struct.unpack_from("<f", rows, at), struct.unpack_from(f"{width}b", rows, at + 4)
        for value, step in zip(found[i].tolist(), steps, strict=True):
            assert value == np.float32(step * scale)  # The product of 24 and 8 bits is exact in float64.
            assert math.isfinite(value)


@given(data=st.data(), width=st.integers(0, 3), count=st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_bytes_are_refused_just_where_the_rule_says(data, width, count):
    size = count * (4 + width)
    scales = st.sampled_from([bytes(4), row(0.5), row(SMALLEST), row(LARGEST), row(-0.0), row(math.nan), row(-1.0)])
    steps = st.sampled_from([0, 0, 127, -127, -128, 5])
    likely = st.lists(
        st.builds(lambda s, q: s + row(b"", *q), scales, st.lists(steps, min_size=width, max_size=width)),
        min_size=count, max_size=count,
    ).map(b"".join)  # fmt: skip
    rows = data.draw(likely | st.binary(min_size=size, max_size=size))
    assert refused(rows, (count, width)) == (not acceptable(rows, width))


@pytest.mark.parametrize("bits", [
    0x7F800000, 0x7FC00000, 0x7F800001, 0xFFC00000, 0xFF800000, 0xBF000000, 0x80000000, 0x80000001, 0x007FFFFF, 0x00000001,
    0x7B800001, 0x7F7FFFFF,
], ids=hex)  # fmt: skip
def test_a_scale_is_positive_normal_and_at_most_2_to_the_120(bits):
    scale = bits.to_bytes(4, "little")
    assert refused(scale + row(b"", 127, 0), (1, 2))
    assert refused(row(0.5, 127, 0) + scale + row(b"", 127, 0), (2, 2))
    assert refused(scale + row(b"", 0, 0), (1, 2))


@pytest.mark.parametrize("good", [row(SMALLEST, 127, 0), row(LARGEST, -127, 0), row(0.0, 0, 0), row(1.0, 127, 127)])
def test_the_ends_of_the_range_are_taken(good):
    assert not refused(good, (1, 2))


def test_no_step_is_minus_128_and_no_row_stops_short_of_127():
    for steps in ((-128, 0), (127, -128), (126, 0), (-126, 126), (0, 0)):
        assert refused(row(0.5, *steps), (1, 2)), steps
    assert refused(row(0.0, 0, 1), (1, 2))


@pytest.mark.parametrize("shape", [(1, 2), (2, 3), (0, 4), (3, 0), (2, 2, 3), (5,)])
def test_the_number_of_bytes_follows_from_the_shape(shape):
    wanted = math.prod(shape[:-1]) * (4 + shape[-1])
    assert size_of("int8", shape) == int8.size(shape) == wanted
    rows = (row(0.5, *([127] * shape[-1])) if shape[-1] else bytes(4)) * math.prod(shape[:-1])
    assert array_of(Blob(dtype="int8", shape=shape, data=rows)).shape == shape
    for other in (rows + b"\0", rows[:-1] if rows else b"\0", rows + rows if rows else bytes(8)):
        with pytest.raises(ValidationError):
            Blob(dtype="int8", shape=shape, data=other)


@pytest.mark.parametrize(
    "shape", [[(1 << 31) - 1, (1 << 31) - 1], [(1 << 31) - 1, 0], [1, (1 << 31) - 1], [0, 1 << 40], [1, -4]]
)
def test_what_is_announced_is_not_allocated(shape):
    frame = encode(
        Hidden.model_construct(step=0, hidden=Blob.model_construct(dtype="int8", shape=shape, data=bytes(64)))
    )
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError) as caught:
            decode(frame, Caps(message_bytes=1 << 40))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.code == "SS-4005"


def test_looking_at_rows_takes_less_memory_than_their_values():
    width, count = 1024, 2048
    rows = row(0.5, 127, *([0] * (width - 1))) * count
    tracemalloc.start()
    try:
        Blob(dtype="int8", shape=(count, width), data=rows)
        assert tracemalloc.get_traced_memory()[1] < len(rows)
    finally:
        tracemalloc.stop()
