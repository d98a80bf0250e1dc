"""A name for a site's records that tells nothing of them: the same for the same records, on any machine with the site's key.

A plain hash would not do. Short records can be guessed, and who guesses right would see it in the hash; a salt that lies
beside the hash does not change that. So the digest is keyed, and the key, ``runs.key``, stays in the party's key folder. It is
not the ledger's key: a run under a policy without a ledger has a name for its data, too.

What it does not do: who has the key file and a guess can test the guess.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from securesplit.errors import InputError, PolicyDenied
from securesplit.privacy.sitekey import site_key

__all__ = ["KEY", "fingerprint", "run_key"]

KEY = "runs.key"


class Text(Protocol):
    """A record of securesplit/data/corpus.py."""

    @property
    def text(self) -> str:
        """What is learnt."""
        ...

    @property
    def user(self) -> str | None:
        """Whose it is."""
        ...

    @property
    def label(self) -> str | None:
        """Its class."""
        ...


def run_key(folder: Path) -> bytes:
    """This party's key for names of data, 32 bytes; made with mode 0600 where there is none yet.

    Args:
        folder: the party's key folder.

    Raises:
        InputError: SS-1287 when the file is not a key.
    """
    try:
        return site_key(folder / KEY, make=True)
    except PolicyDenied:
        raise InputError(
            "SS-1287", f"{folder / KEY} is not a key of 32 bytes",
            hint="Put the original back, or delete it: a new one is made, and the same data then has another name.",
        ) from None  # fmt: skip


def fingerprint(records: Sequence[Text], key: bytes) -> str:
    """HMAC-SHA256 over the records in their order, in hex. Every field has its length in front, so that none runs into the next.

    Args:
        records: at least their texts, users and labels count.
        key: of :func:`run_key`.
    """
    digest = hmac.new(key, b"securesplit.data.v1", hashlib.sha256)
    for record in records:
        for field in (record.text, record.user, record.label):
            data = b"" if field is None else field.encode()
            digest.update((b"-" if field is None else b"+") + len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
