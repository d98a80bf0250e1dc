"""How the next token is chosen from the logits (V,), on the client. Pure functions; the server never sees logits.

    penalised -> / temperature -> top-k -> top-p -> min-p -> draw

in this order, which is the usual one. Greedy takes the largest of the penalised logits, and the rest has no say. What
is filtered out has the logit minus infinity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from securesplit.errors import InputError

__all__ = ["Sampling", "choose", "likely", "nucleus", "penalised", "probabilities", "top"]

_MOST_STOPS = 16
_LONGEST_STOP = 256
_OUT = -math.inf


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, on the client.

    Attributes:
        temperature: 0 is greedy.
        seed: for temperatures above 0, -2^63 to 2^63 - 1; public randomness, it protects nothing.
        top_k: draw from the k largest; None from all.
        top_p: draw from the fewest that have this probability together, above 0, at most 1.
        min_p: draw from those with at least this share of the largest probability, 0 to 1.
        repetition_penalty: above 1 makes tokens of prompt and text less likely (CTRL, arXiv:1909.05858, section 4.1); 1 is none.
        stop: texts that end the generation; at most 16. They are no part of the result.
    """

    temperature: float = 0.0
    seed: int = 0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if faults := _faults(self):
            raise InputError(
                "SS-1440", f"tokens cannot be chosen like this: {len(faults)} fault(s)" if len(faults) > 1 else faults[0],
                hint="Temperature 0 is greedy; 0.7 with top_p 0.9 is usual.", details=faults if len(faults) > 1 else (),
            )  # fmt: skip


def _faults(s: Sampling) -> tuple[str, ...]:
    """Every fault at once."""
    whole = isinstance(s.seed, int) and not isinstance(s.seed, bool)
    counted = s.top_k is None or (isinstance(s.top_k, int) and not isinstance(s.top_k, bool) and s.top_k >= 1)
    listed = isinstance(s.stop, tuple) and all(isinstance(text, str) for text in s.stop)
    rules = (
        (_number(s.temperature) and s.temperature >= 0, "the temperature must be finite and not negative"),
        (whole and -(1 << 63) <= s.seed < 1 << 63, "the seed must be an integer of 64 bits"),
        (counted, "top_k must be at least 1"),
        (_number(s.top_p) and 0 < s.top_p <= 1, "top_p must be above 0 and at most 1"),
        (_number(s.min_p) and 0 <= s.min_p <= 1, "min_p must be from 0 to 1"),
        (_number(s.repetition_penalty) and s.repetition_penalty > 0, "the repetition penalty must be finite and above 0"),
        (listed and len(s.stop) <= _MOST_STOPS, f"stop must be a tuple of at most {_MOST_STOPS} texts"),
        (
            not listed or all(0 < len(text) <= _LONGEST_STOP for text in s.stop),
            f"a stop text must have 1 to {_LONGEST_STOP} characters",
        ),
    )  # fmt: skip
    return tuple(what for good, what in rules if not good)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def penalised(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Divide the positive logits of tokens that were there before, and multiply the negative ones.

    Args:
        logits: (V,).
        seen: token ids of prompt and text, each counted once.
        penalty: 1 leaves all as it is.
    """
    ids = sorted({i for i in seen if 0 <= i < len(logits)})
    if penalty == 1 or not ids:
        return logits
    out, where = logits.clone(), torch.tensor(ids, device=logits.device)
    old = out[where]
    out[where] = torch.where(old < 0, old * penalty, old / penalty)
    return out


def top(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest, and what equals the last of them."""
    least = torch.topk(logits, min(k, len(logits))).values[-1]
    return logits.masked_fill(logits < least, _OUT)


def nucleus(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest that have probability p together, the most likely first (arXiv:1904.09751)."""
    order = torch.argsort(logits, descending=True, stable=True)
    shares = torch.softmax(logits[order], -1)
    before = shares.cumsum(-1) - shares  # Probability of all that are more likely.
    gone = before >= p
    gone[0] = False
    return logits.masked_fill(torch.zeros_like(gone).scatter(0, order, gone), _OUT)


def likely(logits: Tensor, share: float) -> Tensor:
    """Keep those with at least this share of the largest probability (min-p, arXiv:2407.01082)."""
    return logits.masked_fill(logits < logits.max() + math.log(share), _OUT) if share > 0 else logits


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from, (V,) float64, for penalised logits and a temperature above 0."""
    scores = logits.double()
    # Seen from the largest, so that no temperature is too small for the quotient.
    scores = (scores - scores.max()) / sampling.temperature
    if sampling.top_k is not None:
        scores = top(scores, sampling.top_k)
    if sampling.top_p < 1:
        scores = nucleus(scores, sampling.top_p)
    return torch.softmax(likely(scores, sampling.min_p), -1)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator, seen: Sequence[int] = ()) -> int:
    """The next token.

    Args:
        logits: (V,) of C at the last position.
        sampling: how.
        generator: goes on with every draw; greedy leaves it alone.
        seen: token ids of prompt and text so far, without padding.
    """
    # A server can provoke what is no number, or a penalty too small for it. Some token is taken all the same: to stop here
    # would tell the server for which texts it succeeded.
    scores = torch.nan_to_num(penalised(logits, seen, sampling.repetition_penalty), nan=torch.finfo(logits.dtype).min)
    if sampling.temperature == 0:
        return int(scores.argmax())
    return int(torch.multinomial(probabilities(scores, sampling), 1, generator=generator))
