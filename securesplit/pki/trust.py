"""The pinned authorities of a party, and the path from a certificate up to one of them.

``ca.pem`` holds every authority that counts: one root; a root and its intermediate; or, while an authority is exchanged, the old
and the new ones. Nothing else is trusted, and no intermediate that a peer sends along is looked at: it must be pinned, too.

`cryptography`'s own path verifier is not used, because it refuses Ed25519 keys and URI name constraints. The rules below are
RFC 5280's, section 6.1, cut down to what can occur here; what they do not know, they refuse. OpenSSL verifies the same chain
once more in every TLS handshake.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from securesplit.errors import ConnectionFailed
from securesplit.pki.constraints import permits

__all__ = ["Trust", "domain_of", "issued"]

_DEEPEST = 4
_RSA_BITS = 2048
_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_UNDERSTOOD = (
    x509.BasicConstraints,
    x509.KeyUsage,
    x509.ExtendedKeyUsage,
    x509.SubjectAlternativeName,
    x509.NameConstraints,
)


@dataclass(frozen=True, slots=True)
class Trust:
    """The authorities of a ``ca.pem``; made by :meth:`parse` or :meth:`of`, which check them.

    Attributes:
        authorities: in the file's order.
        roots: those that signed themselves.
        domains: the trust domains that they state, at most one; an authority from outside states none.
    """

    authorities: tuple[x509.Certificate, ...] = field(repr=False)
    roots: tuple[x509.Certificate, ...] = field(repr=False)
    domains: frozenset[str]

    @staticmethod
    def parse(pem: bytes) -> Trust:
        """Read a file of authorities.

        Raises:
            ConnectionFailed: SS-3209 when it holds none, the same one twice, something else, no root, or two trust domains.
        """
        return _parsed(pem)

    @classmethod
    def of(cls, authorities: tuple[x509.Certificate, ...]) -> Trust:
        """Check that these can be pinned together. Raises as :meth:`parse`."""
        why = ""
        if not authorities:
            why = "no certificate"
        elif len({one.fingerprint(hashes.SHA256()) for one in authorities}) != len(authorities):
            why = "the same certificate twice"
        elif not all(_is_authority(one) for one in authorities):
            why = "a certificate that is not an authority's"
        roots = () if why else tuple(one for one in authorities if issued(one, one))
        domains = frozenset() if why else frozenset(d for one in authorities if (d := domain_of(one)) is not None)
        if not why and not roots:
            why = "no root, only intermediates"
        if len(domains) > 1:
            why = "authorities of two trust domains"
        if why:
            raise ConnectionFailed(
                "SS-3209",
                f"the authority's file holds {why}",
                hint="Copy ca/trust.pem, or where there is none ca/cert.pem, into the party's folder as ca.pem.",
            )
        return cls(authorities, roots, domains)

    def pem(self) -> bytes:
        """All of them, PEM."""
        return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in self.authorities)

    def path(self, leaf: x509.Certificate, now: datetime) -> tuple[x509.Certificate, ...] | None:
        """The leaf's issuer, that one's issuer, and so on up to a root, all valid now; None when there is no such path.

        The leaf's own dates and purposes are the caller's to check. Signatures, names, dates and rights of the authorities,
        the depth they allow and their name constraints are checked here.
        """
        try:
            if not _is_party(leaf):
                return None
            names = list(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
            return next(self._paths(leaf, names, (), now), None)
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension):
            # A hostile certificate can fail in the parser at any of its parts, which are read one by one.
            return None

    def _paths(
        self,
        below: x509.Certificate,
        names: list[x509.GeneralName],
        so_far: tuple[x509.Certificate, ...],
        now: datetime,
    ) -> Iterator[tuple[x509.Certificate, ...]]:
        for one in self.authorities:
            usable = one not in so_far and one.not_valid_before_utc <= now <= one.not_valid_after_utc
            if not usable or not _may_issue(one, len(so_far)) or not permits(one, names) or not issued(below, one):
                continue
            path = (*so_far, one)
            if one in self.roots:
                yield path
            elif len(path) < _DEEPEST:
                above = [*names, *_names(one)]
                yield from self._paths(one, above, path, now)


@lru_cache(maxsize=16)  # The same few files are asked about at every connection; what they say never changes.
def _parsed(pem: bytes) -> Trust:
    try:
        found = tuple(x509.load_pem_x509_certificates(pem))
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        found = ()
    return Trust.of(found)


def domain_of(authority: x509.Certificate) -> str | None:
    """The trust domain that an authority states as its one URI, ``spiffe://<domain>``; None when it states none."""
    try:
        names = authority.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return None
    if len(uris) != 1 or not uris[0].startswith("spiffe://") or "/" in uris[0].removeprefix("spiffe://"):
        return None
    return uris[0].removeprefix("spiffe://")


def issued(below: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority's key signed a certificate and its name stands in it as the issuer's."""
    try:
        if not _sound(authority) or not _signed_soundly(below):
            return False
        below.verify_directly_issued_by(authority)
        return _key_identifiers_fit(below, authority)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError, x509.DuplicateExtension):
        return False


def _names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca and _sound(certificate)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, UnsupportedAlgorithm):
        return False


def _may_issue(authority: x509.Certificate, intermediates_below: int) -> bool:
    if not _understood(authority):
        return False
    try:
        basic = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = authority.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return False
    deep_enough = basic.path_length is None or basic.path_length >= intermediates_below
    return basic.ca and usage.key_cert_sign and usage.crl_sign and deep_enough


def _is_party(leaf: x509.Certificate) -> bool:
    if leaf.version is not x509.Version.v3 or not _understood(leaf):
        return False
    try:
        if leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return False
    except x509.ExtensionNotFound:
        pass
    try:
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return True
    return usage.digital_signature and not usage.key_cert_sign and not usage.crl_sign


def _understood(certificate: x509.Certificate) -> bool:
    return all(isinstance(one.value, _UNDERSTOOD) for one in certificate.extensions if one.critical)


def _sound(authority: x509.Certificate) -> bool:
    """Whether an authority's key is of a kind and size that a signature by it proves something."""
    key = authority.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        return key.key_size >= _RSA_BITS
    return isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey)


def _signed_soundly(certificate: x509.Certificate) -> bool:
    found = certificate.signature_hash_algorithm
    return found is None or isinstance(found, _HASHES)


def _key_identifiers_fit(below: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        wanted = below.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        own = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except x509.ExtensionNotFound:
        return True
    return wanted is None or wanted == own
