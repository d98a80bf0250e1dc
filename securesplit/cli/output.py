"""How commands print: one JSON object, or a few lines; progress and logs go to stderr."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from pathlib import Path
from typing import Annotated, Literal

import typer

_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

Output = Annotated[Literal["text", "json"], typer.Option("--output", help="text, or one JSON object on stdout.")]
Policy = Annotated[Path, typer.Option("--policy", help="Policy file of this side.")]
Keys = Annotated[Path, typer.Option("--keys", help="Key folder of this party, such as keys/alice.")]
Model = Annotated[str | None, typer.Option("--model", help="Model directory that replaces the job's name for it.")]
Cache = Annotated[
    Path | None, typer.Option("--cache", help="Where pulled models lie; the user's cache directory when absent.")
]
Code = Annotated[
    Path | None, typer.Option("--code", help="File of the public code at the cut, when the job has one; see model fit.")
]
Evidence = Annotated[
    Path | None,
    typer.Option("--evidence", help="Folder with reports of `attack run --out`, for a policy with [leakage] limits."),
]


def cache_or_default(cache: Path | None) -> Path:
    """The given cache, or ``$XDG_CACHE_HOME/securesplit/models``, by default under ``~/.cache``."""
    return cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "securesplit" / "models"


def show(output: str, text: str, value: object) -> None:
    """Print text, or the value as JSON."""
    sys.stdout.write((json.dumps(value) if output == "json" else text.rstrip("\n")) + "\n")
    sys.stdout.flush()


def harmless(text: str) -> str:
    """A model's text without what a terminal obeys: the server has a part in it, and escapes could rewrite the screen."""
    return "".join(
        c if c in "\n\t" or (unicodedata.category(c) not in {"Cc", "Cs"} and c not in _BIDI) else "\ufffd" for c in text
    )
