"""Revocation lists: one per authority, several in one file, and none of them optional.

``crl.pem`` holds a list for every authority of ``ca.pem``. For each link of a chain the issuer's newest genuine list is asked;
a missing, outdated or foreign one refuses, it never lets anybody pass.

What this does not protect against: a revocation that has not reached this machine yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from securesplit.errors import ConnectionFailed

__all__ = ["Lists", "is_revoked", "signed_by"]

_BLOCK = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)
_HINT = "Run 'securesplit certs crl' at the authority and copy its crl.pem into the party's folder."
_MOST = 64


@dataclass(frozen=True, slots=True)
class Lists:
    """The lists of a ``crl.pem``, unverified; each question checks the signature of the list that it asks."""

    lists: tuple[x509.CertificateRevocationList, ...] = field(repr=False)

    @classmethod
    def parse(cls, pem: bytes) -> Lists:
        """Read a file of one or more lists.

        Raises:
            ConnectionFailed: SS-3206 when it holds none, or something else.
        """
        try:
            found = tuple(x509.load_pem_x509_crl(block.group()) for block in _BLOCK.finditer(pem))
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
            found = ()
        if not 1 <= len(found) <= _MOST:
            raise ConnectionFailed("SS-3206", "the revocation list cannot be read", hint=_HINT)
        return cls(found)

    def pem(self) -> bytes:
        """All lists, PEM."""
        return b"".join(entry.public_bytes(serialization.Encoding.PEM) for entry in self.lists)

    def of(self, issuer: x509.Certificate) -> x509.CertificateRevocationList | None:
        """The newest list that an authority signed, however old; None when there is none."""
        own = [entry for entry in self.lists if signed_by(entry, issuer)]
        return max(own, key=lambda entry: entry.last_update_utc, default=None)

    def joined(self, others: Iterable[x509.CertificateRevocationList], issuers: Iterable[x509.Certificate]) -> Lists:
        """The newest genuine list of each issuer, out of these and others."""
        every = Lists((*self.lists, *others))
        return Lists(tuple(entry for issuer in issuers if (entry := every.of(issuer)) is not None))

    def fresh(self, issuer: x509.Certificate, now: datetime) -> x509.CertificateRevocationList:
        """An authority's list that is valid now.

        Raises:
            ConnectionFailed: SS-3206 otherwise.
        """
        found = self.of(issuer)
        if found is None:
            raise ConnectionFailed("SS-3206", "the revocation list comes from another authority", hint=_HINT)
        if found.next_update_utc is None or now >= found.next_update_utc:
            raise ConnectionFailed(
                "SS-3206", "the revocation list is out of date, so nobody can be admitted", hint=_HINT
            )
        if now < found.last_update_utc:
            raise ConnectionFailed(
                "SS-3206", "the revocation list is from the future", hint="Set this machine's clock."
            )
        return found


def signed_by(entry: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    """Whether a list is this authority's own, covers all of its certificates, and says nothing that is not understood."""
    try:
        key = issuer.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey):
            return False
        if entry.issuer != issuer.subject or not entry.is_signature_valid(key):
            return False
        # A critical extension narrows the list, to other certificates or to changes since another list.
        return not any(extension.critical for extension in entry.extensions)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion):
        return False


def is_revoked(certificate: x509.Certificate, lists: Lists) -> bool:
    """Whether a certificate of one of these lists' authorities is on it. For housekeeping: no signature or date is checked."""
    return any(
        entry.issuer == certificate.issuer
        and entry.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None
        for entry in lists.lists
    )
