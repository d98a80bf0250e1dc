from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.files import make_private_folder, require_private, write_atomically


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o777])
def test_a_key_that_others_could_use_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    key = tmp_path / "key.pem"
    key.touch()
    key.chmod(mode)
    with pytest.raises(ConnectionFailed) as caught:
        require_private(key)
    assert caught.value.code == "SS-3101"
    assert f"chmod 600 {key}" in caught.value.hint
    key.chmod(0o400)
    require_private(key)


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key.pem"
    key.touch(mode=0o600)
    monkeypatch.setattr(os, "geteuid", lambda: key.stat().st_uid + 1)
    with pytest.raises(ConnectionFailed, match="another user") as caught:
        require_private(key)
    assert caught.value.code == "SS-3101"


def test_a_folder_is_made_private_and_an_open_one_is_not_taken(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    make_private_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "b").chmod(0o750)
    with pytest.raises(ConnectionFailed, match="0750"):
        make_private_folder(tmp_path / "a" / "b")


def test_replacing_keeps_the_old_content_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key.pem"
    write_atomically(file, b"old", mode=0o600)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError) as caught:
        write_atomically(file, b"new", mode=0o600)
    assert caught.value.code == "SS-1804"
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["key.pem"]
    write_atomically(file, b"new", mode=0o600)
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (b"new", 0o600)


def test_a_new_key_is_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write_atomically(tmp_path / "key.pem", b"x", mode=0o600)
        make_private_folder(tmp_path / "k" / "alice")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o700


def test_writing_where_no_folder_is(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write_atomically(tmp_path / "none" / "x", b"")
    assert caught.value.code == "SS-1804"
