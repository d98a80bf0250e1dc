"""What hides the sum itself from the server in blind rounds: a blind of every client's own, or homomorphic encryption.

Both follow from a key that all clients of the round have and the server has not, and both go around masked words: a single
client could give the server that key, and behind it the server would find masks. Encryption is a second envelope, not a
substitute for masks; the server adds what it cannot read.

What this does not protect: one client that sides with the server shows it the sum. Nothing here withstands chosen
ciphertexts, so nothing that was decrypted, and no complaint about it, goes back to the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.fixedpoint import Words
from securesplit.aggregate.keys import blind_key, he_secret
from securesplit.aggregate.masks import add_streams
from securesplit.aggregate.wire import Vector
from securesplit.errors import LocalProtocolError, RemoteProtocolError

if TYPE_CHECKING:
    from securesplit.aggregate.he import HeScheme

__all__ = ["Hidden", "SumWorker", "Worker", "hide", "reveal", "scheme_of"]


class SumWorker(Protocol):
    """What a server needs of a worker: it adds ciphertexts of one key, which it does not have."""

    def begin(self, scheme: HeScheme, public: bytes, dim: int) -> int:
        """A running sum."""
        ...

    def add(self, handle: int, frame: bytes) -> None:
        """Add one client's frame."""
        ...

    def add_plain(self, handle: int, words: Words) -> None:
        """Add words that are no secret."""
        ...

    def finish(self, handle: int) -> bytes:
        """The frame of the sum."""
        ...

    def drop(self, handle: int) -> None:
        """Forget a running sum."""
        ...


class Worker(Protocol):
    """What a client needs of a worker."""

    def encrypt(self, scheme: HeScheme, secret: bytes, words: Words) -> bytes:
        """A frame of encrypted words."""
        ...

    def decrypt(self, scheme: HeScheme, secret: bytes, frame: bytes, dim: int, *, silent: bool = False) -> Words:
        """The words of a sum's frame, mod 2^32."""
        ...


def scheme_of(config: RoundConfig) -> HeScheme:
    """The scheme of a round's backend, sized for its roster."""
    if config.backend == "masks":
        raise LocalProtocolError("SS-6005", "a round without encryption has no scheme")
    # The module computes its parameters when it is imported, which rounds without encryption need not wait for.
    from securesplit.aggregate.he import HeScheme

    return HeScheme(config.backend, len(config.roster))


@dataclass(frozen=True, slots=True, eq=False)
class Hidden:
    """A masked vector as it leaves.

    Attributes:
        vector: words, or the frame of encrypted ones.
        public: the public part of the round's key, with encryption; else empty.
    """

    vector: Vector
    public: bytes


def hide(config: RoundConfig, masked: Words, *, name: str, group: bytes, t2: bytes, worker: Worker | None) -> Hidden:
    """Put the round's envelope around a masked vector.

    Args:
        config: the round.
        masked: (d + 1,); a blind is added in place.
        name: this client.
        group: K, the clients' key; empty in rounds that are not blind.
        t2: transcript hash over U2.
        worker: encrypts, in rounds with encryption.
    """
    if config.backend != "masks":
        from securesplit.aggregate.he import derive_keys

        keys = derive_keys(scheme_of(config), he_secret(group, t2))
        frame = _need(worker).encrypt(scheme_of(config), keys.secret, masked)
        return Hidden(np.frombuffer(frame, dtype=np.uint8), keys.public)
    if config.blind:
        add_streams(masked, [blind_key(group, t2, name)], prg=config.prg)
    return Hidden(masked, b"")


def reveal(
    config: RoundConfig,
    vector: Vector | None,
    *,
    group: bytes,
    t2: bytes,
    survivors: Sequence[str],
    worker: Worker | None,
) -> Words:
    """Take the envelope off the sum.

    Args:
        config, group, t2, worker: as in :func:`hide`.
        vector: as it came with stage 4.
        survivors: U3.

    Returns:
        (d + 1,) words; in rounds that are not blind the very array that came.

    Raises:
        RemoteProtocolError: SS-6014 when it is not this round's vector. What decrypts to something impossible gives no
            error here: a server that sees who complains would learn from complaints.
    """
    encrypted, size = config.backend != "masks", config.dim + 1
    kind = np.dtype("u1" if encrypted else f"u{config.ring_bits // 8}")
    if vector is None or vector.dtype != kind or not (encrypted or vector.shape == (size,)):
        raise RemoteProtocolError("SS-6014", "the result's vector has a wrong type or length")
    if encrypted:
        secret = he_secret(group, t2)
        return _need(worker).decrypt(scheme_of(config), secret, vector.tobytes(), size, silent=True)
    words = cast("Words", vector)  # By its dtype, which was looked at above.
    if not config.blind:
        return words
    ring = words.copy()
    add_streams(ring, minus=[blind_key(group, t2, name) for name in survivors], prg=config.prg)
    return ring


def _need(worker: Worker | None) -> Worker:
    if worker is None:
        raise LocalProtocolError(
            "SS-6005", "a round with encryption needs a worker", hint="Give ClientRound a HeWorker."
        )
    return worker
