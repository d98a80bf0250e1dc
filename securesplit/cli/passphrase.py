"""Where a command gets a passphrase: a file, a descriptor, or the terminal; never the command line or the environment."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["KeyPassFd", "KeyPassFile", "existing", "new"]

KeyPassFile = Annotated[
    Path | None, typer.Option("--key-pass-file", help="File, mode 0600, with the passphrase of the party's key.")
]
KeyPassFd = Annotated[
    int | None, typer.Option("--key-pass-fd", help="Descriptor to read the passphrase of the party's key from.")
]


def existing(what: str, file: Path | None, descriptor: int | None) -> Callable[[], bytes] | None:
    """Where to get the passphrase of a key that exists; asked at most once, and only if the key is encrypted.

    Args:
        what: for the prompt, such as ``"the party's key"``.
        file, descriptor: as given; the terminal when neither is and there is one.

    Returns:
        None when there is nowhere to ask, so that an encrypted key is refused with what to do.
    """
    from securesplit.pki.passphrase import from_descriptor, from_file

    _require_one(file, descriptor)
    if file is not None:
        return functools.cache(lambda: from_file(file))
    if descriptor is not None:
        return functools.cache(lambda: from_descriptor(descriptor))
    if sys.stdin.isatty():
        return functools.cache(lambda: _typed(f"Passphrase of {what}", again=False))
    return None


def new(what: str, file: Path | None, descriptor: int | None, *, asked_for: bool = False) -> bytes | None:
    """The passphrase for a key that is about to be made; None for a key in the clear.

    Args:
        what: for the prompt.
        file, descriptor: as given.
        asked_for: encrypt even when neither is given, with a passphrase typed twice.

    Raises:
        InputError: SS-1814 unusable or no terminal, SS-1815 too short.
    """
    from securesplit.errors import InputError
    from securesplit.pki.passphrase import from_descriptor, from_file, require_strong

    _require_one(file, descriptor)
    if file is None and descriptor is None and not asked_for:
        return None
    if file is not None:
        secret = from_file(file)
    elif descriptor is not None:
        secret = from_descriptor(descriptor)
    elif sys.stdin.isatty():
        secret = _typed(f"New passphrase for {what}", again=True)
    else:
        raise InputError(
            "SS-1814",
            f"there is no terminal to type a passphrase for {what} at",
            hint="Give it in a file of mode 0600 or by a descriptor.",
        )
    require_strong(secret)
    return secret


def _typed(prompt: str, *, again: bool) -> bytes:
    typed: str = typer.prompt(prompt, hide_input=True, confirmation_prompt=again, err=True)
    return typed.encode()


def _require_one(file: Path | None, descriptor: int | None) -> None:
    if file is not None and descriptor is not None:
        raise typer.BadParameter("give the passphrase once: in a file or by a descriptor")
