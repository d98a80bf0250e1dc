"""Private files: whose they are, who may read them, and how one is replaced in a single step.

What this does not protect against: root, backups, and file systems that ignore modes or fsync.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from securesplit.errors import ConnectionFailed, InputError

__all__ = ["folder_in_one_step", "make_private_folder", "remove_folder", "require_private", "write_atomically"]


def make_private_folder(path: Path) -> None:
    """Create a folder that only its owner can enter; one that exists must already be so.

    Raises:
        ConnectionFailed: SS-3101 when it exists and is open to others.
        InputError: SS-1804 when it cannot be created.
    """
    try:
        # mkdir gives its mode to the last folder only; the one above holds everybody's keys and gets it too.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None
    require_private(path)


def require_private(path: Path) -> None:
    """Refuse a key or a key folder that anybody but its owner, this process's user, could use.

    Raises:
        ConnectionFailed: SS-3100 when it does not exist, SS-3101 when its owner or mode is wrong.
    """
    try:
        found = path.stat()
    except OSError:
        raise ConnectionFailed(
            "SS-3100",
            f"no usable identity: {path} cannot be read",
            hint="Make one with 'securesplit certs issue' and pass its folder with --keys.",
        ) from None
    wanted = "700" if stat.S_ISDIR(found.st_mode) else "600"
    if found.st_uid != os.geteuid():
        raise ConnectionFailed(
            "SS-3101",
            f"{path} belongs to another user (uid {found.st_uid})",
            hint=f"Give it to the user who runs this: chown {os.geteuid()} {path}",
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise ConnectionFailed(
            "SS-3101",
            f"{path} can be used by others (mode {stat.S_IMODE(found.st_mode):04o})",
            hint=f"Run: chmod {wanted} {path}. If others had access, revoke the certificate and issue a new one.",
        )


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace a file so that a reader, or a crash, meets the old content or the new one and nothing between.

    Raises:
        InputError: SS-1804 when it cannot be written; the old content is untouched.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with _folder_of(path) as folder:
            handle = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, mode)
            with os.fdopen(handle, "wb") as file:
                os.fchmod(handle, mode)
                file.write(data)
                file.flush()
                os.fsync(handle)
            aside.replace(path)
            os.fsync(folder)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise _unwritable(path, error) from None


@contextmanager
def _folder_of(path: Path) -> Iterator[int]:
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        "SS-1804", f"cannot write {path}: {type(error).__name__}", hint="Check the folder's owner, mode and free space."
    )


@contextmanager
def folder_in_one_step(path: Path) -> Iterator[Path]:
    """Fill a folder aside, mode 0700, and put it at its place when it is whole; after a crash there is none.

    Raises:
        InputError: SS-1804 when it cannot be made.
        FileExistsError: when something is there already, before anything is written.
    """
    if path.exists():
        raise FileExistsError(path)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside.mkdir(mode=0o700)
        yield aside
        with _folder_of(aside) as inside:
            os.fsync(inside)
        aside.rename(path)
        with _folder_of(path) as above:
            os.fsync(above)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Take a folder away in one step, then delete what it held."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with suppress(FileNotFoundError):
        path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
