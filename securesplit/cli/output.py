"""How commands print: one JSON object, or a few lines; progress and logs go to stderr."""

from __future__ import annotations

import errno
import json
import os
import sys
import unicodedata
from pathlib import Path
from typing import Annotated, Literal

import typer

_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

Output = Annotated[Literal["text", "json"], typer.Option("--output", help="text, or one JSON object on stdout.")]


def show(output: str, text: str, value: object) -> None:
    """Print text, or the value as JSON."""
    sys.stdout.write((json.dumps(value) if output == "json" else text.rstrip("\n")) + "\n")
    sys.stdout.flush()


def harmless(text: str) -> str:
    """A model's text without what a terminal obeys: the server has a part in it, and escapes could rewrite the screen."""
    return "".join(
        c if c in "\n\t" or (unicodedata.category(c) not in {"Cc", "Cs"} and c not in _BIDI) else "\ufffd" for c in text
    )


def require_usable(folder: Path) -> None:
    """Look whether a folder for results exists or can be made, before hours of work are spent on them; nothing is made yet.

    Raises:
        OSError: when it is a file, lies below one, or may not be written.
    """
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(nearest))
