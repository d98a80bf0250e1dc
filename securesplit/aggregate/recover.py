"""Stage 4 at the server: from shares to masks, and from the masked sum to the sum.

Every secret that is put together is checked: b against the client's commitment, s against its advertised public key. A
client that lies about a share is thereby found out, and other shares are used in its stead while there are enough.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.fixedpoint import Words
from securesplit.aggregate.keys import commit, mask_private, pair_key, raw_public, self_key
from securesplit.aggregate.masks import add_streams
from securesplit.aggregate.roster import Peers
from securesplit.aggregate.shamir import Share, combine, weights_at_zero
from securesplit.errors import AggregationAborted

__all__ = ["Opening", "Pairs", "unmask"]

_MAX_TRIES = 256

_weights = lru_cache(maxsize=512)(weights_at_zero)


@dataclass(frozen=True, slots=True)
class Opening:
    """The shares of one client's secret that stage 4 brought: b of a survivor, or s of a dropped client."""

    owner: str
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which clients added a pair mask: in the complete graph all, in the sparse one those of whom one holds the other's shares.

    Attributes:
        holders: (owner, holder) for every box of shares; empty in the complete graph.
    """

    holders: frozenset[tuple[str, str]]

    def joined(self, one: str, other: str) -> bool:
        """Whether two members of U2 share a pair mask."""
        return not self.holders or (one, other) in self.holders or (other, one) in self.holders


def unmask(
    masked_sum: Words,
    config: RoundConfig,
    peers: Peers,
    *,
    t2: bytes,
    pairs: Pairs,
    survivors: Sequence[Opening],
    dropped: Sequence[Opening],
) -> None:
    """Take all masks off the sum of the survivors' masked vectors, in place.

    Args:
        masked_sum: (d + 1,) words; or zeros, to get what takes the masks off.
        pairs: who shares a pair mask.
        config, peers, t2: the round so far.
        survivors: shares of b, one opening per client of U3.
        dropped: shares of s, one opening per client of U2 without U3.

    Raises:
        AggregationAborted: SS-6010 when too few of those who hold a client's shares have answered, SS-6012 when its shares
            give no secret that fits its commitment or its key.
    """
    plus: list[bytes] = []
    minus: list[bytes] = []
    for opening in survivors:
        secret = _put_together(
            opening, config.shares_needed, lambda b: commit("cb", b), peers.of(opening.owner).commit_self
        )
        minus.append(self_key(secret, t2, opening.owner))
    for opening in dropped:
        public = peers.of(opening.owner).mask_key
        seed = _put_together(
            opening, config.shares_needed, lambda s: raw_public(mask_private(s, config.digest)), public
        )
        private = mask_private(seed, config.digest)
        for other in survivors:
            if not pairs.joined(opening.owner, other.owner):
                continue
            key = pair_key(private, peers.of(other.owner).mask_key, t2, opening.owner, other.owner)
            # The survivor with the smaller name had added this stream, the one with the larger had subtracted it.
            (minus if other.owner < opening.owner else plus).append(key)
    add_streams(masked_sum, plus, minus, prg=config.prg)


def _put_together(opening: Opening, threshold: int, image: Callable[[bytes], bytes], want: bytes) -> bytes:
    if len(opening.shares) < threshold:
        raise AggregationAborted(
            "SS-6010",
            f"{len(opening.shares)} of those who hold the shares of {opening.owner} are left; {threshold} are needed",
            hint="Too many clients left; start a new round.",
        )
    for chosen in _choices(opening.shares, threshold):
        secret = combine(chosen, _weights(tuple(share.x for share in chosen)))
        if image(secret) == want:
            return secret
    raise AggregationAborted(
        "SS-6012",
        f"the shares of {opening.owner} give no secret that fits what it advertised",
        hint="It, or those who answered, gave wrong shares; start a new round.",
    )


def _choices(shares: tuple[Share, ...], threshold: int) -> Iterator[tuple[Share, ...]]:
    """Ways to take t shares: the first ones, then others at random, among which some soon miss a few liars."""
    yield shares[:threshold]
    if len(shares) > threshold:
        coins = random.Random(0)  # noqa: S311 - which shares are tried next is no secret
        for _ in range(_MAX_TRIES):
            yield tuple(coins.sample(shares, threshold))
