"""Floats to the ring and back, exactly.

An update x becomes ``q = rint(clip(x / C, -1, 1) * S)``, is multiplied by its integer weight *after* rounding, and lives
in the integers mod 2^32 or 2^64. Because ``n * w_max * S <= 2^(bits - 1) - 1`` no sum wraps, so the sum in the ring is
the sum in the integers: secure aggregation adds no error at all beyond the rounding to the grid.

That rounding is within half a step, C / 2S per coordinate, and 2^-12 of a step: S is at most 2^40 (config.py), the
quotient and the product before ``rint`` carry a relative error of 2^-53 each, and every integer up to 2^53 is a double.
Weights are at most 2^16, so ``q * weight`` is at most 2^56 and exact in 64-bit integers.

Everything works in pieces of a fixed size, so beyond the vectors that go in and come out nothing grows with d.

What this does not protect: nothing here hides anything, and a client can still move the mean by C times its weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from securesplit.errors import AggregationAborted, LocalProtocolError

__all__ = ["Aggregate", "Floats", "Words", "open_ring", "quantise", "vector_digest", "word_type"]

Words = npt.NDArray[np.uint32 | np.uint64]
Floats = npt.NDArray[np.float32 | np.float64]

_PIECE = 1 << 15  # Coordinates at a time: a double and an integer each, together 512 KiB, stay in the cache.


def word_type(bits: int) -> np.dtype[np.uint32 | np.uint64]:
    """The word of the ring mod 2^32 or 2^64, in this host's byte order."""
    return np.dtype(np.uint64 if bits == 64 else np.uint32)


def _signed(ring: Words) -> npt.NDArray[Any]:
    """The coordinates of a ring vector, without the sum of weights, centred on 0; a view."""
    return ring[:-1].view(ring.dtype.str.replace("u", "i"))


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """An opened sum.

    Attributes:
        ring_sum: (d + 1,) uint32 or uint64, the sum itself in the ring; the last word is the sum of weights.
        survivors: names whose updates are in the sum, sorted; U3.
        scale, clip: as in RoundConfig.
    """

    ring_sum: Words
    survivors: tuple[str, ...]
    scale: int
    clip: float

    @property
    def total_weight(self) -> int:
        """Sum of the survivors' weights."""
        return int(self.ring_sum[-1])

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """(d,) float64, the weighted mean of the survivors' clipped updates, model units; computed at every access.

        A sum beyond 2^53, which only the 64-bit ring holds, is rounded to the nearest double.
        """
        out = np.empty(self.ring_sum.size - 1)
        for at, part in self.pieces():
            out[at] = part
        return out

    def pieces(self) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
        """The mean piece by piece, each with its place, for callers that have no room for a whole (d,) float64.

        A piece is overwritten by the next one.
        """
        steps = _signed(self.ring_sum)
        scratch = np.empty(min(_PIECE, steps.size))
        for start in range(0, steps.size, _PIECE):
            at = slice(start, min(start + _PIECE, steps.size))
            part = scratch[: at.stop - start]
            part[:] = steps[at]
            part *= self.clip
            part /= self.scale * self.total_weight
            yield at, part


def quantise(update: Floats, weight: int, *, scale: int, clip: float, w_max: int, bits: int = 32) -> tuple[Words, int]:
    """A client's weighted vector in the ring.

    Args:
        update: (d,) float32 or float64, finite; computed with as float64.
        weight: integer in 1..w_max.
        scale, clip, w_max: as in RoundConfig.
        bits: 32 or 64, the ring's.

    Returns:
        (d + 1,) uint32 or uint64 with the weight as the last word, and the number of coordinates that were clipped.

    Raises:
        LocalProtocolError: SS-6011 for a weight out of range or an update that is not finite. Never clipped silently:
            a mean with wrong weights looks like a right one.
    """
    if not 1 <= weight <= w_max:
        raise LocalProtocolError(
            "SS-6011", f"weight {weight} is outside 1..{w_max}", hint="Bucket the number of examples first."
        )
    out: Words = np.empty(update.size + 1, dtype=word_type(bits))
    words, clipped = _signed(out), 0
    scratch, integers = np.empty(min(_PIECE, update.size)), np.empty(min(_PIECE, update.size), dtype=np.int64)
    for start in range(0, update.size, _PIECE):
        part = update[start : start + _PIECE]
        lowest, highest = float(part.min()), float(part.max())
        if not -math.inf < lowest <= highest < math.inf:  # NaN spreads to both and makes this false.
            raise LocalProtocolError(
                "SS-6011",
                "the update holds a value that is not finite",
                hint="Lower the learning rate; nothing was sent.",
            )
        ratio, steps = scratch[: part.size], integers[: part.size]
        ratio[:] = part
        if lowest < -clip or highest > clip:
            # Clipping before dividing gives the same grid point and cannot overflow.
            np.clip(ratio, -clip, clip, out=ratio)
            clipped += int(np.count_nonzero(ratio != part))
        ratio /= clip
        ratio *= scale
        steps[:] = np.rint(ratio, out=ratio)
        steps *= weight
        # The cast to 32 bits keeps the low ones: two's complement, which is the ring.
        words[start : start + part.size] = steps
    out[-1] = weight
    return out, clipped


def open_ring(
    ring: Words, survivors: tuple[str, ...], *, scale: int, clip: float, w_max: int, silent: bool = False
) -> Aggregate:
    """Check an unmasked sum and make it an :class:`Aggregate`, which keeps ``ring`` itself, not a copy.

    Args:
        ring: (d + 1,) uint32 or uint64, without any mask or blind.
        survivors: U3.
        scale, clip, w_max: as in RoundConfig.
        silent: bring an impossible sum into its range, in place, instead of refusing it. For blind rounds: a server that
            adds to the words it relays, and sees who refuses, would read the hidden sum bit by bit.

    Raises:
        AggregationAborted: SS-6011 when the sum of weights or a coordinate is impossible for these survivors, which
            shows a wrong mask, a tampered result or a client outside the rules. A cheat inside the range passes.
    """
    least, most = len(survivors), len(survivors) * w_max
    total, steps = int(ring[-1]), _signed(ring)
    if silent:
        ring[-1] = total = min(max(total, least), most)
        np.clip(steps, -total * scale, total * scale, out=steps)
    furthest = max(int(steps.max(initial=0)), -int(steps.min(initial=0)))
    if not least <= total <= most or furthest > total * scale:
        raise AggregationAborted(
            "SS-6011",
            "the opened sum is impossible for its survivors",
            hint="Masks did not cancel or the result was altered; start a new round.",
        )
    return Aggregate(ring_sum=ring, survivors=survivors, scale=scale, clip=clip)


def vector_digest(vector: Words | npt.NDArray[np.uint8]) -> bytes:
    """SHA-256 of a vector's words, little-endian: what a client signs for its masked vector, or, where that is encrypted
    once more, for the bytes it sends instead; 32 bytes.
    """
    return hashlib.sha256(np.ascontiguousarray(vector, dtype=f"<u{vector.itemsize}").data).digest()
