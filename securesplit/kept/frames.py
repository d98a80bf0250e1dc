"""An append-only file of frames that a crash cannot spoil: whole frames stay, a half-written last one is dropped.

    "SSKEPT1" LF | frame | frame | ...
    frame: length u32 | CRC-32 of (place u64 | length u32), u32 | first 16 bytes of SHA-256 of (place u64 | data) | data

All little-endian; ``place`` counts frames from 0, so that none can be left out or moved. The head has a sum of its own: only
a frame that *ends early* is a torn one, which no reply or request followed; a bit that turned anywhere is refused.

What this does not protect against: somebody who writes to the file on purpose. It is no audit log.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from securesplit.errors import CheckFailed, InputError

__all__ = ["EMPTY", "Frames", "damaged", "unwritable"]

_MAGIC = b"SSKEPT1\n"
EMPTY = len(_MAGIC)
"""Bytes of a file without a frame."""
_HEAD = struct.Struct("<II16s")
_PLACE = struct.Struct("<Q")

Writer = Callable[[int, bytes], int]


class Frames:
    """The frames of one file, and its end, where more are written.

    Args:
        path: made, mode 0600, when absent. A torn last frame is cut off.
        write: as ``os.write``; another one is for tests of full disks.

    Attributes:
        found: the frames that were there.

    Raises:
        InputError: SS-1292 when a frame is damaged. CheckFailed: SS-1589 when the disk refuses.
    """

    def __init__(self, path: Path, *, write: Writer = os.write) -> None:
        self._path, self._write = path, write
        self._file = -1
        self._broken = False
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            data = path.read_bytes()
            self.found, self._size = _parsed(path, data)
            self._count = len(self.found)
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, 0, os.SEEK_END)
            if not self._size:
                self._put(_MAGIC)
            os.fsync(self._file)
        except OSError as error:
            self.close()
            raise unwritable(path, error) from None
        except BaseException:
            self.close()
            raise

    def append(self, data: bytes, *, durable: bool = True) -> None:
        """Add a frame; when this returns it survives a crash of the process and, if ``durable``, of the machine.

        Raises:
            CheckFailed: SS-1589; nothing was added, and nothing more will be.
        """
        place = _PLACE.pack(self._count)
        length = struct.pack("<I", len(data))
        head = _HEAD.pack(len(data), zlib.crc32(place + length), hashlib.sha256(place + data).digest()[:16])
        try:
            if self._broken or self._file < 0:
                raise OSError("an earlier frame was not written")
            self._put(head + data)
            if durable:
                os.fsync(self._file)
        except OSError as error:
            self._broken = True
            with suppress(OSError):  # A torn frame is dropped at the next opening as well.
                os.ftruncate(self._file, self._size)
            raise unwritable(self._path, error) from None
        self._count += 1

    def close(self) -> None:
        """Close the file; twice is once."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _put(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._write(self._file, left) :]  # type: ignore[arg-type]  # os.write takes any buffer
        self._size += len(data)


def _parsed(path: Path, data: bytes) -> tuple[tuple[bytes, ...], int]:
    """The whole frames, and where they end."""
    if len(data) < len(_MAGIC):
        if not _MAGIC.startswith(data):
            raise damaged(path)
        return (), 0
    if not data.startswith(_MAGIC):
        raise damaged(path)
    frames: list[bytes] = []
    at = len(_MAGIC)
    while at + _HEAD.size <= len(data):
        length, check, digest = _HEAD.unpack_from(data, at)
        if not any(data[at:]):  # A machine that lost power may leave a longer file without its contents.
            break
        place = _PLACE.pack(len(frames))
        if check != zlib.crc32(place + struct.pack("<I", length)):
            raise damaged(path)
        start = at + _HEAD.size
        if start + length > len(data):
            break
        body = data[start : start + length]
        if digest != hashlib.sha256(place + body).digest()[:16]:
            raise damaged(path)
        frames.append(body)
        at = start + length
    return tuple(frames), at


def damaged(path: Path) -> InputError:
    """What was kept cannot be trusted."""
    return InputError(
        "SS-1292",
        f"{path} is damaged, so nothing can go on from it",
        hint="Put back a whole copy of its folder, or move the folder away and start anew.",
    )


def unwritable(path: Path, error: OSError) -> CheckFailed:
    """The disk refuses."""
    return CheckFailed(
        "SS-1589",
        f"{path} cannot be written ({type(error).__name__}), so the run cannot go on",
        hint="Free the disk and start again with the same folder: the run goes on where it stood.",
    )
