"""Where a passphrase comes from: a private file, a file descriptor, or whoever asks for it; never from the command line.

Arguments and environment variables of a process can be read by others on the machine; a file of mode 0600 and a descriptor
cannot. What this does not protect against: a passphrase that can be guessed. Key files make guessing cheap (keys.py), so
a new one has at least 12 characters; take six or more random words.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from securesplit.errors import InputError
from securesplit.pki.files import require_private

__all__ = ["Passphrase", "from_descriptor", "from_file", "require_strong"]

# Asked for only when a key turns out to be encrypted.
Passphrase = Callable[[], bytes]

SHORTEST = 12
# What OpenSSL's own buffer takes.
_LONGEST = 1000


def from_file(path: Path) -> bytes:
    """The first and only line of a file that nobody else can read.

    Raises:
        InputError: SS-1814 when it cannot be read or is not one line of 1 to 1000 bytes.
        ConnectionFailed: SS-3101 when others may read it.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):
            require_private(path)
        with path.open("rb") as file:
            return _one_line(file.read(_LONGEST + 2), str(path))
    except OSError as error:
        raise InputError(
            "SS-1814", f"the passphrase file {path} cannot be read ({type(error).__name__})", hint="Check the path."
        ) from None


def from_descriptor(number: int) -> bytes:
    """One line from a descriptor that the caller opened for this process, up to its end.

    Raises:
        InputError: SS-1814 when it cannot be read or does not give one line.
    """
    try:
        # A copy, so that the caller's own number stays open.
        with os.fdopen(os.dup(number), "rb") as file:
            return _one_line(file.read(_LONGEST + 2), f"descriptor {number}")
    except OSError as error:
        raise InputError(
            "SS-1814",
            f"the passphrase cannot be read from descriptor {number} ({type(error).__name__})",
            hint="Open it for reading in the shell, for example with 3<FILE, and pass its number.",
        ) from None


def require_strong(passphrase: bytes) -> None:
    """Accept a passphrase for a key that is about to be encrypted.

    Raises:
        InputError: SS-1815 when it is shorter than 12 characters, SS-1814 when it is not one line of at most 1000 bytes.
    """
    _one_line(passphrase, "the prompt")
    if len(passphrase.decode("utf-8", "replace")) < SHORTEST:
        raise InputError(
            "SS-1815",
            f"a passphrase of fewer than {SHORTEST} characters protects no key",
            hint="Take six or more random words.",
        )


def _one_line(data: bytes, source: str) -> bytes:
    line = data.removesuffix(b"\n").removesuffix(b"\r")
    if not line or len(line) > _LONGEST or b"\n" in line or b"\0" in line:
        raise InputError("SS-1814", f"{source} gives no passphrase", hint="Give exactly one line of 1 to 1000 bytes.")
    return line
