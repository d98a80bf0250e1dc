"""What an authority hands to a party, and how a party's folder takes it in.

The steps of :meth:`Grant.install` are ordered so that a process killed between any two of them leaves a folder that still works:
first the pinned authorities and lists, which during an exchange only grow; then ``chain.pem``, which is the switch; then the
key and ``cert.pem``. Until the last step a new key lies in ``key.next.pem``, where :class:`securesplit.pki.store.KeyFolder` finds it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from securesplit.errors import InputError
from securesplit.pki.files import make_private_folder, write_atomically
from securesplit.pki.founding import certificate_pem
from securesplit.pki.identity import AUTHORITY_NAME
from securesplit.pki.revocation import Lists
from securesplit.pki.trust import Trust

__all__ = ["NEXT_KEY", "REQUEST", "Grant", "Parcel", "party_folders", "promote_key", "read_parcel"]

NEXT_KEY = "key.next.pem"
REQUEST = "request.csr"

_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----.*?-----END \1-----", re.DOTALL)
_MOST_BYTES = 1 << 24
_MOST_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Grant:
    """A certificate with everything that its party needs beside its key.

    Attributes:
        leaf: the certificate.
        path: its issuer, that one's issuer, up to the root.
        trust, lists: what the party pins, and those authorities' revocation lists.
        cross: the old root's word for a new one, during an exchange.
    """

    leaf: x509.Certificate = field(repr=False)
    path: tuple[x509.Certificate, ...] = field(repr=False)
    trust: Trust = field(repr=False)
    lists: Lists = field(repr=False)
    cross: tuple[x509.Certificate, ...] = field(default=(), repr=False)

    def chain(self) -> bytes:
        """What a handshake sends: the certificate, then its authorities; PEM."""
        return b"".join(certificate_pem(one) for one in (self.leaf, *self.path))

    def parcel(self) -> bytes:
        """All of it in one file, to be carried to a site and taken in by ``securesplit certs import``. Nothing in it is secret."""
        others = [one for one in self.trust.authorities if one not in self.path]
        rest = b"".join(certificate_pem(one) for one in (*others, *self.cross))
        return self.chain() + rest + self.lists.pem()

    def install(self, folder: Path, *, next_key: bool = False) -> Path:
        """Put it into a party's folder.

        Args:
            folder: made with mode 0700 when absent.
            next_key: the certificate is for the key in ``key.next.pem``. Otherwise the party keeps its key, byte for byte.

        Returns:
            The certificate's path.

        Raises:
            InputError: SS-1804 when it cannot be written.
            ConnectionFailed: SS-3101 when the folder exists and is open to others.
        """
        make_private_folder(folder)
        write_atomically(folder / "ca.pem", self.trust.pem())
        write_atomically(folder / "crl.pem", self.lists.pem())
        write_atomically(folder / "chain.pem", self.chain())
        if next_key:
            promote_key(folder)
        write_atomically(folder / "cert.pem", certificate_pem(self.leaf))
        return folder / "cert.pem"


def promote_key(folder: Path) -> None:
    """``key.next.pem`` becomes ``key.pem``. Raises InputError SS-1804."""
    try:
        (folder / NEXT_KEY).replace(folder / "key.pem")
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise InputError(
            "SS-1804", f"cannot write {folder}/key.pem: {type(error).__name__}", hint="Check the folder."
        ) from None


def party_folders(keys: Path, known: Sequence[x509.Certificate]) -> list[Path]:
    """The folders in ``keys`` that pin nothing but ``known``: one that pins another authority, or none, is not ours to write to."""
    own = {certificate_pem(one) for one in known}
    found = []
    for folder in sorted(keys.iterdir()):
        with suppress(OSError, ValueError):
            pinned = x509.load_pem_x509_certificates((folder / "ca.pem").read_bytes())
            if folder.name != AUTHORITY_NAME and {certificate_pem(one) for one in pinned} <= own:
                found.append(folder)
    return found


@dataclass(frozen=True, slots=True)
class Parcel:
    """Certificates and lists out of files that somebody carried here; nothing about them is verified."""

    certificates: tuple[x509.Certificate, ...] = field(repr=False)
    lists: tuple[x509.CertificateRevocationList, ...] = field(repr=False)


def read_parcel(paths: list[Path]) -> Parcel:
    """Read certificates and lists, PEM in any order and number, or one of them in DER per file.

    Raises:
        InputError: SS-1812 naming every file that holds neither.
    """
    certificates: list[x509.Certificate] = []
    lists: list[x509.CertificateRevocationList] = []
    faults = []
    for path in paths:
        try:
            with path.open("rb") as file:
                data = file.read(_MOST_BYTES)
            _sort(data, certificates, lists)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
            faults.append(f"{path}: {type(error).__name__}")
    if faults:
        raise InputError(
            "SS-1812",
            "a file holds neither certificates nor revocation lists",
            hint="Name PEM files, or DER files with one certificate or list each.",
            details=tuple(faults),
        )
    return Parcel(tuple(dict.fromkeys(certificates)), tuple(lists))


def _sort(data: bytes, certificates: list[x509.Certificate], lists: list[x509.CertificateRevocationList]) -> None:
    if not data.lstrip().startswith((b"-----", b"\x30")) and b"-----BEGIN " not in data:
        raise ValueError("neither PEM nor DER")
    if b"-----BEGIN " not in data:
        try:
            certificates.append(x509.load_der_x509_certificate(data))
        except ValueError:
            lists.append(x509.load_der_x509_crl(data))
        return
    blocks = list(_BLOCK.finditer(data))
    if not 1 <= len(blocks) <= _MOST_BLOCKS:
        raise ValueError("no PEM blocks, or too many")
    for block in blocks:
        if block.group(1) == b"CERTIFICATE":
            certificates.append(x509.load_pem_x509_certificate(block.group()))
        elif block.group(1) == b"X509 CRL":
            lists.append(x509.load_pem_x509_crl(block.group()))
        else:
            raise ValueError("another kind of PEM block")
