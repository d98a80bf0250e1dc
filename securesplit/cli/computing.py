"""How much of this machine a command takes."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Threads", "take"]

Threads = Annotated[int, typer.Option("--threads", help="Threads of computation; 0 leaves torch's choice.")]


def take(threads: int) -> None:
    """Compute with so many threads; 0 changes nothing. Imports torch."""
    import torch

    if threads:
        torch.set_num_threads(threads)
