"""A transcript holds the bytes that the server saw, all of them and nothing besides."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError, RemoteProtocolError
from securesplit.protocol.codec import encode
from securesplit.protocol.messages import Backward, Blob, Bye, Forward, Gradient, Hello, Hidden, Secagg
from securesplit.protocol.transcript import Recorder, Transcript, array_of


def blob(values: np.ndarray) -> Blob:
    return Blob(dtype="f32", shape=values.shape, data=values.astype("<f4").tobytes())


def start(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "transcript.json").write_text(json.dumps({"version": 1}))


def recorded(directory: Path, frames, peer: str = "alice", number: int = 0) -> Transcript:
    start(directory)
    recorder = Recorder(directory, peer=peer, number=number)
    for i, (direction, data) in enumerate(frames):
        recorder.record(direction, 10 + i, data)
    if any(direction == 0 for direction, _ in frames):
        recorder.close()
    else:
        recorder._file.close()  # As a killed server leaves it; one that closes keeps nothing of a silent client.
    return Transcript.load(directory)


@given(frames=st.lists(st.tuples(st.sampled_from([0, 1]), st.binary(max_size=40)), max_size=6))
@settings(max_examples=40, deadline=None)
def test_exactly_the_bytes_come_back(tmp_path_factory, frames):
    directory = tmp_path_factory.mktemp("t")
    transcript = recorded(directory, frames)
    assert list(transcript.frames(0)) == frames
    assert transcript.bytes_seen() == tuple(sum(len(d) for way, d in frames if way == side) for side in (0, 1))
    # The oracle: the file's layout, written once more.
    written = b"".join(struct.pack("<BQI", way, 10 + i, len(d)) + d for i, (way, d) in enumerate(frames))
    assert (directory / "0000.bin").read_bytes() == written


def test_a_connection_is_never_written_twice(tmp_path):
    recorded(tmp_path, [(0, b"x")])
    with pytest.raises(FileExistsError):
        Recorder(tmp_path, peer="bob", number=0)


def test_a_torn_last_record_is_left_out_wherever_it_is_torn(tmp_path):
    frames = [(0, encode(Bye())), (1, encode(Bye()))]
    transcript = recorded(tmp_path, frames)
    path = tmp_path / "0000.bin"
    whole, first = path.read_bytes(), 13 + len(frames[0][1])
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert list(transcript.frames(0)) == (frames[:1] if end >= first else []), end
        assert len(list(transcript.messages(0))) == (end >= first)


HELLO = encode(Hello(version=1, nonce=bytes(32), policy="0" * 64))


def test_a_whole_recording_has_no_fault(tmp_path):
    transcript = recorded(tmp_path, [(0, HELLO), (1, encode(Bye())), (0, encode(Bye()))])
    assert transcript.faults() == ()
    transcript.require_whole()


def test_every_cut_and_every_foreign_byte_is_a_fault_but_between_records(tmp_path):
    transcript = recorded(tmp_path, [(0, HELLO), (0, encode(Bye()))])
    path = tmp_path / "0000.bin"
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert bool(transcript.faults()) == (end != 13 + len(HELLO)), end
    for tail in (b"\0", b"x" * 12, b"x" * 100):
        path.write_bytes(whole + tail)
        assert len(transcript.faults()) == 1
    path.write_bytes(bytes([7]) + whole[1:])
    assert transcript.faults() == ("0000.bin: record 1 went neither way",)


@pytest.mark.parametrize(
    ("frames", "what"),
    [
        ([], "0000.bin: it holds no record"),
        ([(0, encode(Bye()))], "0000.bin: the client's first message is no Hello"),
        ([(1, HELLO)], "0000.bin: the client's first message is no Hello"),
        ([(0, HELLO), (0, b"noise")], "0000.bin: record 2 is no message (SS-4001)"),
    ],
)  # fmt: skip
def test_what_no_server_of_ours_writes_is_a_fault(tmp_path, frames, what):
    transcript = recorded(tmp_path, frames)
    assert transcript.faults() == (what,)
    with pytest.raises(InputError) as caught:
        transcript.require_whole()
    assert (caught.value.code, caught.value.exit_code, caught.value.details) == ("SS-1301", 2, (what,))


def test_a_file_without_its_partner_is_a_fault(tmp_path):
    recorded(tmp_path, [(0, HELLO)])
    recorded(tmp_path, [(0, HELLO)], number=1)
    (tmp_path / "0000.peer").unlink()
    (tmp_path / "0001.bin").unlink()
    assert Transcript.load(tmp_path).faults() == ("0000.bin: there is no 0000.peer", "0001.peer: there is no 0001.bin")


def test_bytes_that_are_no_message_are_refused_with_a_code(tmp_path):
    transcript = recorded(tmp_path, [(0, encode(Bye())), (0, b"noise")])
    found = transcript.messages(0)
    assert next(found) == (0, Bye())
    with pytest.raises(RemoteProtocolError) as caught:
        next(found)
    assert caught.value.code == "SS-4001"


@pytest.mark.parametrize("fault", ["absent", "no json", "bad json", "odd peer"])
def test_a_directory_that_holds_no_transcript_is_refused(tmp_path, fault):
    directory = tmp_path / "t"
    if fault != "absent":
        start(directory)
        Recorder(directory, peer="alice", number=0).close()
    if fault == "no json":
        (directory / "transcript.json").unlink()
    if fault == "bad json":
        (directory / "transcript.json").write_text("{")
    if fault == "odd peer":
        (directory / "first.peer").write_text("alice")
    with pytest.raises(InputError) as caught:
        Transcript.load(directory)
    assert caught.value.code == "SS-1301"


def test_observations_join_each_sequence_with_its_answer_and_its_gradient(tmp_path):
    rng = np.random.default_rng(1)
    hidden, output, gradient, other = (rng.normal(size=(5, 3)).astype(np.float32) for _ in range(4))
    lone = rng.normal(size=(1, 3)).astype(np.float32)
    frames = [
        (0, encode(Forward(step=4, lengths=(2, 3), learn=True, hidden=blob(hidden)))),
        (1, encode(Hidden(step=4, hidden=blob(output)))),
        (0, encode(Backward(step=4, gradient=blob(gradient)))),
        (1, encode(Gradient(step=4, gradient=blob(other)))),  # the server's own, known to it anyway
        (
            0,
            encode(Forward(step=4, lengths=(2, 3), learn=True, hidden=blob(hidden))),
        ),  # a retry is no second observation
        (0, encode(Forward(step=5, lengths=(1,), cache=9, learn=False, hidden=blob(lone)))),  # never answered
    ]
    recorded(tmp_path, frames)
    transcript = recorded(tmp_path, frames[-1:], peer="bob", number=3)
    assert transcript.peers == ((0, "alice"), (3, "bob"))
    found = list(transcript.observations())
    assert [(o.peer, o.connection, o.step, o.row, o.cache) for o in found] == [
        ("alice", 0, 4, 0, 0), ("alice", 0, 4, 1, 0), ("alice", 0, 5, 0, 9), ("bob", 3, 5, 0, 9),
    ]  # fmt: skip
    for observation, rows in zip(found[:2], (slice(0, 2), slice(2, 5)), strict=True):
        assert np.array_equal(observation.hidden, hidden[rows])
        assert np.array_equal(observation.output, output[rows])
        assert np.array_equal(observation.gradient, gradient[rows])
    for observation in found[2:]:
        assert np.array_equal(observation.hidden, lone)
        assert observation.output is None
        assert observation.gradient is None


def test_messages_of_secure_sums_are_listed_with_their_client_and_direction(tmp_path):
    message = Secagg(round=1, stage=2, body=b"b", vector=Blob(dtype="u32", shape=(1,), data=b"\1\0\0\0"))
    transcript = recorded(tmp_path, [(0, encode(message)), (1, encode(Bye())), (1, encode(message))])
    assert list(transcript.aggregation_messages()) == [("alice", 0, message), ("alice", 1, message)]


def test_bf16_is_read_as_torch_reads_it():
    words = np.arange(1 << 16, dtype="<u2")
    expected = torch.from_numpy(words.view("<i2")).view(torch.bfloat16).float().numpy()
    found = array_of(Blob(dtype="bf16", shape=(256, 256), data=words.tobytes()))
    assert found.shape == (256, 256)
    assert np.array_equal(found.ravel().view(np.uint32), expected.view(np.uint32))  # every bit pattern, NaN included


def test_a_transcript_of_int8_is_read_as_floats(tmp_path):
    rows = struct.pack("<f2b", 0.5, 127, -3) + struct.pack("<f2b", 0.0, 0, 0)
    coded = Blob(dtype="int8", shape=(2, 2), data=rows)
    frames = [
        (0, encode(Forward(step=0, lengths=(2,), learn=True, hidden=coded))),
        (1, encode(Hidden(step=0, hidden=coded))),
        (0, encode(Backward(step=0, gradient=coded))),
    ]
    (found,) = recorded(tmp_path, frames).observations()
    for seen in (found.hidden, found.output, found.gradient):
        assert seen.dtype == np.float32
        assert seen.tolist() == [[63.5, -1.5], [0.0, 0.0]]


def test_f32_is_read_as_it_is_and_whole_numbers_are_no_floats():
    values = np.array([[1.5, -0.0], [np.inf, 3e-45]], dtype="<f4")
    assert np.array_equal(array_of(blob(values)), values)
    with pytest.raises(InputError) as caught:
        array_of(Blob(dtype="u32", shape=(1,), data=bytes(4)))
    assert caught.value.code == "SS-1302"


def test_of_a_client_that_said_nothing_nothing_is_kept(tmp_path):
    recorder = Recorder(tmp_path, peer="spiffe://t/a", number=3)
    recorder.record(1, 5, b"a greeting")
    recorder.close()
    assert list(tmp_path.iterdir()) == []
