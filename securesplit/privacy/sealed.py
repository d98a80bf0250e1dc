"""The remote anchor: a ledger's head as an opaque blob that somebody else keeps and hands back.

Pure functions. A blob has 84 bytes whatever it says: a random nonce (12), then AES-256-GCM under a key of the site over the
ledger's id (16), its sequence number (8, little-endian) and its last hash (32), then the tag (16). Who keeps it learns only
that a client has a ledger and when it changed.

What this protects against: a copy of the whole machine, or of ledger and anchors together, that is used on: as soon as the
keeper shows the newest blob, the older copy is refused. What it does not: a keeper that shows an old blob or none; it can
hide a rollback, never invent one.
"""

from __future__ import annotations

import os
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from securesplit.errors import PolicyDenied
from securesplit.privacy.chain import Link

SEALED_BYTES = 84
_ABOUT = b"securesplit remote anchor v1"
_NONCE = 12
_BODY = struct.Struct("<16sQ32s")


def seal(key: bytes, ledger: str, link: Link) -> bytes:
    """Seal a head.

    Args:
        key: 32 bytes, of the site alone.
        ledger: its id, 32 hex digits.
        link: its last entry.
    """
    nonce = os.urandom(_NONCE)
    body = _BODY.pack(bytes.fromhex(ledger), link.seq, bytes.fromhex(link.hash))
    return nonce + AESGCM(key).encrypt(nonce, body, _ABOUT)


def unseal(key: bytes, ledger: str, blob: bytes) -> Link:
    """Open a blob that this site sealed.

    Raises:
        PolicyDenied: SS-2026 when it is not a blob of this ledger's.
    """
    if len(blob) != SEALED_BYTES:
        raise _foreign()
    try:
        body = AESGCM(key).decrypt(blob[:_NONCE], blob[_NONCE:], _ABOUT)
    except InvalidTag:
        raise _foreign() from None
    whose, seq, digest = _BODY.unpack(body)
    if whose != bytes.fromhex(ledger):
        raise _foreign()
    return Link(seq, digest.hex())


def _foreign() -> PolicyDenied:
    return PolicyDenied(
        "SS-2026",
        "the anchor that the other side kept is not of this site's ledger, so nothing may be sent",
        hint="Either the other side mixed up or damaged what it keeps, or the ledger here is not the one that was used: ask its operator, and check the ledger's folder.",
    )
