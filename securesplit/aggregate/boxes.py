"""What a client gives to, and holds of, the others: shares in sealed boxes, and the mask keys that follow.

Pure functions over one round's secrets; client.py decides when each may be called.

What this does not protect: a client that seals wrong shares is found out only when they are needed (recover.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.keys import (
    RoundSecrets,
    commit,
    mask_private,
    open_box,
    pair_key,
    seal_box,
    self_key,
    share_key,
)
from securesplit.aggregate.roster import Peers
from securesplit.aggregate.shamir import is_field_element, split
from securesplit.errors import AggregationAborted

__all__ = ["Held", "MaskKeys", "mask_keys", "open_shares", "seal_shares"]


@dataclass(frozen=True, slots=True)
class Held:
    """What a client holds of one member: shares of its b and s, and its g in blind rounds (else empty)."""

    owner: str
    self_share: bytes = field(repr=False)
    seed_share: bytes = field(repr=False)
    group: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class MaskKeys:
    """Keys of the streams that a client adds and subtracts."""

    plus: tuple[bytes, ...] = field(repr=False)
    minus: tuple[bytes, ...] = field(repr=False)


def seal_shares(
    config: RoundConfig, secrets: RoundSecrets, peers: Peers, name: str, *, randomness: Callable[[int], bytes]
) -> tuple[Held, tuple[tuple[str, bytes], ...]]:
    """Share b and s among U1, sealed for each receiver; what is this client's own stays with it.

    Returns:
        What the client holds of itself, and the boxes by receiver in the order of names.

    Raises:
        AggregationAborted: SS-6003 for a degenerate public key.
    """
    abscissas = [config.position(peer) for peer in peers.names]
    self_shares = split(secrets.self_mask, abscissas, config.threshold, randomness)
    seed_shares = split(secrets.seed, abscissas, config.threshold, randomness)
    channel = X25519PrivateKey.from_private_bytes(secrets.channel)
    own, sealed = None, []
    for advert, b, s in zip(peers.adverts, self_shares, seed_shares, strict=True):
        to = advert.name
        if to == name:
            own = Held(name, b.y, s.y, secrets.group)
            continue
        key = share_key(channel, advert.share_key, peers.t1, sender=name, receiver=to, other=to)
        sealed.append((to, seal_box(key, b.y + s.y + secrets.group, peers.t1, sender=name, receiver=to)))
    assert own is not None, "read_roster made sure that U1 holds this client"
    return own, tuple(sealed)


def open_shares(
    config: RoundConfig, secrets: RoundSecrets, peers: Peers, name: str, *, sender: str, box: bytes
) -> Held:
    """Open a box and check what is in it.

    Raises:
        AggregationAborted: SS-6007 when it does not open, SS-6011 when its content is malformed, SS-6012 when the part
            of the blind key is not the one the sender committed to (else it could tell each client another).
    """
    advert, channel = peers.of(sender), X25519PrivateKey.from_private_bytes(secrets.channel)
    key = share_key(channel, advert.share_key, peers.t1, sender=sender, receiver=name, other=sender)
    content = open_box(key, box, peers.t1, sender=sender, receiver=name)
    held = Held(sender, content[:32], content[32:64], content[64:])
    well_formed = is_field_element(held.self_share) and is_field_element(held.seed_share)
    if not well_formed or len(held.group) != (32 if config.blind else 0):
        raise AggregationAborted("SS-6011", f"the shares from {sender} are malformed", hint="Start a round without it.")
    if config.blind and commit("cg", held.group) != advert.commit_group:
        what = f"{sender} breaks its commitment to its part of the blind key"
        raise AggregationAborted("SS-6012", what, hint="Start a round without it.")
    return held


def mask_keys(
    config: RoundConfig, secrets: RoundSecrets, peers: Peers, name: str, *, members: tuple[str, ...], t2: bytes
) -> MaskKeys:
    """The keys of a client's own mask and of its pair masks with all other members of U2.

    Raises:
        AggregationAborted: SS-6003 for a degenerate public key.
    """
    private = mask_private(secrets.seed, config.digest)
    plus, minus = [self_key(secrets.self_mask, t2, name)], list[bytes]()
    for other in members:
        if other != name:
            key = pair_key(private, peers.of(other).mask_key, t2, name, other)
            (plus if name < other else minus).append(key)
    return MaskKeys(tuple(plus), tuple(minus))
