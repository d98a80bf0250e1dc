"""A state folder after a crash at any step of a snapshot is the old one or the new one; what is another run's is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from securesplit.errors import CheckFailed, InputError
from securesplit.kept import folder as folder_module
from securesplit.kept.folder import Facts, Kept
from securesplit.model.descent import NamedTensor

FACTS = Facts(party="alice", job="j", model="m", policy="p", data="d")


def tensors(value):
    return [NamedTensor("w", torch.full((2, 3), float(value))), NamedTensor("none", torch.zeros(0, dtype=torch.uint8))]


def reopened(path, facts=FACTS):
    kept = Kept.open(path, facts)
    kept.close()
    return kept


def test_a_snapshot_takes_the_place_of_its_journal(tmp_path):
    kept = Kept.open(tmp_path / "s", FACTS)
    assert kept.snapshot is None
    kept.append(b"one")
    kept.commit("first", tensors(1))
    kept.append(b"two")
    kept.close()
    again = reopened(tmp_path / "s")
    assert again.snapshot.note == again.note == "first"
    assert torch.equal(next(t.value for t in again.snapshot.tensors if t.name == "w"), torch.ones(2, 3))
    assert again.frames == (b"two",)
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0
    assert {p.name for p in (tmp_path / "s").iterdir()} == {
        "lock",
        "manifest.json",
        "journal-1",
        "snapshot-1.safetensors",
    }
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "s").iterdir())


@pytest.mark.parametrize("step", ["snapshot", "journal", "manifest", "sweep"])
def test_a_crash_while_a_snapshot_is_made_leaves_the_old_or_the_new(tmp_path, monkeypatch, step):
    class Dies(BaseException):
        pass

    kept = Kept.open(tmp_path / "s", FACTS)
    kept.commit("old", tensors(1))
    kept.append(b"since")
    real, frames = folder_module.write_atomically, folder_module.Frames

    def write(path, data, **options):
        if path.name.startswith("snapshot" if step == "snapshot" else "manifest") and step != "sweep":
            path.with_name(f".{path.name}.0.tmp").write_bytes(data[:10])
            raise Dies
        real(path, data, **options)

    def journal(path):
        if step == "journal":
            raise Dies
        return frames(path)

    def sweep(*_):
        raise Dies

    with monkeypatch.context() as patch:
        if step in {"snapshot", "manifest"}:
            patch.setattr(folder_module, "write_atomically", write)
        patch.setattr(folder_module, "Frames", journal)
        if step == "sweep":
            patch.setattr(folder_module, "_sweep", sweep)
        with pytest.raises(Dies):
            kept.commit("new", tensors(2))
    kept.close()
    again = reopened(tmp_path / "s")
    expected = ("new", ()) if step == "sweep" else ("old", (b"since",))
    assert (again.snapshot.note, again.frames) == expected
    assert len(list((tmp_path / "s").iterdir())) == 4, "what a crash left is taken away"


@pytest.mark.parametrize("field", ["party", "job", "model", "policy", "data"])
def test_another_runs_state_is_refused_by_name(tmp_path, field):
    reopened(tmp_path / "s")
    with pytest.raises(InputError, match=field) as caught:
        reopened(tmp_path / "s", FACTS.model_copy(update={field: "other"}))
    assert caught.value.code == "SS-1291"
    reopened(tmp_path / "s")


def test_a_snapshot_or_manifest_that_was_changed_is_refused(tmp_path):
    kept = Kept.open(tmp_path / "s", FACTS)
    kept.commit("note", tensors(1))
    kept.close()
    for name in ("snapshot-1.safetensors", "manifest.json"):
        path = tmp_path / "s" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(InputError) as caught:
            reopened(tmp_path / "s")
        assert caught.value.code == "SS-1292"
        path.write_bytes(whole)
    (tmp_path / "s" / "snapshot-1.safetensors").unlink()
    with pytest.raises(InputError, match="damaged"):
        reopened(tmp_path / "s")


def test_two_processes_do_not_share_a_folder(tmp_path):
    kept = Kept.open(tmp_path / "s", FACTS)
    code = f"""
from pathlib import Path
from securesplit.errors import InputError
from securesplit.kept.folder import Facts, Kept
try:
    Kept.open(Path({str(tmp_path / "s")!r}), Facts(party="alice", job="j", model="m", policy="p", data="d"))
except InputError as error:
    print(error.code)
"""
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert said.stdout.strip() == "SS-1293"
    kept.close()
    reopened(tmp_path / "s")


def test_a_finished_run_leaves_its_note_alone(tmp_path):
    assert Kept.finished_at(tmp_path / "s") is None
    kept = Kept.open(tmp_path / "s", FACTS)
    kept.commit("note", tensors(1))
    assert Kept.finished_at(tmp_path / "s") is False
    (tmp_path / "s" / "round-0.npz").write_bytes(b"x")
    kept.finish("done")
    kept.close()
    assert Kept.finished_at(tmp_path / "s") is True
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"lock", "manifest.json", "journal-2"}
    assert reopened(tmp_path / "s").note == "done"


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckFailed) as caught:
        Kept.open(tmp_path / "file" / "s", FACTS)
    assert caught.value.code == "SS-1589"


@pytest.mark.parametrize("commits", [0, 2])
@pytest.mark.parametrize("lost", ["manifest", "journal", "journal emptied"])
def test_a_state_of_which_a_file_is_gone_is_refused_and_left_as_it_is(tmp_path, commits, lost):
    """Never a silent new beginning: what is left may be mended, or put back whole."""
    path = tmp_path / "s"
    kept = Kept.open(path, FACTS)
    for number in range(commits):
        kept.commit("note", tensors(number))
    kept.append(b"learnt")
    kept.close()
    journal = path / f"journal-{commits}"
    if lost == "journal emptied":
        journal.write_bytes(b"")
    else:
        (path / "manifest.json" if lost == "manifest" else journal).unlink()
    left = {entry.name: entry.read_bytes() for entry in path.iterdir()}
    looks = [lambda: reopened(path)]
    if lost == "manifest":
        looks.append(lambda: Kept.finished_at(path))  # By which a client tells whether a run begins.
    for look in looks:
        with pytest.raises(InputError) as caught:
            look()
        assert caught.value.code == "SS-1292"
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == left


def test_a_crash_before_the_first_manifest_is_a_beginning(tmp_path, monkeypatch):
    class Dies(BaseException):
        pass

    def dies(*_):
        raise Dies

    for name in ("_write", "Frames"):
        with monkeypatch.context() as patch:
            patch.setattr(folder_module, name, dies)
            with pytest.raises(Dies):
                Kept.open(tmp_path / name, FACTS)
        assert Kept.finished_at(tmp_path / name) is None
        (tmp_path / name / "journal-0").write_bytes(b"SSK")  # Half of its first line.
        assert reopened(tmp_path / name).frames == ()


def test_after_a_manifest_that_may_have_reached_the_disk_nothing_goes_to_the_old_journal(tmp_path, monkeypatch):
    """Its folder could not be synced: the next opening may find the new one, and would not see the old one's frames."""
    kept = Kept.open(tmp_path / "s", FACTS)
    kept.append(b"before")
    real = folder_module.write_atomically

    def full(*_, **__):
        raise InputError("SS-1804", "full")

    def too_late(path, data, **options):
        real(path, data, **options)
        if path.name == "manifest.json":
            full()

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_atomically", full)
        with pytest.raises(CheckFailed):
            kept.commit("new", tensors(2))
    kept.append(b"the old one stands")
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_atomically", too_late)
        with pytest.raises(CheckFailed):
            kept.commit("new", tensors(2))
    with pytest.raises(CheckFailed) as caught:
        kept.append(b"would be lost")
    assert caught.value.code == "SS-1589"
    kept.close()
    again = reopened(tmp_path / "s")
    assert (again.note, again.frames) == ("new", ())
