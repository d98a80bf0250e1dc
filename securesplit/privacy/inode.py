"""Which file this is, beyond its name and its number.

A file system gives the number of a deleted file to the next one at once, so the time of birth belongs to the identity;
Linux tells it through statx(2), which Python's os does not offer. Where nobody tells it, it is 0 and not compared.

What this does not tell apart: a disk from its bit-for-bit image.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from pydantic import BaseModel, ConfigDict

_AT_FDCWD = -100
_STATX_BTIME = 0x800
_BTIME_OFFSET = 0x50  # Of struct statx: the time of birth, seconds as int64, nanoseconds as uint32.


class Inode(BaseModel):
    """A file or folder.

    Attributes:
        device: of the mounted disk; may change when the machine starts again.
        filesystem: its id where it has one (0 otherwise), which does not change then.
        number: the inode's.
        born: nanoseconds since 1970, 0 where unknown. Nothing but its equality is used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    device: int
    filesystem: int
    number: int
    born: int

    @classmethod
    def of(cls, path: Path) -> Inode:
        """What lies at a path now. Raises OSError."""
        found = path.stat()
        return cls(
            device=found.st_dev, filesystem=os.statvfs(path).f_fsid, number=found.st_ino, born=_born(path, found)
        )

    def same(self, other: Inode) -> bool:
        """Whether both are one file."""
        disk = self.device == other.device or self.filesystem == other.filesystem != 0
        return disk and self.number == other.number and (self.born == other.born or 0 in {self.born, other.born})


def _born(path: Path, found: os.stat_result) -> int:
    told = getattr(found, "st_birthtime_ns", None) or int(getattr(found, "st_birthtime", 0) * 10**9)
    if told:
        return int(told)
    statx = getattr(_LIBC, "statx", None)
    if statx is None:
        return 0
    answer = ctypes.create_string_buffer(256)
    if statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_BTIME, answer) != 0:
        return 0
    if not struct.unpack_from("=I", answer)[0] & _STATX_BTIME:
        return 0
    seconds, nanoseconds = struct.unpack_from("=qI", answer, _BTIME_OFFSET)
    return int(seconds) * 10**9 + int(nanoseconds)


_LIBC = ctypes.CDLL(None)
