"""Released bytes, kept encrypted, so that a retry, a later epoch or a restart resends them.

Fresh noise on the same content would let an averaging server cancel it. A payload is written in the transaction that
charges for it, and its SHA-256 stands in the chained entry; it is encrypted by AES-256-GCM under a key of the site, with
the entry's identity as associated data, so a stored payload can be neither altered nor moved to another entry. One that is
missing is refused like an altered one: the product never loses one without the other, so somebody edited the file.

What this does not hide: which entries have a payload and how long it is, and anything from who holds ``site.key``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from securesplit.errors import PolicyDenied
from securesplit.privacy.chain import Chain, Entry

_NONCE = 12


class Memo:
    """The remembered payloads of one open ledger.

    Args:
        db: the ledger's file.
        key: the site's key for payloads, 32 bytes. Nonces are random, 96 bit: good for 2^32 payloads.
        ledger: the ledger's id.
    """

    def __init__(self, db: sqlite3.Connection, key: bytes, ledger: str) -> None:
        self._db, self._cipher, self._ledger = db, AESGCM(key), ledger

    def keep(self, entry: Entry, payload: bytes) -> None:
        """Store an entry's payload. Call inside the transaction that appends the entry."""
        nonce = os.urandom(_NONCE)
        sealed = nonce + self._cipher.encrypt(nonce, payload, self._about(entry))
        self._db.execute("INSERT INTO memo (seq, payload) VALUES (?, ?)", (entry.seq, sealed))

    def payload(self, entry: Entry) -> bytes:
        """What left under an entry, bit for bit.

        Raises:
            PolicyDenied: SS-2025 when it is missing, or is not what left.
        """
        row = self._db.execute("SELECT payload FROM memo WHERE seq = ?", (entry.seq,)).fetchone()
        if row is None:
            raise _unfit(entry.seq)
        sealed = bytes(row[0])
        try:
            payload = self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], self._about(entry))
        except (InvalidTag, ValueError):
            raise _unfit(entry.seq) from None
        if hashlib.sha256(payload).hexdigest() != entry.payload:
            raise _unfit(entry.seq)
        return payload

    def require_complete(self) -> None:
        """Check that exactly the entries with a version have a payload, without reading any.

        Raises:
            PolicyDenied: SS-2025.
        """
        row = self._db.execute(
            "SELECT seq FROM entries WHERE version != '' AND channel != 'adopted' EXCEPT SELECT seq FROM memo"
        ).fetchone()
        stray = self._db.execute(
            "SELECT seq FROM memo EXCEPT SELECT seq FROM entries WHERE version != '' AND channel != 'adopted'"
        ).fetchone()
        if row or stray:
            raise _unfit(int((row or stray)[0]))

    def verify(self, chain: Chain) -> None:
        """Read and check every payload.

        Raises:
            PolicyDenied: SS-2025.
        """
        self.require_complete()
        for entry in chain.entries():
            if entry.version and not entry.adopted:
                self.payload(entry)

    def _about(self, e: Entry) -> bytes:
        return json.dumps([self._ledger, e.seq, e.record, e.channel, e.version, e.payload]).encode()


def _unfit(seq: int) -> PolicyDenied:
    return PolicyDenied(
        "SS-2025",
        f"what the ledger remembers of release {seq} is missing or was altered, so nothing may be sent",
        hint="Keep the ledger, and put back the newest copy of its folder from before the change: the record was sent once already.",
    )
