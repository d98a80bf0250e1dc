"""Which of the policy's public lengths a site should use: few of them say less, many pad less.

Every bucket tells the server something of a record's length. A choice of ``count`` among the policy's buckets that pads
least is found exactly. The server sees the chosen lengths anyway, so the choice says nothing that their use would not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from securesplit.data.batches import bucket_of

__all__ = ["Chosen", "choose_buckets"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """Buckets, and what they cost.

    Attributes:
        buckets: rising, in tokens.
        padding: share of padding among all tokens that will cross, 0 to 1.
    """

    buckets: tuple[int, ...]
    padding: float


def choose_buckets(lengths: Sequence[int], allowed: tuple[int, ...], count: int) -> Chosen:
    """At most ``count`` of the allowed buckets with the least padding for these lengths.

    Args:
        lengths: tokens of each sequence; at least one.
        allowed: rising, the policy's ``limits.buckets``.
        count: at least 1.

    Raises:
        InputError: SS-1222 when a sequence is longer than the largest bucket.
    """
    homes = sorted({bucket_of(length, allowed) for length in lengths})
    if not homes or count < 1:
        raise ValueError("at least one length and one bucket")
    held = [sum(1 for n in lengths if bucket_of(n, allowed) == home) for home in homes]
    # cost[j]: tokens that cross when everything up to homes[j] is placed, and homes[j] is used as a bucket.
    cost = [sum(held[: j + 1]) * home for j, home in enumerate(homes)]
    plans: list[tuple[int, ...]] = [(home,) for home in homes]
    for _ in range(min(count, len(homes)) - 1):
        best = [
            min(
                [(cost[j], plans[j])]
                + [(cost[i] + sum(held[i + 1 : j + 1]) * home, (*plans[i], home)) for i in range(j)]
            )
            for j, home in enumerate(homes)
        ]
        cost, plans = [c for c, _ in best], [p for _, p in best]
    return Chosen(plans[-1], 1 - sum(lengths) / cost[-1])
