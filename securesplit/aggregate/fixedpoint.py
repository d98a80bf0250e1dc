"""Floats to the 32-bit ring and back, exactly.

An update x becomes ``q = rint(clip(x / C, -1, 1) * S)``, is multiplied by its integer weight *after* rounding, and lives
in the integers mod 2^32. Because ``n * w_max * S <= 2^31 - 1`` no sum wraps, so the sum in the ring is the sum in the
integers: secure aggregation adds no error at all beyond the rounding to the grid (at most C / 2S per coordinate).

What this does not protect: nothing here hides anything, and a client can still move the mean by C times its weight.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from securesplit.errors import AggregationAborted, LocalProtocolError

__all__ = ["Aggregate", "Floats", "Words", "open_ring", "quantise", "vector_digest"]

Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """An opened sum.

    Attributes:
        mean: (d,) float64, the weighted mean of the survivors' clipped updates; model units.
        total_weight: sum of the survivors' weights.
        survivors: names whose updates are in the sum, sorted; U3.
        ring_sum: (d + 1,) uint32, the sum itself mod 2^32; the last word is the sum of weights.
    """

    mean: Floats
    total_weight: int
    survivors: tuple[str, ...]
    ring_sum: Words


def quantise(update: Floats, weight: int, *, scale: int, clip: float, w_max: int) -> tuple[Words, int]:
    """A client's weighted vector in the ring.

    Args:
        update: (d,) float64, finite.
        weight: integer in 1..w_max.
        scale, clip, w_max: as in RoundConfig.

    Returns:
        (d + 1,) uint32 with the weight as the last word, and the number of coordinates that were clipped.

    Raises:
        LocalProtocolError: SS-6011 for a weight out of range or an update that is not finite. Never clipped silently:
            a mean with wrong weights looks like a right one.
    """
    if not 1 <= weight <= w_max:
        raise LocalProtocolError(
            "SS-6011", f"weight {weight} is outside 1..{w_max}", hint="Bucket the number of examples first."
        )
    if not np.isfinite(update).all():
        raise LocalProtocolError(
            "SS-6011", "the update holds a value that is not finite", hint="Lower the learning rate; nothing was sent."
        )
    # Clipping before dividing gives the same grid point and cannot overflow.
    ratio = np.clip(update, -clip, clip)
    clipped = int(np.count_nonzero(ratio != update))
    ratio /= clip
    ratio *= scale
    np.rint(ratio, out=ratio)
    out = np.empty(update.size + 1, dtype=np.uint32)
    steps = ratio.astype(np.int64)
    steps *= weight
    # int64 to uint32 keeps the low 32 bits: two's complement, which is the ring.
    out[:-1] = steps.astype(np.uint32)
    out[-1] = weight
    return out, clipped


def open_ring(
    ring: Words, survivors: tuple[str, ...], *, scale: int, clip: float, w_max: int, silent: bool = False
) -> Aggregate:
    """The mean from an unmasked sum.

    Args:
        ring: (d + 1,) uint32, without any mask or blind.
        survivors: U3.
        scale, clip, w_max: as in RoundConfig.
        silent: bring an impossible sum into its range instead of refusing it. For blind rounds: a server that adds to
            the words it relays, and sees who refuses, would read the hidden sum bit by bit.

    Raises:
        AggregationAborted: SS-6011 when the sum of weights or a coordinate is impossible for these survivors, which
            shows a wrong mask, a tampered result or a client outside the rules. A cheat inside the range passes.
    """
    total = int(ring[-1])
    signed = ring[:-1].view(np.int32).astype(np.int64)
    if silent:
        total = min(max(total, len(survivors)), len(survivors) * w_max)
        signed = np.clip(signed, -total * scale, total * scale)
    if not len(survivors) <= total <= len(survivors) * w_max or np.abs(signed).max(initial=0) > total * scale:
        raise AggregationAborted(
            "SS-6011",
            "the opened sum is impossible for its survivors",
            hint="Masks did not cancel or the result was altered; start a new round.",
        )
    mean = signed.astype(np.float64)
    mean *= clip
    mean /= scale * total
    return Aggregate(mean=mean, total_weight=total, survivors=survivors, ring_sum=ring)


def vector_digest(vector: Words) -> bytes:
    """SHA-256 of a vector's words, little-endian: what a client signs for its masked vector; 32 bytes."""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<u4").data).digest()
