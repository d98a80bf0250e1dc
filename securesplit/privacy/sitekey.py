"""The key of a site's ledger, and what is derived from it.

From the 32 random bytes of ``site.key`` HKDF-SHA256 derives one key per purpose: naming records, chaining entries,
encrypting remembered payloads, sealing remote anchors.

Who holds the file and a text can tell whether the ledger knows that text, can read the remembered payloads (the server has
seen those anyway) and can write a chain of his own. It lies beside the ledger with mode 0600: it protects against an
editor or a thief of ``ledger.sqlite`` alone, such as one backup of it, and not against the user who runs the client.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from securesplit.errors import PolicyDenied

_BYTES = 32

Purpose = Literal["records", "chain", "payloads", "anchor"]


def derive(key: bytes, purpose: Purpose) -> bytes:
    """One purpose's key, 32 bytes: HKDF-SHA256 of the site key, no salt, with the purpose in ``info`` (RFC 5869)."""
    info = b"securesplit site key v1: " + purpose.encode()
    return HKDF(algorithm=SHA256(), length=_BYTES, salt=None, info=info).derive(key)


def site_key(path: Path, *, make: bool) -> bytes:
    """Read a site's key, 32 bytes; make one where there is none yet and ``make`` allows it.

    Args:
        path: of the key, mode 0600.
        make: False where a ledger exists: with a new key, records that have spent their budget would look new.

    Raises:
        PolicyDenied: SS-2020 when the key is missing and may not be made, SS-2024 when the file is not a key.
        OSError: when the file cannot be read or written.
    """
    if not path.exists():
        if not make:
            raise PolicyDenied(
                "SS-2020",
                f"{path} is missing beside its ledger, so nothing may be sent",
                hint="Put the original site.key back: a new one would forget which records have spent their budget.",
            )
        _make(path)
    key = path.read_bytes()
    if len(key) != _BYTES:
        raise PolicyDenied(
            "SS-2024",
            f"{path} is not a site key, so nothing may be sent",
            hint="Put the original site.key back: without it no record is recognised.",
        )
    return key


def _make(path: Path) -> None:
    # Written beside its place and linked there whole, so that two processes that start at once agree on one key.
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".site-key-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        Path(draft).unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
