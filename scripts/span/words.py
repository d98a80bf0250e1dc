"""What stands around the tables of the benchmark's page."""

from __future__ import annotations

import platform
from importlib.metadata import version

__all__ = ["WORDS", "made_on"]

WORDS = {"head": "# Spans", "foot": "..."}


def made_on() -> str:
    """On what the figures were measured."""
    parts = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "securesplit"))
    return f"Measured on {platform.machine()}, one thread of a machine that others used; python {platform.python_version()}, {parts}."
