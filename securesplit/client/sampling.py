"""How the next token is chosen, on the client."""

from __future__ import annotations

import math
from dataclasses import dataclass

from securesplit.errors import InputError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, on the client.

    Attributes:
        temperature: 0 is greedy.
        seed: for temperatures above 0; public randomness, it protects nothing.
        top_k: only so many likeliest tokens; all when None.
        top_p: only the likeliest tokens that together have this probability.
        min_p: only tokens at least so likely as this share of the likeliest.
        repetition_penalty: above 1 makes tokens that were there already less likely.
        stop: texts that end the continuation, and are not part of it.
    """

    temperature: float = 0.0
    seed: int = 0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(
                "SS-1440", "the temperature must be finite and not negative", hint="0 is greedy; 0.7 is usual."
            )
