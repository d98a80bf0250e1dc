"""A round's secrets, every key derived from them, and everything that hashes and signatures bind.

Keys are fresh in every round. HKDF-SHA256 with the transcript hash as salt and one label per use, so a key of one round,
stage, pair, direction or configuration is never a key of another. Transcript, all SHA-256, fields with their lengths:

    T0 = cfg_hash            T1 = H("ssa-1/adv|", T0, signed adverts by name)
    T2 = H("ssa-1/u2|", T1, names of U2)         T3 = H("ssa-1/u3|", T2, names of U3)

The mask key pair depends on T0 (it exists before T1), the share channel on T1, masks and blinds on T2. Two clients that
were shown different adverts or a different U2 therefore hold different keys and their masks do not cancel: such a sum is
noise, never a disclosure.

What this does not protect: X25519 falls to a large quantum computer. Python cannot wipe memory; secrets are dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from securesplit.aggregate.shamir import field_bytes
from securesplit.errors import AggregationAborted

__all__ = [
    "Channel", "RoundSecrets", "alike_tag", "bind", "blind_key", "commit", "group_key", "he_secret", "mask_private", "open_box", "pair_key", "raw_public",
    "seal_box", "self_key", "share_key", "statement",
]  # fmt: skip

Randomness = Callable[[int], bytes]

_NONCE = bytes(12)  # every box key seals exactly one box


def _joined(label: str, parts: Iterable[bytes]) -> bytes:
    # Lengths make the joining one-to-one, whatever the names hold.
    return label.encode() + b"|" + b"".join(len(p).to_bytes(4, "big") + p for p in parts)


def _derive(secret: bytes, salt: bytes, label: str, *parts: str) -> bytes:
    info = _joined(label, (p.encode() for p in parts))
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=info).derive(secret)


def bind(label: str, previous: bytes, parts: Iterable[bytes]) -> bytes:
    """The next transcript hash: SHA-256 over the label, the previous hash and the parts with their lengths."""
    return hashlib.sha256(_joined(label, (previous, *parts))).digest()


def statement(kind: str, transcript: bytes, payload: bytes) -> bytes:
    """What a client signs for a stage: ``"ssa-1|" kind "|" transcript payload``; the transcript is 32 bytes."""
    return b"ssa-1|" + kind.encode() + b"|" + transcript + payload


def commit(label: str, secret: bytes) -> bytes:
    """A commitment to 32 uniform bytes: ``SHA-256("ssa-1/" label "|" secret)``.

    It hides the secret only because that is uniform with 256 bits; no extra opening value is needed.
    """
    return hashlib.sha256(b"ssa-1/" + label.encode() + b"|" + secret).digest()


class Channel:
    """A client's share channel for one round: its private key, and the secret agreed on with each peer, computed once.

    Args:
        private: 32 random bytes.
    """

    __slots__ = ("_agreed", "_private")

    def __init__(self, private: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(private)
        self._agreed: dict[bytes, bytes] = {}

    @property
    def public(self) -> bytes:
        """The 32-byte public key."""
        return raw_public(self._private)

    def agree(self, public: bytes, owner: str) -> bytes:
        """The secret shared with the owner of a public key.

        Raises:
            AggregationAborted: SS-6003 for a public key of low order.
        """
        if public not in self._agreed:
            self._agreed[public] = _exchange(self._private, public, owner)
        return self._agreed[public]


@dataclass(frozen=True, slots=True)
class RoundSecrets:
    """What one client draws for one round and for no other.

    Attributes:
        seed: s, 32 bytes below p; the mask key pair follows from it. Shared out; opened only if the client drops.
        self_mask: b, 32 bytes below p. Shared out; opened only if the client's vector is in the sum.
        channel: with an X25519 private key that is never shared.
        group: g, this client's part of the blind key; empty in rounds that are not blind.
    """

    seed: bytes = field(repr=False)
    self_mask: bytes = field(repr=False)
    channel: Channel = field(repr=False)
    group: bytes = field(repr=False)

    @classmethod
    def draw(cls, randomness: Randomness, *, blind: bool) -> RoundSecrets:
        """Fresh secrets from a CSPRNG."""
        seed, self_mask, channel = field_bytes(randomness), field_bytes(randomness), Channel(randomness(32))
        return cls(seed, self_mask, channel, randomness(32) if blind else b"")


def mask_private(seed: bytes, cfg: bytes) -> X25519PrivateKey:
    """The mask key pair that follows from s; X25519 clamps. The server repeats this for a dropped client."""
    return X25519PrivateKey.from_private_bytes(_derive(seed, cfg, "ssa-1/mask-sk"))


def raw_public(private: X25519PrivateKey) -> bytes:
    """The 32-byte public key."""
    return private.public_key().public_bytes_raw()


def _exchange(private: X25519PrivateKey, public: bytes, owner: str) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise AggregationAborted(
            "SS-6003", f"{owner} advertised a degenerate key", hint="Ask its owner; start a new round without it."
        ) from None


def pair_key(private: X25519PrivateKey, public: bytes, t2: bytes, mine: str, other: str) -> bytes:
    """The mask key of a pair; both get the same. The smaller name adds its stream, the larger subtracts it.

    Raises:
        AggregationAborted: SS-6003 for a public key of low order.
    """
    return _derive(_exchange(private, public, other), t2, "ssa-1/pair", *sorted((mine, other)))


def share_key(channel: Channel, public: bytes, t1: bytes, *, sender: str, receiver: str, other: str) -> bytes:
    """The key of the one box from sender to receiver; ``other`` is whichever of them owns ``public``.

    Raises:
        AggregationAborted: SS-6003 for a public key of low order.
    """
    return _derive(channel.agree(public, other), t1, "ssa-1/share", sender, receiver)


def self_key(self_mask: bytes, t2: bytes, name: str) -> bytes:
    """The key of a client's own mask, from b."""
    return _derive(self_mask, t2, "ssa-1/self", name)


def group_key(parts: Iterable[bytes], t2: bytes) -> bytes:
    """K, from the group parts of all of U2 in the order of names; 32 bytes each, so the joining is one-to-one."""
    return _derive(b"".join(parts), t2, "ssa-1/group")


def blind_key(group: bytes, t2: bytes, name: str) -> bytes:
    """The key of a client's blind, which every client of U2 can derive and the server cannot."""
    return _derive(group, t2, "ssa-1/blind", name)


def alike_tag(group: bytes, t2: bytes, alike: bytes) -> bytes:
    """What stands for values that all clients must hold alike in the statement of stage 3; 32 bytes.

    A key that the server does not have goes in, so that it cannot test guesses of the values against the signatures.
    """
    return _derive(group + alike, t2, "ssa-1/alike")


def he_secret(group: bytes, t2: bytes) -> bytes:
    """What a round's homomorphic keys follow from, at every client of U2 alike."""
    return _derive(group, t2, "ssa-1/he")


def _label_of_box(t1: bytes, sender: str, receiver: str) -> bytes:
    return _joined("b+s", (t1, sender.encode(), receiver.encode()))


def seal_box(key: bytes, content: bytes, t1: bytes, *, sender: str, receiver: str) -> bytes:
    """ChaCha20-Poly1305 under a key that is used for this box alone."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, content, _label_of_box(t1, sender, receiver))


def open_box(key: bytes, box: bytes, t1: bytes, *, sender: str, receiver: str) -> bytes:
    """The content of a box.

    Raises:
        AggregationAborted: SS-6007, naming the sender, when it was altered, misdirected or sealed in another round.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, box, _label_of_box(t1, sender, receiver))
    except InvalidTag:
        raise AggregationAborted(
            "SS-6007", f"the shares from {sender} do not open", hint="It, or the server on the way, altered them; start a new round.",
        ) from None  # fmt: skip
