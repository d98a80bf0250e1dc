"""Shamir's secret sharing of 32-byte secrets over GF(p), p = 2^256 - 189.

Source: A. Shamir, "How to share a secret", 1979. Any t shares give the secret, t - 1 shares say nothing of it.

What this does not protect: shares are not verifiable by themselves; the caller checks the result against a commitment
(recover.py). Python integers are not constant-time: shares are computed where the secret is already known, and combined
where it is about to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from securesplit.errors import AggregationAborted

__all__ = ["PRIME", "Share", "combine", "field_bytes", "is_field_element", "split", "weights_at_zero"]

PRIME = 2**256 - 189

Randomness = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Share:
    """One point of the polynomial: ``x`` in 1..p-1, ``y`` 32 bytes big-endian, below p."""

    x: int
    y: bytes

    def __repr__(self) -> str:
        return f"Share(x={self.x})"


def is_field_element(value: bytes) -> bool:
    """Whether 32 bytes, big-endian, are below p."""
    return len(value) == 32 and int.from_bytes(value, "big") < PRIME


def field_bytes(randomness: Randomness) -> bytes:
    """A uniform element of GF(p), 32 bytes big-endian. Rejection keeps it uniform; a retry happens once in 2^248."""
    while not is_field_element(value := randomness(32)):
        pass
    return value


def split(secret: bytes, xs: Sequence[int], threshold: int, randomness: Randomness) -> tuple[Share, ...]:
    """Share a secret.

    Args:
        secret: 32 bytes, below p.
        xs: one distinct abscissa in 1..p-1 per holder.
        threshold: t, with 1 <= t <= len(xs).
        randomness: a CSPRNG, bytes by length.

    Returns:
        One share per abscissa, in the order of ``xs``.

    Raises:
        ValueError: the arguments break these rules; a bug of the caller.
    """
    if (
        not is_field_element(secret)
        or len(set(xs)) != len(xs)
        or not all(0 < x < PRIME for x in xs)
        or not 1 <= threshold <= len(xs)
    ):
        msg = "the secret must be below p, the abscissas distinct and not 0, the threshold at most their number"
        raise ValueError(msg)
    coefficients = [int.from_bytes(field_bytes(randomness), "big") for _ in range(threshold - 1)]
    shares = []
    for x in xs:
        y = 0
        for coefficient in reversed(coefficients):
            y = (y + coefficient) * x % PRIME
        shares.append(Share(x, ((y + int.from_bytes(secret, "big")) % PRIME).to_bytes(32, "big")))
    return tuple(shares)


def weights_at_zero(xs: Sequence[int]) -> tuple[int, ...]:
    """Lagrange's weights: ``f(0) = sum(w * y) mod p`` for a polynomial of degree below ``len(xs)``.

    Raises:
        ValueError: the abscissas are not distinct or hold a 0; a bug of the caller.
    """
    if len(set(xs)) != len(xs) or not all(0 < x < PRIME for x in xs):
        msg = "abscissas must be distinct and not 0"
        raise ValueError(msg)
    weights = []
    for x in xs:
        top = bottom = 1
        for other in xs:
            if other != x:
                top = top * other % PRIME
                bottom = bottom * (other - x) % PRIME
        weights.append(top * pow(bottom, -1, PRIME) % PRIME)
    return tuple(weights)


def combine(shares: Sequence[Share], weights: Sequence[int] | None = None) -> bytes:
    """The secret from exactly t shares; any other number or a wrong share gives a wrong secret without notice.

    Args:
        shares: the points.
        weights: :func:`weights_at_zero` of their abscissas, when the caller uses the same ones many times.

    Raises:
        AggregationAborted: SS-6011 when a share is not below p.
    """
    if not all(is_field_element(share.y) for share in shares):
        raise AggregationAborted("SS-6011", "a share is not an element of the field")
    weights = weights_at_zero([share.x for share in shares]) if weights is None else weights
    total = sum(w * int.from_bytes(share.y, "big") for w, share in zip(weights, shares, strict=True))
    return (total % PRIME).to_bytes(32, "big")
