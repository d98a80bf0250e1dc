"""The key under which a site names its records.

Who holds it and a text can tell whether the ledger knows that text; nothing else is protected by it.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from securesplit.errors import InputError

_BYTES = 32


def site_key(path: Path, *, make: bool) -> bytes:
    """Read a site's key, 32 bytes; make one where there is none yet and ``make`` allows it.

    Args:
        path: of the key, mode 0600.
        make: False where a ledger exists: with a new key, records that have spent their budget would look new.

    Raises:
        InputError: SS-1520 when the key is missing and may not be made, or is not a key.
        OSError: when the file cannot be read or written.
    """
    if not path.exists():
        if not make:
            raise InputError(
                "SS-1520", f"{path} is missing beside its ledger", hint="Restore it: a new key would forget who spent."
            )
        _make(path)
    key = path.read_bytes()
    if len(key) != _BYTES:
        raise InputError(
            "SS-1520", f"{path} is not a site key", hint="Restore it: without it records cannot be recognised."
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
