"""What a client gives to, and holds of, the others: shares in sealed boxes, and the mask keys that follow.

Pure functions over one round's secrets; client.py decides when each may be called.

What this does not protect: a client that seals wrong shares is found out only when they are needed (recover.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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

__all__ = ["Held", "MaskKeys", "choose_holders", "mask_keys", "open_shares", "seal_shares"]


@dataclass(frozen=True, slots=True)
class Held:
    """What a client holds of one member: shares of its b and s, or none, and its g in blind rounds (else empty)."""

    owner: str
    self_share: bytes = field(repr=False)
    seed_share: bytes = field(repr=False)
    group: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class MaskKeys:
    """Keys of the streams that a client adds and subtracts."""

    plus: tuple[bytes, ...] = field(repr=False)
    minus: tuple[bytes, ...] = field(repr=False)


def choose_holders(
    config: RoundConfig, names: Sequence[str], name: str, *, randomness: Callable[[int], bytes]
) -> tuple[str, ...]:
    """Whom this client gives shares to: all others, or in the sparse graph k of them at random, by its own coins.

    The choice is made after the adverts are fixed and by no one else, so that neither the server nor its friends can
    steer it (graph.py has the bounds). Sorting by a keyed hash is a uniform permutation.

    Returns:
        Sorted names.
    """
    others = [other for other in names if other != name]
    if not config.degree or len(others) <= config.degree:
        return tuple(others)
    key = randomness(32)
    return tuple(sorted(sorted(others, key=lambda n: hashlib.blake2b(n.encode(), key=key).digest())[: config.degree]))


def seal_shares(
    config: RoundConfig,
    secrets: RoundSecrets,
    peers: Peers,
    name: str,
    *,
    holders: tuple[str, ...],
    randomness: Callable[[int], bytes],
) -> tuple[Held, tuple[tuple[str, bytes], ...]]:
    """Share b and s among the holders and oneself, sealed for each receiver; what is this client's own stays with it.

    Args:
        config, secrets, peers, name: the round so far, and this client.
        holders: from :func:`choose_holders`. In blind rounds the others get a box too, with g alone.
        randomness: a CSPRNG.

    Returns:
        What the client holds of itself, and the boxes by receiver in the order of names.

    Raises:
        AggregationAborted: SS-6003 for a degenerate public key.
    """
    sharers = [peer for peer in peers.names if peer == name or peer in holders]
    abscissas = [config.position(peer) for peer in sharers]
    self_shares = split(secrets.self_mask, abscissas, config.shares_needed, randomness)
    seed_shares = split(secrets.seed, abscissas, config.shares_needed, randomness)
    contents = {sharer: b.y + s.y for sharer, b, s in zip(sharers, self_shares, seed_shares, strict=True)}
    own = Held(name, contents[name][:32], contents[name][32:], secrets.group)
    sealed = []
    for advert in peers.adverts:
        content = contents.get(advert.name, b"") + secrets.group
        if advert.name != name and content:
            to = advert.name
            key = share_key(secrets.channel, advert.share_key, peers.t1, sender=name, receiver=to, other=to)
            sealed.append((advert.name, seal_box(key, content, peers.t1, sender=name, receiver=advert.name)))
    return own, tuple(sealed)


def open_shares(
    config: RoundConfig, secrets: RoundSecrets, peers: Peers, name: str, *, sender: str, box: bytes
) -> Held:
    """Open a box and check what is in it.

    Raises:
        AggregationAborted: SS-6007 when it does not open, SS-6011 when its content is malformed, SS-6012 when the part
            of the blind key is not the one the sender committed to (else it could tell each client another).
    """
    advert = peers.of(sender)
    key = share_key(secrets.channel, advert.share_key, peers.t1, sender=sender, receiver=name, other=sender)
    content = open_box(key, box, peers.t1, sender=sender, receiver=name)
    part = 32 if config.blind else 0
    shares, group = content[: len(content) - part], content[len(content) - part :]
    held = Held(sender, shares[:32], shares[32:], group)
    # In the complete graph everybody holds shares of everybody.
    empty = not shares and bool(config.degree)
    if len(group) != part or not (empty or (is_field_element(held.self_share) and is_field_element(held.seed_share))):
        raise AggregationAborted("SS-6011", f"the shares from {sender} are malformed", hint="Start a round without it.")
    if config.blind and commit("cg", held.group) != advert.commit_group:
        what = f"{sender} breaks its commitment to its part of the blind key"
        raise AggregationAborted("SS-6012", what, hint="Start a round without it.")
    return held


def mask_keys(
    config: RoundConfig, secrets: RoundSecrets, peers: Peers, name: str, *, partners: Sequence[str], t2: bytes
) -> MaskKeys:
    """The keys of a client's own mask and of its pair masks.

    Args:
        config, secrets, peers, name: the round so far, and this client.
        partners: the members of U2 that hold this client's shares, or whose shares it holds.
        t2: the transcript hash over U2.

    Raises:
        AggregationAborted: SS-6003 for a degenerate public key.
    """
    private = mask_private(secrets.seed, config.digest)
    plus, minus = [self_key(secrets.self_mask, t2, name)], list[bytes]()
    for other in partners:
        key = pair_key(private, peers.of(other).mask_key, t2, name, other)
        (plus if name < other else minus).append(key)
    return MaskKeys(tuple(plus), tuple(minus))
