"""A journal that was cut anywhere gives back whole frames and takes more; one bit that turned is never taken for a frame."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import CheckFailed, InputError
from securesplit.kept.frames import Frames

FRAMES = (b"first", b"", b"x" * 40)


def written(path, frames=FRAMES):
    file = Frames(path)
    for frame in frames:
        file.append(frame)
    file.close()
    return path.read_bytes()


def read(path):
    file = Frames(path)
    file.close()
    return file.found


def test_frames_come_back_in_order_and_private(tmp_path):
    written(tmp_path / "j")
    assert read(tmp_path / "j") == FRAMES
    assert (tmp_path / "j").stat().st_mode & 0o077 == 0


def test_a_tail_that_was_torn_at_any_byte_is_dropped_and_written_over(tmp_path):
    data = written(tmp_path / "whole")
    ends = [0, *(len(written(tmp_path / f"{n}", FRAMES[:n])) for n in range(4))]
    for cut in range(len(data)):
        path = tmp_path / "cut"
        path.write_bytes(data[:cut])
        file = Frames(path)
        kept = max(n for n in range(4) if cut >= ends[n + 1] or n == 0)
        assert file.found == FRAMES[:kept], cut
        file.append(b"after")
        file.close()
        assert read(path) == (*FRAMES[:kept], b"after"), cut
        path.unlink()


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_bit_that_turned_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bit") / "j"
    whole = bytearray(written(path))
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    path.write_bytes(whole)
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.code == "SS-1292"


def test_a_frame_that_was_left_out_or_moved_is_refused(tmp_path):
    one, two = written(tmp_path / "1", FRAMES[:1]), written(tmp_path / "2", FRAMES[:2])
    whole = written(tmp_path / "3")
    (tmp_path / "out").write_bytes(one + whole[len(two) :])
    with pytest.raises(InputError, match="damaged"):
        read(tmp_path / "out")


def test_zeros_that_a_loss_of_power_left_are_a_torn_tail(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(written(path) + bytes(100))
    assert read(path) == FRAMES


@pytest.mark.parametrize("takes", [0, 1, 20, 30])
def test_a_disk_that_fills_up_takes_no_part_of_a_frame_and_nothing_more(tmp_path, takes):
    path, room = tmp_path / "j", [1000]

    def write(file, data):
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        size = os.write(file, data[: room[0]])
        room[0] -= size
        return size

    file = Frames(path, write=write)
    file.append(b"whole")
    room[0] = takes
    with pytest.raises(CheckFailed) as caught:
        file.append(b"does not fit")
    assert caught.value.code == "SS-1589"
    room[0] = 1000
    with pytest.raises(CheckFailed):  # The engine has moved on; only a fresh start may go on.
        file.append(b"later")
    file.close()
    assert read(path) == (b"whole",)
