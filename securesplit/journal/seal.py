"""A signed head: how far a log goes, and what its last row is, signed with the party's certificate key.

The signature is over ``securesplit.journal.v1 head``, a zero byte, the log's name (16 bytes), the number of rows (8 bytes,
little-endian) and the last row's hash (32 bytes). Heads stand in three places, and each finds what the others cannot:

* as rows inside the log, every so many rows: they find an edit whose author recomputed all hashes but cannot sign;
* in the file ``head`` beside the log, after every row: it finds a tail that was cut off, and a log put in another's place;
* in the *other end's* log, at every checkpoint: they find what somebody did who may write this machine's disk and has
  the key, or who put back an older image of log and ``head`` together. Nothing on the same machine can find that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from securesplit.journal.events import Count, Digest, LogId, Signature

__all__ = ["Head", "HeadFile", "Sealed", "Signer", "read_sealed", "statement"]

_SLOT = 4096
_SYNCED, _LATEST = (0, 1), 2


@dataclass(frozen=True, slots=True)
class Signer:
    """The key of a log.

    Attributes:
        certificate: the party's leaf, DER.
        sign: signs bytes with that leaf's key.
        verify: ``verify(certificate, signature, data)``; raises one of our errors when the signature is not good.
        trust: ``trust(certificate, at)``: whose certificate it was at that time (nanoseconds since 1970), as
            ``spiffe://...``; raises one of our errors when it is none of our authority's. For logs that an older
            certificate of the same party began.
    """

    certificate: bytes = field(repr=False)
    sign: Callable[[bytes], bytes]
    verify: Callable[[bytes, bytes, bytes], None]
    trust: Callable[[bytes, int], str]


@dataclass(frozen=True, slots=True)
class Head:
    """How far a log goes.

    Attributes:
        log: its name, 16 bytes.
        rows: how many there are.
        hash: of the last one, 32 bytes.
        signature: over :func:`statement` of the three.
    """

    log: bytes
    rows: int
    hash: bytes
    signature: bytes


def statement(log: bytes, rows: int, digest: bytes) -> bytes:
    """What a head's signature is over."""
    return b"securesplit.journal.v1 head\0" + log + rows.to_bytes(8, "little") + digest


class _Slot(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    log: LogId
    rows: Count
    hash: Digest
    signature: Signature


@dataclass(frozen=True, slots=True)
class Sealed:
    """What the file says.

    Attributes:
        synced: the log was on disk at least up to here.
        latest: it had been written up to here.
    """

    synced: Head
    latest: Head


class HeadFile:
    """The file ``head``: three places of a fixed size, written over in place.

    Two take turns for heads that were synced, so that a write that breaks off leaves the one before; the third holds the
    newest head, synced or not. Whoever lost power may find the third ahead of the log, never the first two.

    Args:
        path: of the file.

    Raises:
        OSError: as the file system says.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._turn = 0
        if os.fstat(self._handle).st_size < 3 * _SLOT:
            # Taken now, so that a disk that fills up later does not leave a row without its head.
            os.pwrite(self._handle, b" " * (3 * _SLOT), 0)

    def note(self, head: Head) -> None:
        """Keep the newest head."""
        self._put(_LATEST, head)

    def sync(self, head: Head) -> None:
        """Keep a head that the log on disk has reached, and wait for the disk."""
        self._put(_SYNCED[self._turn], head)
        self._turn ^= 1
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def _put(self, slot: int, head: Head) -> None:
        text = json.dumps(
            {"log": head.log.hex(), "rows": head.rows, "hash": head.hash.hex(), "signature": head.signature.hex()}
        )
        data = text.encode("ascii").ljust(_SLOT - 1) + b"\n"
        if os.pwrite(self._handle, data, slot * _SLOT) != _SLOT:
            raise OSError(28, "the disk took a part of a head")


def read_sealed(path: Path) -> Sealed | None:
    """What the file says; None when no whole head is in it. Signatures are not checked.

    Raises:
        OSError: when it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(3 * _SLOT + 1)
    found = [_read(data[slot * _SLOT : (slot + 1) * _SLOT]) for slot in (*_SYNCED, _LATEST)]
    synced = [head for head in found[:2] if head is not None]
    if not synced or len(data) > 3 * _SLOT:
        return None
    newest = max(synced, key=lambda head: head.rows)
    latest = found[_LATEST]
    return Sealed(newest, newest if latest is None or latest.rows < newest.rows else latest)


def _read(data: bytes) -> Head | None:
    try:
        slot = _Slot.model_validate_json(data)
    except ValidationError:
        return None
    return Head(bytes.fromhex(slot.log), slot.rows, bytes.fromhex(slot.hash), bytes.fromhex(slot.signature))
