"""The life of the process that works on ciphertexts: killed, stopped, starved, without TenSEAL, orphaned, lying."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.aggregate.he import HeScheme
from securesplit.aggregate.he_pipe import ENCRYPT, MALFORMED, OK, HeProcess, receive, send
from securesplit.aggregate.he_worker import HeWorker
from securesplit.errors import InputError, SecureSplitError

SCHEME = HeScheme("bfv", 3)
WORDS = np.arange(7, dtype=np.uint32)


def outcome(action, *args) -> str:
    try:
        action(*args)
    except SecureSplitError as error:
        return error.code
    return "done"


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def opens(worker: HeWorker) -> bool:
    keys = worker.make_keys(SCHEME)
    handle = worker.begin(SCHEME, keys.public, WORDS.size)
    worker.add(handle, worker.encrypt(SCHEME, keys.secret, WORDS))
    return worker.decrypt(SCHEME, keys.secret, worker.finish(handle), WORDS.size).tolist() == WORDS.tolist()


def in_flight(worker: HeWorker, end) -> str:
    """What a call comes to when ``end`` is done while it waits for a process that stands still."""
    found = []
    os.kill(worker.pid, signal.SIGSTOP)
    thread = threading.Thread(
        target=lambda: found.append(outcome(worker.encrypt, SCHEME, bytes(32), np.zeros(100_000, np.uint32)))
    )
    thread.start()
    time.sleep(0.1)
    end()
    thread.join(30)
    return found[0]


class TestDeath:
    def test_a_call_in_flight_aborts_and_the_next_starts_anew(self):
        with HeWorker() as worker:
            first = worker.pid

            def end():
                os.kill(first, signal.SIGSEGV)
                os.kill(first, signal.SIGCONT)

            assert in_flight(worker, end) == "SS-6016"
            assert gone(first)
            assert opens(worker)
            assert worker.pid != first

    def test_a_sum_dies_with_its_process_and_is_never_begun_again_silently(self):
        with HeWorker() as worker:
            keys = worker.make_keys(SCHEME)
            frame = worker.encrypt(SCHEME, keys.secret, WORDS)
            handle = worker.begin(SCHEME, keys.public, 7)
            worker.add(handle, frame)
            os.kill(worker.pid, signal.SIGKILL)
            assert outcome(worker.add, handle, frame) == "SS-6016"
            again = worker.begin(SCHEME, keys.public, 7)
            assert outcome(worker.add, handle, frame) == "SS-6016"
            assert outcome(worker.finish, handle) == "SS-6016"
            worker.drop(handle)
            assert outcome(worker.finish, handle) == "SS-6005"
            worker.add(again, frame)
            assert worker.decrypt(SCHEME, keys.secret, worker.finish(again), 7).tolist() == WORDS.tolist()

    def test_one_that_stands_still_is_given_up(self):
        with HeWorker() as worker:
            pid = worker.pid
            worker._process._link.settimeout(0.2)
            assert in_flight(worker, lambda: None) == "SS-6016"
            assert gone(pid)
            assert opens(worker)

    def test_closing_ends_a_call_in_flight(self):
        worker = HeWorker().__enter__()
        pid = worker.pid
        assert in_flight(worker, worker.close) == "SS-6016"
        assert gone(pid)
        assert outcome(worker.encrypt, SCHEME, bytes(32), WORDS) == "SS-6005"
        worker.close()

    def test_it_ends_when_the_program_is_killed(self):
        code = (
            "import sys, time\nfrom securesplit.aggregate.he_worker import HeWorker\n"
            "worker = HeWorker().__enter__()\nprint(worker.pid, flush=True)\ntime.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as program:
            pid = int(program.stdout.readline())
            assert not gone(pid)
            program.kill()
        deadline = time.monotonic() + 10
        while not gone(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert gone(pid)


class TestLimits:
    def test_memory_is_bounded(self):
        with HeWorker(memory_bytes=256 << 20) as worker:
            assert outcome(worker.encrypt, SCHEME, bytes(32), np.zeros(1 << 24, np.uint32)) == "SS-6016"
            assert opens(worker)

    def test_memory_too_small_to_start_in_is_no_crash_of_ours(self):
        with HeWorker() as worker:
            worker._memory = 1 << 20
            worker._process.end()
            assert outcome(worker.encrypt, SCHEME, bytes(32), WORDS) in {"SS-6016", "SS-1606"}

    def test_it_has_no_core_dumps_no_secrets_no_files_no_torch_and_no_voice(self, monkeypatch, capfd):
        monkeypatch.setenv("HF_TOKEN", "hush-hush")
        with HeWorker() as worker:
            home = Path(f"/proc/{worker.pid}")
            limits = (home / "limits").read_text()
            assert "hush-hush" not in (home / "environ").read_text()
            assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")] == [["0", "0"]]
            assert [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max address")] == [
                [str(4 << 30)] * 2
            ]
            kinds = sorted(str(entry.readlink()).split(":")[0] for entry in (home / "fd").iterdir())
            assert kinds == ["/dev/null"] * 3 + ["socket"]
            assert opens(worker)
            assert "torch" not in (home / "maps").read_text()
        assert tuple(capfd.readouterr()) == ("", "")

    def test_its_processor_time_can_be_read(self):
        with HeWorker() as worker:
            before = worker.cpu_seconds
            for _ in range(3):
                worker.encrypt(SCHEME, bytes(32), np.zeros(200_000, np.uint32))
            assert 0 < before < worker.cpu_seconds < 60
        assert worker.cpu_seconds == 0

    def test_the_program_itself_never_loads_tenseal(self):
        code = (
            "import sys\nfrom securesplit.aggregate.he_worker import HeWorker\nfrom securesplit.aggregate.he import HeScheme\n"
            "with HeWorker() as worker:\n    keys = worker.make_keys(HeScheme('bfv', 3))\n"
            "    worker.drop(worker.begin(HeScheme('bfv', 3), keys.public, 5))\n"
            "print(sorted(name for name in sys.modules if 'seal' in name or name == 'torch'))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("[]\n", "")

    def test_without_tenseal_the_user_is_told(self, monkeypatch, tmp_path):
        (tmp_path / "tenseal.py").write_text("raise ImportError")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(InputError) as caught:
            HeWorker().__enter__()
        assert caught.value.code == "SS-1606"
        assert "pip install tenseal" in caught.value.hint

    def test_a_tenseal_that_crashes_while_loading_is_an_abort(self, monkeypatch, tmp_path):
        (tmp_path / "tenseal.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        assert outcome(HeWorker().__enter__) == "SS-6016"


class _Sleeper:
    """Stands in for the process in tests of what it may say."""

    pid = 0

    def kill(self) -> None:
        pass

    def wait(self) -> None:
        pass


class TestMessages:
    @given(st.integers(0, 255), st.lists(st.binary(max_size=200), max_size=5))
    @settings(max_examples=50, deadline=None)
    def test_what_is_sent_arrives(self, code, parts):
        here, there = socket.socketpair()
        with here, there:
            send(here, code, parts)
            assert receive(there, 10_000) == (code, tuple(parts))

    @given(st.binary(max_size=200))
    @settings(max_examples=200, deadline=None)
    def test_any_other_bytes_are_an_error_of_a_known_kind(self, data):
        here, there = socket.socketpair()
        with here, there:
            here.sendall(data)
            here.shutdown(socket.SHUT_WR)
            try:
                code, parts = receive(there, 150)
            except (EOFError, ValueError):
                return
            assert len(data) >= 9 + sum(8 + len(part) for part in parts)
            assert data[8] == code

    @pytest.mark.parametrize(
        ("status", "parts", "code"),
        [
            (OK, (bytes(4),), "done"),
            (OK, (bytes(9),), "SS-6016"),  # Longer than was asked for.
            (OK, (), "SS-6016"),
            (OK, (b"", b""), "SS-6016"),
            (MALFORMED, (b"",), "SS-6014"),
            (200, (b"",), "SS-6016"),
        ],
    )
    def test_a_process_that_lies_is_not_believed(self, status, parts, code):
        here, there = socket.socketpair()
        process = object.__new__(HeProcess)
        process._link, process._process = here, _Sleeper()
        with here, there:
            send(there, status, parts)
            assert outcome(lambda: process.ask(ENCRYPT, (), most=8)) == code
