"""How commands print: one JSON object, or a few lines; progress and logs go to stderr."""

from __future__ import annotations

import json
import sys
import unicodedata
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
