"""How an authority comes into being on disk, and how another takes its place.

``ca/`` holds ``cert.pem`` and ``key.pem`` of whoever signs parties now, ``crl.pem`` with every list that counts and ``issued/``.
Where more than that one certificate is to be pinned, ``trust.pem`` holds all of them. A root above an intermediate lies in
``root/``, or wherever its owner keeps it: nothing daily needs it. ``retired/SERIAL/`` holds what an exchange replaced.

Each step leaves a state that the next start understands: a new authority appears whole or not at all, and a successor that is
complete in ``next/`` is put into force by whoever opens the authority next.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.certificate import serial_text
from securesplit.pki.files import folder_in_one_step, remove_folder, require_private, write_atomically
from securesplit.pki.keys import KeyType, generate_key, key_pem, load_key
from securesplit.pki.passphrase import Passphrase
from securesplit.pki.profile import (
    AUTHORITY_DAYS,
    INTERMEDIATE_DAYS,
    ROOT_CRL_DAYS,
    Scope,
    Signer,
    build_authority,
    build_crl,
    require_days,
)
from securesplit.pki.revocation import Lists
from securesplit.pki.trust import Trust

__all__ = [
    "Founded",
    "Plan",
    "certificate_pem",
    "found",
    "locked_folder",
    "open_signer",
    "promote",
    "retired_folders",
    "stage",
    "trust_of",
    "write_authority",
    "write_root",
]


@dataclass(frozen=True, slots=True)
class Plan:
    """What kind of authority to make.

    Attributes:
        scope: what it may speak for.
        days: lifetime of the root.
        key_type: of all of its keys.
        passphrase: encrypts the key that signs parties; None leaves it in the clear.
        intermediate: whether a root signs an intermediate, and that one the parties.
        root_passphrase: encrypts the root's key, where there is an intermediate.
    """

    scope: Scope
    days: int = AUTHORITY_DAYS
    key_type: KeyType = "p256"
    passphrase: bytes | None = field(default=None, repr=False)
    intermediate: bool = False
    root_passphrase: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Founded:
    """A new authority in memory; ``root`` and ``issuing`` are the same without an intermediate."""

    root: Signer
    issuing: Signer
    root_list: x509.CertificateRevocationList

    @property
    def trust(self) -> Trust:
        """What parties have to pin."""
        return Trust.of(self._both(self.root.certificate, self.issuing.certificate))

    def lists(self, now: datetime) -> Lists:
        """Empty lists, one for each."""
        own = build_crl(self.issuing, previous=None, revoke=(), now=now)
        return Lists((own,)) if self.root is self.issuing else Lists((own, self.root_list))

    def _both(self, root: x509.Certificate, issuing: x509.Certificate) -> tuple[x509.Certificate, ...]:
        return (root,) if self.root is self.issuing else (issuing, root)


def found(plan: Plan, now: datetime, *, root: Signer | None = None, root_list: Lists | None = None) -> Founded:
    """Make the keys and certificates of an authority.

    Args:
        plan: what kind.
        now: the time of issue.
        root, root_list: an existing root to put a new intermediate below, with its current list.

    Raises:
        InputError: SS-1802 bad domain, SS-1806 bad lifetime, SS-1808 bad suffix or range.
    """
    require_days(plan.days, 36500)
    if root is None:
        key = generate_key(plan.key_type)
        depth = 1 if plan.intermediate else 0
        root = Signer(build_authority(key, plan.scope, now, plan.days, path_length=depth), key)
    previous = None if root_list is None else root_list.of(root.certificate)
    own_list = build_crl(root, previous=previous, revoke=(), now=now, days=ROOT_CRL_DAYS)
    if not plan.intermediate:
        return Founded(root, root, own_list)
    key = generate_key(plan.key_type)
    below = build_authority(key, plan.scope, now, INTERMEDIATE_DAYS, path_length=0, parent=root)
    return Founded(root, Signer(below, key), own_list)


def write_authority(keys: Path, folder: Path, made: Founded, plan: Plan, now: datetime, root_at: Path | None) -> None:
    """Put a new authority into ``folder``.

    Args:
        keys: for messages.
        folder: ``keys/ca``.
        made: what to write.
        plan: with its passphrases.
        now: the time of its first lists.
        root_at: where the root's key goes when there is an intermediate; ``folder/root`` when absent.

    Raises:
        InputError: SS-1804 not writable, SS-1805 there is an authority already, here or in ``root_at``.
    """
    for place in (folder, root_at):
        if place is not None and place.exists():
            raise InputError(
                "SS-1805",
                f"{place} exists already, and replacing it would strand every certificate it issued",
                hint="Use another --keys folder, exchange the authority with 'securesplit certs rotate-ca', or move the old one away by hand.",
            )
    if root_at is not None and plan.intermediate:
        with folder_in_one_step(root_at) as aside:
            write_root(aside, made, plan)
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    with folder_in_one_step(folder) as aside:
        (aside / "issued").mkdir(mode=0o700)
        _write_issuing(aside, made, plan, made.lists(now), made.trust)
        if plan.intermediate and root_at is None:
            (aside / "root").mkdir(mode=0o700)
            write_root(aside / "root", made, plan)


def stage(folder: Path, made: Founded, plan: Plan, lists: Lists, trust: Trust, cross: x509.Certificate | None) -> None:
    """Lay a successor down in ``ca/next``, whole; :func:`promote` puts it into force, now or after a crash.

    Args:
        folder: ``keys/ca``.
        made, plan: the successor.
        lists, trust: what counts during the exchange: the successor's and the predecessor's.
        cross: the old root's word for the new one.
    """
    with folder_in_one_step(folder / "next") as aside:
        _write_issuing(aside, made, plan, lists, trust)
        if cross is not None:
            write_atomically(aside / "cross.pem", certificate_pem(cross))


def promote(folder: Path) -> bool:
    """Put a successor that lies whole in ``ca/next`` into force. May be interrupted anywhere and repeated.

    Returns:
        Whether there was one.
    """
    coming = folder / "next"
    if not coming.exists():
        return False
    old = x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())
    new = (coming / "cert.pem").read_bytes()
    retired = folder / "retired" / serial_text(old.serial_number)
    if certificate_pem(old) != new and not retired.exists():
        with folder_in_one_step(retired) as aside:
            write_atomically(aside / "key.pem", (folder / "key.pem").read_bytes(), mode=0o600)
            write_atomically(aside / "trust.pem", trust_of(folder))
            write_atomically(aside / "cert.pem", certificate_pem(old))
    for name in ("trust.pem", "crl.pem", "cross.pem", "key.pem", "cert.pem"):
        if (coming / name).exists():
            write_atomically(folder / name, (coming / name).read_bytes(), mode=0o600 if name == "key.pem" else 0o644)
    remove_folder(coming)
    return True


def retired_folders(folder: Path) -> list[Path]:
    """Predecessors whose keys are still there, because certificates of theirs are."""
    return [path.parent for path in sorted((folder / "retired").glob("[0-9A-F]*/key.pem"))]


def open_signer(folder: Path, passphrase: Passphrase | None) -> Signer:
    """The certificate and key of a folder of an authority.

    Raises:
        InputError: SS-1807 when there is no certificate.
        ConnectionFailed: SS-3101 others may use the key, SS-3102 it is not the certificate's, SS-3104 and SS-3105 no or a
            wrong passphrase.
    """
    try:
        certificate = x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())
    except (OSError, ValueError):
        raise InputError(
            "SS-1807", f"there is no certificate of an authority in {folder}", hint="Check the folder, or run init-ca."
        ) from None
    require_private(folder / "key.pem")
    key, _ = load_key((folder / "key.pem").read_bytes(), folder / "key.pem", passphrase)
    if key.public_key() != certificate.public_key():
        raise ConnectionFailed(
            "SS-3102", f"{folder}/key.pem is not the key of cert.pem", hint="Restore the pair from a backup."
        )
    return Signer(certificate, key)


def trust_of(folder: Path) -> bytes:
    """What parties pin, PEM: ``trust.pem``, or where there is none the one certificate. Raises OSError."""
    trust = folder / "trust.pem"
    return (trust if trust.exists() else folder / "cert.pem").read_bytes()


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """One process at a time changes the authority."""
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """One certificate, PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_issuing(folder: Path, made: Founded, plan: Plan, lists: Lists, trust: Trust) -> None:
    write_atomically(folder / "key.pem", key_pem(made.issuing.key, plan.passphrase), mode=0o600)
    write_atomically(folder / "crl.pem", lists.pem())
    if len(trust.authorities) > 1:
        write_atomically(folder / "trust.pem", trust.pem())
    write_atomically(folder / "cert.pem", certificate_pem(made.issuing.certificate))


def write_root(folder: Path, made: Founded, plan: Plan) -> None:
    """A root above an intermediate: its key, its certificate and its list."""
    write_atomically(folder / "key.pem", key_pem(made.root.key, plan.root_passphrase or plan.passphrase), mode=0o600)
    write_atomically(folder / "crl.pem", made.root_list.public_bytes(serialization.Encoding.PEM))
    write_atomically(folder / "cert.pem", certificate_pem(made.root.certificate))
