"""Lint of certificates where they lie: a file, a party's folder, an authority's, or everything under ``--keys``.

To each certificate's own faults (findings.py) come those of its surroundings: modes and owners, a key that does not fit, a chain
that leads nowhere, lists that are missing, foreign or out of date, a certificate that is revoked. All of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from securesplit.errors import ConnectionFailed, InputError, SecureSplitError
from securesplit.pki.certificate import USAGE, moment_text, verify_chain
from securesplit.pki.files import require_private
from securesplit.pki.findings import Finding, findings_of
from securesplit.pki.founding import retired_folders, trust_of
from securesplit.pki.grant import NEXT_KEY
from securesplit.pki.identity import AUTHORITY_NAME, identity_of
from securesplit.pki.keys import is_encrypted
from securesplit.pki.renew import due_at
from securesplit.pki.revocation import Lists
from securesplit.pki.trust import Trust

__all__ = ["Linted", "lint"]


@dataclass(frozen=True, slots=True)
class Linted:
    """A fault and where it is."""

    path: Path
    finding: Finding


def lint(path: Path, now: datetime) -> tuple[Linted, ...]:
    """Everything that is wrong with a file of certificates, a party's folder, or a whole key folder.

    Encrypted keys are not opened: whether they fit stays unknown, and is said.

    Raises:
        InputError: SS-1812 when there is nothing to look at.
    """
    if path.is_dir():
        folders = [path] if (path / "cert.pem").exists() else _folders(path)
        if not folders:
            raise InputError("SS-1812", f"{path} holds no certificate", hint="Name a PEM file or a key folder.")
        return tuple(fault for folder in folders for fault in _folder(folder, now))
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise InputError(
            "SS-1812", f"{path} holds no certificate ({type(error).__name__})", hint="Name a PEM file or a key folder."
        ) from None
    return tuple(Linted(path, fault) for certificate in found for fault in findings_of(certificate, now))


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _folder(folder: Path, now: datetime) -> Iterator[Linted]:
    cert = folder / "cert.pem"
    for place in (folder, folder / "key.pem", folder / NEXT_KEY):
        if place.exists():
            yield from _caught(place, "mode", lambda place=place: require_private(place))
    try:
        certificate = x509.load_pem_x509_certificate(cert.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        pending = (folder / NEXT_KEY).exists()
        what = "a request waits for its certificate" if pending else "there is no certificate"
        yield Linted(folder, Finding("warning" if pending else "error", "missing", what))
        return
    for finding in findings_of(certificate, now):
        yield Linted(cert, finding)
    yield from _pair(folder, certificate)
    if folder.name == AUTHORITY_NAME:
        yield from _authority(folder, now)
    else:
        yield from _party(folder, certificate, now)


def _pair(folder: Path, certificate: x509.Certificate) -> Iterator[Linted]:
    place = folder / "key.pem"
    if not place.exists():
        yield Linted(place, Finding("warning", "no-key", "the key is not here"))
        return
    pem = place.read_bytes()
    if is_encrypted(pem):
        return
    try:
        fits = serialization.load_pem_private_key(pem, None).public_key() == certificate.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        yield Linted(place, Finding("error", "key", "this is no private key"))
        return
    if not fits:
        yield Linted(place, Finding("error", "key", "the key does not fit the certificate"))


def _party(folder: Path, certificate: x509.Certificate, now: datetime) -> Iterator[Linted]:
    try:
        chain = x509.load_pem_x509_certificates((folder / "chain.pem").read_bytes())
        if chain[0] != certificate:
            yield Linted(folder / "chain.pem", Finding("error", "chain", "it does not begin with the certificate"))
        ca_pem, crl_pem = (folder / "ca.pem").read_bytes(), (folder / "crl.pem").read_bytes()
    except (OSError, ValueError):
        yield Linted(folder, Finding("error", "missing", "chain.pem, ca.pem or crl.pem is missing or unreadable"))
        return
    yield from _lists(folder, ca_pem, crl_pem, now)
    der = certificate.public_bytes(serialization.Encoding.DER)
    try:
        role = identity_of(der).role
    except ConnectionFailed:
        return  # The certificate's own findings say so.
    # At a moment when its dates are good, so that an expired one still shows what else is wrong with it.
    moment = min(max(now, certificate.not_valid_before_utc), certificate.not_valid_after_utc)
    assert role in USAGE
    fresh = moment == now
    if fresh:
        yield from _caught(folder / "cert.pem", "verify", lambda: verify_chain(der, ca_pem, crl_pem, role, now))
    else:
        trust = Trust.parse(ca_pem)
        if trust.path(certificate, moment) is None:
            yield Linted(folder / "cert.pem", Finding("error", "verify", "no pinned authority issued it"))


def _authority(folder: Path, now: datetime) -> Iterator[Linted]:
    try:
        ca_pem, crl_pem = trust_of(folder), (folder / "crl.pem").read_bytes()
    except OSError:
        yield Linted(folder / "crl.pem", Finding("error", "missing", "the revocation list is missing"))
        return
    yield from _lists(folder, ca_pem, crl_pem, now)
    if not is_encrypted((folder / "key.pem").read_bytes() if (folder / "key.pem").exists() else b"ENCRYPTED"):
        yield Linted(folder / "key.pem", Finding("warning", "clear-key", "the authority's key is not encrypted"))
    for place in (folder / "root", *retired_folders(folder)):
        if (place / "key.pem").exists():
            yield from _caught(place / "key.pem", "mode", lambda place=place: require_private(place / "key.pem"))
    if (folder / "root" / "key.pem").exists():
        what = "the root's key lies beside the intermediate's; move the folder to a medium that is kept offline"
        yield Linted(folder / "root", Finding("warning", "online-root", what))
    if retired_folders(folder):
        yield Linted(folder, Finding("warning", "exchange", "an exchange of the authority is not finished"))


def _lists(folder: Path, ca_pem: bytes, crl_pem: bytes, now: datetime) -> Iterator[Linted]:
    try:
        trust = Trust.parse(ca_pem)
        lists = Lists.parse(crl_pem)
    except ConnectionFailed as error:
        yield Linted(folder, Finding("error", error.code, error.what))
        return
    for authority in trust.authorities:
        place = folder / "crl.pem"
        found = lists.of(authority)
        yield from _caught(place, "list", lambda authority=authority: lists.fresh(authority, now))
        if found is None or found.next_update_utc is None or now >= found.next_update_utc:
            continue
        if now >= found.last_update_utc + (found.next_update_utc - found.last_update_utc) * 2 / 3:
            until = moment_text(found.next_update_utc)
            yield Linted(place, Finding("warning", "list", f"a revocation list ends at {until}; publish a new one"))
        if now >= due_at(authority):
            yield Linted(folder, Finding("warning", "renew", "two thirds of an authority's life are over"))


def _caught(place: Path, rule: str, check: object) -> Iterator[Linted]:
    assert callable(check)
    try:
        check()
    except SecureSplitError as error:
        yield Linted(place, Finding("error", rule, f"{error.what} [{error.code}]"))
