"""Rows of a run: on the disk line by line, whole after any crash, locked while they are written."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import stat
import struct
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError
from securesplit.policy.meaning import Meaning
from securesplit.runs.metrics import METRICS, Metrics, Reading, is_written, read_metrics
from securesplit.runs.tensorboard import TensorBoard

BY_USER = Meaning(1e-6, "user", "replace-one")


class Meter:
    """Shows what a test sets."""

    def __init__(self) -> None:
        self.up = 0
        self.epsilon: float | None = None

    def __call__(self) -> Reading:
        return Reading(self.up, 2 * self.up, self.epsilon, None if self.epsilon is None else BY_USER)


def ticking(step: float = 1.0):
    now = [100.0]

    def clock() -> float:
        now[0] += step
        return now[0]

    return clock


def test_each_row_is_on_the_disk_before_the_next_and_private(tmp_path):
    meter = Meter()
    metrics = Metrics(tmp_path, meter, lr=0.5, clock=ticking())
    path = tmp_path / METRICS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    metrics.held_out(number=0, step=0, loss=3.0)
    meter.up, meter.epsilon = 10, 0.25
    metrics.step(number=0, step=1, loss=2.5)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"kind": "held-out", "step": 0, "round": 0, "loss": 3.0, "lr": None, "seconds": 1.0, "bytes_up": 0, "bytes_down": 0, "epsilon": None,
         "delta": None, "unit": None, "relation": None},
        {"kind": "step", "step": 1, "round": 0, "loss": 2.5, "lr": 0.5, "seconds": 2.0, "bytes_up": 10, "bytes_down": 20, "epsilon": 0.25,
         "delta": 1e-6, "unit": "user", "relation": "replace-one"},
    ]  # fmt: skip
    metrics.step(number=0, step=2, loss=float("nan"), lr=0.25)
    metrics.close()
    metrics.close()
    rows = read_metrics(tmp_path)
    assert (rows.losses, rows.curve, rows.torn, rows.faults) == ((2.5,), (3.0,), False, ())
    assert (rows.rows[-1].loss, rows.rows[-1].lr) == (None, 0.25)


def written(folder, steps: int) -> bytes:
    meter = Meter()
    metrics = Metrics(folder, meter, clock=ticking())
    for step in range(1, steps + 1):
        meter.up = 7 * step
        metrics.step(number=0, step=step, loss=float(step))
    metrics.close()
    return (folder / METRICS).read_bytes()


@settings(deadline=None, max_examples=25)
@given(cut=st.integers(min_value=0, max_value=900), after=st.integers(min_value=0, max_value=5))
def test_a_file_cut_anywhere_is_read_and_gone_on_with(tmp_path_factory, cut, after):
    folder = tmp_path_factory.mktemp("cut")
    whole = written(folder, 4)
    data = whole[:cut]
    (folder / METRICS).write_bytes(data)
    complete = data.count(b"\n")
    rows = read_metrics(folder)
    assert [row.step for row in rows.rows] == list(range(1, complete + 1))
    assert rows.torn == (not data.endswith(b"\n") and bool(data))
    assert rows.faults == ()
    kept = min(complete, after)
    meter = Meter()
    meter.up = 100
    metrics = Metrics(folder, meter, after=after, clock=ticking())
    metrics.step(number=1, step=after + 1, loss=9.0)
    metrics.close()
    again = read_metrics(folder)
    assert [row.step for row in again.rows] == [*range(1, kept + 1), after + 1]
    assert (again.torn, again.faults) == (False, ())
    assert again.rows[-1].seconds == kept + 1, "the clock goes on where the kept rows end"
    assert again.rows[-1].bytes_up == (7 * kept) + 100, "and so do the bytes, of a new session"


def test_a_run_that_begins_anew_leaves_nothing_of_the_old_one(tmp_path):
    written(tmp_path, 3)
    Metrics(tmp_path, Meter()).close()
    assert (tmp_path / METRICS).read_bytes() == b""


def test_damaged_lines_are_counted_and_never_quoted(tmp_path):
    good = written(tmp_path, 2)
    (tmp_path / METRICS).write_bytes(b'{"secret": 1}\n' + good + b"\xff\xfe\n" + good)
    rows = read_metrics(tmp_path)
    assert len(rows.rows) == 4
    assert len(rows.faults) == 2
    assert "line 1:" in rows.faults[0]
    assert not any("secret" in fault for fault in rows.faults)


def test_a_long_file_is_read_from_its_end(tmp_path):
    written(tmp_path, 200)
    rows = read_metrics(tmp_path, last_bytes=1000)
    assert 0 < len(rows.rows) < 20
    assert rows.rows[-1].step == 200
    assert rows.faults == ()


def test_no_file_is_no_rows(tmp_path):
    assert read_metrics(tmp_path).rows == ()
    assert not is_written(tmp_path)


def test_two_runs_cannot_share_a_file_and_a_death_lets_go_of_it(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from securesplit.runs.metrics import Metrics, Reading\n"
        "m = Metrics(Path(sys.argv[1]), lambda: Reading(0, 0, None)); m.step(number=0, step=1, loss=1.0)\n"
        "print('open', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "open\n"
        assert is_written(tmp_path)
        before = (tmp_path / METRICS).read_bytes()
        with pytest.raises(InputError, match="SS-1282"):
            Metrics(tmp_path, Meter())
        assert (tmp_path / METRICS).read_bytes() == before, "the other run's rows stay"
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert not is_written(tmp_path)
    assert [row.step for row in read_metrics(tmp_path).rows] == [1]


def test_a_look_at_a_run_does_not_keep_it_from_beginning(tmp_path):
    written(tmp_path, 1)
    with (tmp_path / METRICS).open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        leave = threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN))
        leave.start()
        Metrics(tmp_path, Meter()).close()
        leave.join()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_said(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="SS-1282"):
        Metrics(tmp_path, Meter())


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / METRICS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="SS-1282"):
        Metrics(tmp_path, Meter())
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_without_the_package_tensorboard_is_refused_with_a_code(tmp_path, monkeypatch):
    monkeypatch.setattr("securesplit.runs.tensorboard.find_spec", lambda name: None)
    with pytest.raises(InputError, match="SS-1283") as caught:
        TensorBoard(tmp_path)
    assert "securesplit[tensorboard]" in caught.value.hint


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the extra is not installed")
def test_tensorboard_reads_what_was_written(tmp_path):
    metrics = Metrics(tmp_path, Meter(), lr=0.5, sink=TensorBoard(tmp_path, now=lambda: 7.0))
    metrics.held_out(number=0, step=0, loss=4.0)
    for step in (1, 2, 3):
        metrics.step(number=0, step=step, loss=step + 0.5)
    metrics.close()
    from tensorboard.compat.proto.event_pb2 import Event

    (file,) = (tmp_path / "tensorboard").iterdir()
    assert stat.S_IMODE((tmp_path / "tensorboard").stat().st_mode) == 0o700
    data, found = file.read_bytes(), []
    while data:  # The record format, by hand: length, its checksum, the message, its checksum.
        (length,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        found += [(v.tag, event.step, v.tensor.float_val[0], event.wall_time) for v in event.summary.value]
    assert [(step, value) for tag, step, value, _ in found if tag == "loss/step"] == [(1, 1.5), (2, 2.5), (3, 3.5)]
    assert ("loss/held-out", 0, 4.0, 7.0) in found
    assert ("lr", 1, 0.5, 7.0) in found


class EventFiles:
    """Stands for the package tensorboard: what a reader of the folder's files sees, one after another."""

    START = "start"

    def __init__(self, monkeypatch) -> None:
        self.files: list[list[SimpleNamespace]] = []

        def writer(place: str) -> SimpleNamespace:
            self.files.append(file := [])
            return SimpleNamespace(add_event=file.append, flush=lambda: None, close=lambda: None)

        proto = SimpleNamespace(Event=SimpleNamespace, SessionLog=lambda status: status)
        proto.SessionLog.START = self.START
        for name, module in {
            "compat.proto.event_pb2": proto,
            "summary.writer.event_file_writer": SimpleNamespace(EventFileWriter=writer),
            "plugins.scalar.summary_v2": SimpleNamespace(scalar_pb=lambda tag, value: (tag, value)),
        }.items():
            monkeypatch.setitem(sys.modules, f"tensorboard.{name}", module)
        monkeypatch.setattr("securesplit.runs.tensorboard.find_spec", lambda name: object())

    def scalars(self, tag: str) -> list[tuple[int, float, float]]:
        shown: list[tuple[str, int, float, float]] = []
        marks = 0
        for event in (event for file in self.files for event in file):
            if getattr(event, "session_log", None) == self.START:
                marks += 1  # The first is the run's start; from the second on each voids its step and all behind it.
                shown = [kept for kept in shown if kept[1] < event.step or marks == 1]
            else:
                shown.append((event.summary[0], event.step, event.summary[1], event.wall_time))
        return [event[1:] for event in shown if event[0] == tag]


def interrupted_and_resumed(folder):
    """Ten steps of which a checkpoint of step 2 knows two, and one of the two evaluations at step 2; then they are done again."""
    for after, looks in ((None, None), (2, 1)):
        clock = iter(range(0, 1000, 10))
        sink = TensorBoard(folder, now=lambda: 1000.0)
        metrics = Metrics(folder, Meter(), after=after, looks=looks, lr=0.5, sink=sink, clock=lambda: next(clock))  # noqa: B023
        if after is None:
            metrics.held_out(number=0, step=0, loss=4.0)
            metrics.step(number=0, step=1, loss=1.5)
            metrics.step(number=0, step=2, loss=2.5)
        metrics.held_out(number=1, step=2, loss=3.0)
        for step in range(3, 11 if after is None else 6):
            metrics.step(number=1, step=step, loss=step + 0.5)
        metrics.close()


STEPS = [(step, step + 0.5) for step in range(1, 6)]


def test_a_run_that_goes_on_shows_each_step_once(tmp_path, monkeypatch):
    events = EventFiles(monkeypatch)
    interrupted_and_resumed(tmp_path)
    assert [(step, value) for step, value, _ in events.scalars("loss/step")] == STEPS
    assert [(step, value) for step, value, _ in events.scalars("loss/held-out")] == [(0, 4.0), (2, 3.0)]
    times = [when for _, _, when in events.scalars("loss/step")]
    assert times == [990.0, 1000.0, 1000.0, 1000.0, 1000.0], "what stays is as old as its row says"
    rows = read_metrics(tmp_path)
    assert [(row.kind, row.step) for row in rows.rows] == [
        ("held-out", 0), ("step", 1), ("step", 2), ("held-out", 2), ("step", 3), ("step", 4), ("step", 5),
    ]  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="the extra is not installed")
def test_tensorboard_itself_shows_each_step_of_a_resumed_run_once(tmp_path):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    interrupted_and_resumed(tmp_path)
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()

    def shown(tag):
        return [(event.step, event.tensor_proto.float_val[0]) for event in read.Tensors(tag)]

    assert shown("loss/step") == STEPS
    assert shown("loss/held-out") == [(0, 4.0), (2, 3.0)]
