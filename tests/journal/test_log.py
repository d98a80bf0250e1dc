"""The writer: what is on disk when, what a dead process or a full disk leaves, and who may open a log."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from securesplit.errors import CheckFailed, InputError
from securesplit.journal import disk
from securesplit.journal.events import Ended, Refused, SignedHead, Torn
from securesplit.journal.scan import Line, scan
from securesplit.journal.seal import HeadFile, read_sealed
from securesplit.journal.verify import verify
from tests.journal.logs import (
    ALICE,
    EVENTS,
    SERVER,
    TRUST,
    certificate_of,
    chain_of,
    filled,
    lines_of,
    opened,
    signer_for,
)

ROOT = Path(__file__).parents[2]
KNOCK = Refused(stage="tls", code="SS-3205", address="10.0.0.7:51842")


def kinds(path: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in lines_of(path)]


def events(path: Path) -> list[object]:
    return [found.row.event for found in scan(path) if isinstance(found, Line)]


def test_a_log_begins_holds_what_happened_and_ends(tmp_path):
    path = filled(tmp_path / "audit", 7)
    assert kinds(path) == [
        "began", "head", "loaded", "accepted", "refused", "served", "round", "released", "closed", "head", "ended"
    ]  # fmt: skip
    assert [e for e in events(path) if isinstance(e, tuple(type(e) for e in EVENTS))] == list(EVENTS)
    found = verify(path, TRUST)
    assert (found.rows, found.files, found.heads, found.party, found.torn) == (11, 1, 2, SERVER, 0)
    assert [h.hex() for h in chain_of(path)][-1] == found.last


def test_only_its_owner_can_read_it(tmp_path):
    path = filled(tmp_path / "keys" / "audit", 1)
    assert oct(path.stat().st_mode & 0o777) == "0o700"
    assert {oct(f.stat().st_mode & 0o777) for f in path.iterdir()} == {"0o600"}


def test_a_durable_row_is_synced_before_the_call_returns_and_its_head_after_it(tmp_path, monkeypatch):
    journal = opened(tmp_path / "audit")
    done: list[str] = []
    real = os.fsync
    names = lambda handle: Path(f"/proc/self/fd/{handle}").readlink().name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(names(handle)), real(handle)))
    journal.append(KNOCK, durable=False)
    assert done == []
    journal.append(KNOCK)
    assert done == ["000001.jsonl", "head"]
    journal.sync()
    assert done == ["000001.jsonl", "head"]  # Nothing was written since.
    journal.append(KNOCK, durable=False)
    assert (
        read_sealed(tmp_path / "audit" / "head").latest.rows == read_sealed(tmp_path / "audit" / "head").synced.rows + 1
    )
    journal.sync()
    assert read_sealed(tmp_path / "audit" / "head").synced.rows == len(lines_of(tmp_path / "audit"))
    journal.close()


def test_heads_are_signed_inside_the_log_every_so_many_rows(tmp_path):
    path = filled(tmp_path / "audit", 50, every=10)
    places = [i for i, event in enumerate(events(path)) if isinstance(event, SignedHead)]
    assert max(b - a for a, b in itertools.pairwise(places)) <= 11
    assert verify(path, TRUST).heads == len(places) >= 5


def test_a_log_is_gone_on_with_and_names_each_start(tmp_path):
    path = filled(tmp_path / "audit", 3)
    filled(path, 3)
    assert kinds(path).count("began") == 1
    assert kinds(path).count("continued") == 1
    assert verify(path, TRUST).rows == len(lines_of(path)) == len(chain_of(path))


def test_files_follow_one_another_by_size_and_the_chain_goes_on(tmp_path):
    path = filled(tmp_path / "audit", 60, file_bytes=2000)
    filled(path, 60, file_bytes=2000)
    files = sorted(path.glob("*.jsonl"))
    assert len(files) > 5
    assert all(f.stat().st_size < 4000 for f in files)
    chain_of(path)
    assert verify(path, TRUST).files == len(files)
    for number, file in enumerate(files[1:], start=2):
        first = json.loads(file.read_bytes().splitlines()[0])
        assert (first["kind"], first["file"]) == ("continued", number)


def test_two_processes_cannot_write_one_log(tmp_path):
    journal = opened(tmp_path / "audit")
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "audit")
    assert caught.value.code == "SS-1586"
    journal.close()
    opened(tmp_path / "audit").close()


def test_threads_may_share_a_log(tmp_path):
    with opened(tmp_path / "audit") as journal:
        threads = [
            threading.Thread(target=lambda: [journal.append(KNOCK, durable=i % 9 == 0) for i in range(50)])
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert kinds(tmp_path / "audit").count("refused") == 300
    verify(tmp_path / "audit", TRUST)


def test_a_slow_disk_holds_up_nobody_who_does_not_wait_for_it(tmp_path, monkeypatch):
    """An event loop writes rows while a thread waits for the disk."""
    journal = opened(tmp_path / "audit")
    real, slow, begun = os.fsync, threading.Event(), threading.Event()

    def fsync(handle: int) -> None:
        begun.set()
        assert slow.wait(20)
        real(handle)

    journal.append(KNOCK, durable=False)
    monkeypatch.setattr(os, "fsync", fsync)
    thread = threading.Thread(target=journal.sync)
    thread.start()
    assert begun.wait(20)
    for _ in range(100):
        journal.append(KNOCK, durable=False)
    slow.set()
    thread.join()
    monkeypatch.undo()
    sealed = read_sealed(tmp_path / "audit" / "head")
    assert sealed.latest.rows - sealed.synced.rows == 100
    journal.close()
    verify(tmp_path / "audit", TRUST)


def test_a_closed_log_takes_nothing(tmp_path):
    journal = opened(tmp_path / "audit")
    journal.close()
    journal.close()
    with pytest.raises(CheckFailed, match="closed"):
        journal.append(KNOCK)


def test_a_renewed_certificate_signs_from_its_row_on(tmp_path):
    with opened(tmp_path / "audit") as journal:
        journal.append(KNOCK)
        journal.rekey(signer_for(SERVER, 1))
        journal.append(KNOCK)
        assert journal.certificate == certificate_of(SERVER, 1)
    verify(tmp_path / "audit", TRUST)
    filled(tmp_path / "audit", 3, generation=2)  # A restart with a third one.
    assert verify(tmp_path / "audit", TRUST).heads >= 5


# ---- a process that dies ---------------------------------------------------------------------------------------------

WRITER = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from tests.journal.logs import EVENTS, opened
    journal = opened(Path({path!r}), file_bytes=4000)
    print("ready", flush=True)
    number = 0
    while True:
        journal.append(EVENTS[number % len(EVENTS)], durable=number % 7 == 0)
        number += 1
        if number % 50 == 0:
            print(number, flush=True)
"""


@pytest.mark.parametrize("rows", [50, 200, 450])
def test_kill_9_loses_nothing_that_was_written_and_the_next_start_goes_on(tmp_path, rows):
    path = tmp_path / "audit"
    code = textwrap.dedent(WRITER.format(root=str(ROOT), path=str(path)))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        while (said := process.stdout.readline().strip()) == "ready" or int(said) < rows:
            continue
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sum(kind not in {"began", "continued", "head", "torn", "ended"} for kind in kinds(path)) >= rows
    before = lines_of(path)
    opened(path).close()
    assert lines_of(path)[: len(before)] == before
    verify(path, TRUST)


def torn(path: Path) -> list[Torn]:
    return [event for event in events(path) if isinstance(event, Torn)]


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_an_unfinished_line_is_found_and_sealed_off_with_its_digest(tmp_path, cut):
    path = filled(tmp_path / "audit", 5)
    file = path / "000001.jsonl"
    half = lines_of(path)[-1][:cut]
    with file.open("ab") as end:
        end.write(half)
    with pytest.raises(CheckFailed) as caught:
        verify(path, TRUST)
    assert caught.value.code == "SS-1584"
    opened(path).close()
    assert torn(path) == [Torn(bytes=len(half), sha256=hashlib.sha256(half).hexdigest())]
    assert verify(path, TRUST).torn == 1


def test_rows_that_no_head_covers_are_counted(tmp_path):
    """A process that died between a row and its head leaves one such row."""
    path = tmp_path / "audit"
    journal = opened(path)
    journal.append(KNOCK)
    heads = (path / "head").read_bytes()
    journal.append(KNOCK)
    journal._files.close()
    journal._heads.close()
    (path / "head").write_bytes(heads)
    with pytest.raises(CheckFailed) as caught:
        verify(path, TRUST)
    assert caught.value.code == "SS-1584"
    opened(path).close()
    assert torn(path) == [Torn(unsealed=1)]
    verify(path, TRUST)


def test_rows_that_a_loss_of_power_took_are_counted_and_those_that_were_synced_are_missed(tmp_path):
    path = tmp_path / "audit"
    journal = opened(path)
    journal.append(KNOCK)
    kept = (path / "000001.jsonl").read_bytes()
    for _ in range(3):
        journal.append(KNOCK, durable=False)
    journal._files.close()
    journal._heads.close()
    (path / "000001.jsonl").write_bytes(kept)
    with pytest.raises(CheckFailed) as caught:  # Until the next start it is as good as cut.
        verify(path, TRUST)
    assert caught.value.code == "SS-1581"
    shutil.copytree(path, tmp_path / "cut")
    opened(path).close()
    assert torn(path) == [Torn(lost=3)]
    verify(path, TRUST)

    file = tmp_path / "cut" / "000001.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(CheckFailed) as caught:
        opened(tmp_path / "cut")
    assert caught.value.code == "SS-1581"


@pytest.mark.parametrize("left", [b"", b'{"at":"20'])
def test_a_first_row_that_was_never_whole(tmp_path, left):
    path = tmp_path / "audit"
    path.mkdir()
    (path / "000001.jsonl").write_bytes(left)
    HeadFile(path / "head").close()
    filled(path, 2)
    assert torn(path) == ([Torn(bytes=len(left), sha256=hashlib.sha256(left).hexdigest())] if left else [])
    verify(path, TRUST)


@pytest.mark.parametrize("left", [b"", b'{"at":"20'])
def test_a_process_that_dies_between_two_files(tmp_path, left):
    path = filled(tmp_path / "audit", 60, file_bytes=2000)
    (path / disk.file_name(len(list(path.glob("*.jsonl"))) + 1)).write_bytes(left)
    filled(path, 2)
    assert len(torn(path)) == (1 if left else 0)
    verify(path, TRUST)


# ---- what is refused at opening --------------------------------------------------------------------------------------


def refused_at_opening(path: Path, **options: object) -> str:
    with pytest.raises(CheckFailed) as caught:
        opened(path, **options)
    return caught.value.code


def test_an_altered_cut_or_foreign_log_is_not_gone_on_with(tmp_path):
    good = filled(tmp_path / "good", 40, file_bytes=2000)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    last = sorted(good.glob("*.jsonl"))[-1].name
    changed = copy("changed")
    (changed / last).write_bytes((good / last).read_bytes().replace(b'"kind":"', b'"kind": "', 1))
    assert refused_at_opening(changed) == "SS-1580"
    shorter = copy("shorter")
    (shorter / last).write_bytes(b"".join((good / last).read_bytes().splitlines(keepends=True)[:-1]))
    assert refused_at_opening(shorter) == "SS-1581"
    fewer = copy("fewer")
    (fewer / last).unlink()
    assert refused_at_opening(fewer) == "SS-1581"
    hollow = copy("hollow")
    (hollow / "000002.jsonl").unlink()
    assert refused_at_opening(hollow) == "SS-1581"
    headless = copy("headless")
    (headless / "head").unlink()
    assert refused_at_opening(headless) == "SS-1582"
    bare = copy("bare")
    for file in bare.glob("*.jsonl"):
        file.unlink()
    assert refused_at_opening(bare) == "SS-1581"
    assert refused_at_opening(copy("alices"), party=ALICE) == "SS-1582"


def test_a_head_that_somebody_without_the_key_put_there_does_not_excuse_a_cut(tmp_path):
    path = filled(tmp_path / "audit", 20)
    lines = lines_of(path)[:-3]
    (path / "000001.jsonl").write_bytes(b"".join(lines))
    head = read_sealed(path / "head").latest
    forged = json.dumps(
        {"log": head.log.hex(), "rows": len(lines), "hash": json.loads(lines[-1])["hash"], "signature": "00" * 32}
    )
    (path / "head").write_bytes(3 * (forged.ljust(4095) + "\n").encode())
    assert refused_at_opening(path) == "SS-1582"


# ---- a disk that takes no more ---------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_for_every_row_until_there_is_room(tmp_path, monkeypatch):
    path = tmp_path / "audit"
    journal = opened(path)
    journal.append(KNOCK)
    whole = (path / "000001.jsonl").read_bytes()
    real, room = os.write, [100]

    def write(handle: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(handle, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(disk.os, "write", write)
    for _ in range(3):
        with pytest.raises(CheckFailed) as caught:
            journal.append(KNOCK)
        assert caught.value.code == "SS-1585"
        assert "No space left" in caught.value.what
        assert (path / "000001.jsonl").read_bytes() == whole  # Half a line was taken back.
    monkeypatch.undo()
    journal.append(KNOCK)
    journal.close()
    verify(path, TRUST)


def test_after_a_failed_fsync_nothing_is_believed_any_more(tmp_path, monkeypatch):
    journal = opened(tmp_path / "audit")

    def fails(_handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(CheckFailed, match="Input/output"):
        journal.append(KNOCK)
    monkeypatch.undo()
    for durable in (True, False):
        with pytest.raises(CheckFailed) as caught:
            journal.append(KNOCK, durable=durable)
        assert caught.value.code == "SS-1585"
    journal.close()
    opened(tmp_path / "audit").close()
    verify(tmp_path / "audit", TRUST)


FULL = """
    import resource, signal, sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from securesplit.errors import CheckFailed
    from tests.journal.logs import EVENTS, opened
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    journal = opened(Path({path!r}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    try:
        while True:
            journal.append(EVENTS[2])
    except CheckFailed as error:
        print(error.code)
    sys.stdout.flush()
    import os; os._exit(0)
"""


def test_what_the_kernel_itself_takes_only_in_part_is_taken_back(tmp_path):
    path = tmp_path / "audit"
    code = textwrap.dedent(FULL.format(root=str(ROOT), path=str(path)))
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.split() == ["SS-1585"]
    assert (path / "000001.jsonl").read_bytes().endswith(b"\n")
    verify(path, TRUST)
    opened(path).close()
    assert isinstance(events(path)[-1], Ended)
    assert torn(path) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckFailed) as caught:
        opened(tmp_path / "file" / "audit")
    assert caught.value.code == "SS-1585"
