"""Publishing revocation lists: one file beside the authority, and a copy in every party folder there.

What this does not protect against: a party on another machine whose copy nobody carries over. Its list runs out after 7 days,
and then it admits nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.certificate import serial_text
from securesplit.pki.files import write_atomically
from securesplit.pki.grant import party_folders
from securesplit.pki.identity import AUTHORITY_NAME
from securesplit.pki.profile import ROOT_CRL_DAYS, Signer, build_crl
from securesplit.pki.revocation import Lists
from securesplit.pki.trust import Trust

__all__ = ["Revoked", "publish", "read_lists", "spread", "with_retired"]


@dataclass(frozen=True, slots=True)
class Revoked:
    """What a revocation list says now.

    Attributes:
        path: the authority's list.
        serials: the serial numbers that this call put on it; empty when all of them were there before.
        total: how many it holds.
        next_update: after this moment nobody is admitted by it.
        stale: party folders beside the authority whose copy could not be replaced.
    """

    path: Path
    serials: tuple[str, ...]
    total: int
    next_update: datetime
    stale: tuple[Path, ...] = ()


def read_lists(folder: Path, trust: Trust) -> Lists:
    """The authority's own lists. Raises InputError SS-1811 when one of a pinned authority is missing."""
    with suppress(OSError, ConnectionFailed):
        lists = Lists.parse((folder / "crl.pem").read_bytes())
        if all(lists.of(one) is not None for one in trust.authorities):
            return lists
    raise InputError(
        "SS-1811",
        f"{folder}/crl.pem is missing or not this authority's, and a new one would forget every revocation",
        hint="Restore it from a backup or from the crl.pem of any party.",
    )


def with_retired(folder: Path, lists: Lists) -> Lists:
    """The lists, and the last one of every predecessor: who was shut out under the old authority stays out under the new."""
    last: list[x509.CertificateRevocationList] = []
    for path in sorted((folder / "retired").glob("*/crl.pem")):
        with suppress(OSError, ConnectionFailed):
            last += Lists.parse(path.read_bytes()).lists
    return Lists((*lists.lists, *last))


def publish(
    keys: Path,
    signers: Sequence[Signer],
    trust: Trust,
    lists: Lists,
    withdrawn: Sequence[x509.Certificate],
    now: datetime,
    *,
    root: Signer | None = None,
) -> Revoked:
    """Write fresh lists, with more certificates on them, and spread them.

    Args:
        keys: the folder above ``ca/``.
        signers: whoever signs parties now, and their predecessors.
        trust, lists: what is pinned, and the lists so far.
        withdrawn: certificates to put on the list of whoever issued them.
        now: the time of issue.
        root: the opened root above an intermediate, to publish its list anew, too.

    Raises:
        InputError: SS-1804 not writable, SS-1821 ``root`` is not this authority's.
    """
    fresh, added, total = [], [], 0
    for signer in signers:
        previous = lists.of(signer.certificate)
        serials = [leaf.serial_number for leaf in withdrawn if leaf.issuer == signer.certificate.subject]
        known = {entry.serial_number for entry in previous or ()}
        added += [serial_text(serial) for serial in serials if serial not in known]
        fresh.append(build_crl(signer, previous=previous, revoke=serials, now=now))
        total += len(fresh[-1])
    if root is not None:
        if root.certificate not in trust.authorities:
            raise InputError("SS-1821", "that root is not this authority's", hint="Name the folder of its root.")
        if all(root.certificate != signer.certificate for signer in signers):
            previous = lists.of(root.certificate)
            fresh.append(build_crl(root, previous=previous, revoke=(), now=now, days=ROOT_CRL_DAYS))
    renewed = lists.joined(fresh, trust.authorities)
    path = keys / AUTHORITY_NAME / "crl.pem"
    write_atomically(path, renewed.pem())
    stale = spread(keys, trust, renewed, [signer.certificate for signer in signers])
    until = min(entry.next_update_utc for entry in renewed.lists if entry.next_update_utc is not None)
    return Revoked(path, tuple(added), total, until, stale)


def spread(keys: Path, trust: Trust, lists: Lists, known: Sequence[x509.Certificate] = ()) -> tuple[Path, ...]:
    """Bring every party folder beside the authority up to date that pins nothing but ours; tell which ones failed.

    Args:
        keys: the folder that holds them.
        trust, lists: what parties shall pin, and its lists.
        known: what else of ours they may have pinned so far.
    """
    stale = []
    for folder in party_folders(keys, (*trust.authorities, *known)):
        try:
            if (folder / "ca.pem").read_bytes() != trust.pem():
                write_atomically(folder / "ca.pem", trust.pem())
            write_atomically(folder / "crl.pem", lists.pem())
        except (InputError, OSError):
            # The change stands; one folder that is read-only must not keep the others from learning of it.
            stale.append(folder)
    return tuple(stale)
