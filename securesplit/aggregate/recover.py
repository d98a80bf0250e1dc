"""Stage 4 at the server: from shares to masks, and from the masked sum to the sum.

Every secret that is put together is checked: b against the client's commitment, s against its advertised public key. A
client that lies about a share is thereby found out, and other shares are used in its stead while there are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, islice

from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.fixedpoint import Words
from securesplit.aggregate.keys import commit, mask_private, pair_key, raw_public, self_key
from securesplit.aggregate.masks import add_streams
from securesplit.aggregate.roster import Peers
from securesplit.aggregate.shamir import Share, combine, weights_at_zero
from securesplit.errors import AggregationAborted

__all__ = ["Opening", "unmask"]

_MAX_TRIES = 256

_weights = lru_cache(maxsize=512)(weights_at_zero)


@dataclass(frozen=True, slots=True)
class Opening:
    """The shares of one client's secret that stage 4 brought: b of a survivor, or s of a dropped client."""

    owner: str
    shares: tuple[Share, ...]


def unmask(
    masked_sum: Words,
    config: RoundConfig,
    peers: Peers,
    *,
    t2: bytes,
    survivors: Sequence[Opening],
    dropped: Sequence[Opening],
) -> None:
    """Take all masks off the sum of the survivors' masked vectors, in place.

    Args:
        masked_sum: (d + 1,) uint32.
        config, peers, t2: the round so far.
        survivors: shares of b, one opening per client of U3.
        dropped: shares of s, one opening per client of U2 without U3.

    Raises:
        AggregationAborted: SS-6012 when the shares of a client give no secret that fits its commitment or its key.
    """
    plus: list[bytes] = []
    minus: list[bytes] = []
    for opening in survivors:
        secret = _put_together(
            opening, config.threshold, lambda b: commit("cb", b), peers.of(opening.owner).commit_self
        )
        minus.append(self_key(secret, t2, opening.owner))
    for opening in dropped:
        public = peers.of(opening.owner).mask_key
        seed = _put_together(opening, config.threshold, lambda s: raw_public(mask_private(s, config.digest)), public)
        private = mask_private(seed, config.digest)
        for other in survivors:
            key = pair_key(private, peers.of(other.owner).mask_key, t2, opening.owner, other.owner)
            # The survivor with the smaller name had added this stream, the one with the larger had subtracted it.
            (minus if other.owner < opening.owner else plus).append(key)
    add_streams(masked_sum, plus, minus)


def _put_together(opening: Opening, threshold: int, image: Callable[[bytes], bytes], want: bytes) -> bytes:
    for chosen in islice(combinations(opening.shares, threshold), _MAX_TRIES):
        secret = combine(chosen, _weights(tuple(share.x for share in chosen)))
        if image(secret) == want:
            return secret
    raise AggregationAborted(
        "SS-6012",
        f"the shares of {opening.owner} give no secret that fits what it advertised",
        hint="It, or those who answered, gave wrong shares; start a new round.",
    )
