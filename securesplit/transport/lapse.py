"""What the parts of an identity in force say while time passes and files change: run out, or replaced by newer lists.

A folder that cannot be used as a whole, for an expired certificate or the mode of a key, may still hold a newer revocation
list. That one counts: whoever it names is out, whatever else is wrong. Lists alone are taken over, never authorities.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache

from securesplit.errors import ConnectionFailed
from securesplit.pki.identity import AUTHORITY_NAME
from securesplit.pki.revocation import Lists
from securesplit.pki.store import KeyFolder
from securesplit.pki.trust import Trust

__all__ = ["run_out", "with_newer_lists"]

_MAX_BYTES = 1 << 24


def run_out(folder: KeyFolder, now: datetime) -> int:
    """How many of the folder's lists and authorities have run out; everybody has to be looked at again when it grows."""
    return sum(now >= end for end in _ends(folder.ca_pem, folder.crl_pem))


def with_newer_lists(folder: KeyFolder, *, now: datetime | None = None) -> KeyFolder:
    """The identity in force, with the newest genuine lists that lie on disk; the very same object when none is newer.

    A list counts when an authority in force signed it and it is not from the future.
    """
    now = now or datetime.now(UTC)
    authorities, known = Trust.parse(folder.ca_pem).authorities, Lists.parse(folder.crl_pem)
    found = []
    for path in (folder.path / "crl.pem", folder.path.parent / AUTHORITY_NAME / "crl.pem"):
        # The two are independent: what cannot be read or is no list is the reload's to report.
        with suppress(OSError, ConnectionFailed):
            if path.stat().st_size <= _MAX_BYTES:
                found += [one for one in Lists.parse(path.read_bytes()).lists if one.last_update_utc <= now]
    joined = known.joined(found, authorities)
    if all(joined.of(one) == known.of(one) for one in authorities):
        return folder
    return replace(folder, crl_pem=joined.pem())


@lru_cache(maxsize=8)  # Asked a few times a second about the same bytes.
def _ends(ca_pem: bytes, crl_pem: bytes) -> tuple[datetime, ...]:
    authorities, lists = Trust.parse(ca_pem).authorities, Lists.parse(crl_pem)
    newest = [found for one in authorities if (found := lists.of(one)) is not None]
    ends = [found.next_update_utc for found in newest if found.next_update_utc is not None]
    return (*ends, *(one.not_valid_after_utc for one in authorities))
