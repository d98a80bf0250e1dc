"""Checks of a certificate that somebody else presents, and of what its key signed.

What they do not protect against: a stolen root key (whoever has it is every party), and a revocation that has not
reached the verifier yet (a list is valid for 7 days; a server next to its authority sees a new one within seconds,
clients get theirs by hand).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.identity import Identity, Role, identity_of, read_certificate

__all__ = [
    "USAGE",
    "Issued",
    "domain_of",
    "fingerprint",
    "read_issued",
    "require_fresh_crl",
    "serial_text",
    "verify_chain",
    "verify_signature",
]

USAGE: dict[Role, x509.ObjectIdentifier] = {
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
}

_HASH = hashes.SHA256()


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 over the DER encoding, lower-case hex, 64 digits."""
    return certificate.fingerprint(_HASH).hex()


def serial_text(serial: int) -> str:
    """A serial number as `openssl x509 -serial` prints it: upper-case hex, an even number of digits."""
    digits = f"{serial:X}"
    return digits if len(digits) % 2 == 0 else "0" + digits


@dataclass(frozen=True, slots=True)
class Issued:
    """What is said about a certificate.

    Attributes:
        path: the certificate file.
        serial: upper-case hex, as openssl prints it.
        not_after: with a time zone.
        uri_san: the party's identity; for the authority itself ``spiffe://<domain>``.
        fingerprint: SHA-256 over the DER encoding, lower-case hex.
    """

    path: Path
    serial: str
    not_after: datetime
    uri_san: str
    fingerprint: str

    @classmethod
    def of(cls, path: Path, certificate: x509.Certificate, uri_san: str) -> Issued:
        """Describe a certificate that lies at ``path``."""
        serial = serial_text(certificate.serial_number)
        return cls(path, serial, certificate.not_valid_after_utc, uri_san, fingerprint(certificate))


def read_issued(path: Path) -> Issued:
    """Describe the certificate in a file, or the ``cert.pem`` of a folder, without verifying anything.

    Raises:
        InputError: SS-1812 when there is none.
        ConnectionFailed: SS-3201 when it has no identity.
    """
    file = path / "cert.pem" if path.is_dir() else path
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            "SS-1812",
            f"{file} holds no certificate ({type(error).__name__})",
            hint="Name a PEM file or a party's folder.",
        ) from None
    try:
        uri = f"spiffe://{domain_of(certificate)}"
    except ConnectionFailed:
        uri = identity_of(certificate.public_bytes(serialization.Encoding.DER)).uri
    return Issued.of(file, certificate, uri)


def domain_of(root: x509.Certificate) -> str:
    """The trust domain that an authority's certificate states.

    Raises:
        ConnectionFailed: SS-3209 when it states none, or more than one.
    """
    try:
        names = root.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        uris = []
    if len(uris) != 1 or not uris[0].startswith("spiffe://") or "/" in uris[0].removeprefix("spiffe://"):
        raise ConnectionFailed(
            "SS-3209",
            "the authority's certificate states no trust domain",
            hint="Use an authority made by 'securesplit certs init-ca'.",
        )
    return uris[0].removeprefix("spiffe://")


def verify_signature(cert_der: bytes, signature: bytes, data: bytes) -> None:
    """Check an ECDSA-SHA256 signature by a certificate's key.

    Args:
        cert_der: the signer's certificate, DER; its chain has to be verified separately.
        signature: DER-encoded (r, s).
        data: what was signed; it must hold its own context and nonces, a signature alone proves no freshness.

    Raises:
        ConnectionFailed: SS-3207 when the signature does not fit, SS-3208 when the certificate has no P-256 key.
    """
    key: object = None
    with suppress(ValueError, UnsupportedAlgorithm):
        key = read_certificate(cert_der).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConnectionFailed("SS-3208", "the peer's certificate has no P-256 key", hint="Issue it anew.")
    try:
        key.verify(signature, data, ec.ECDSA(_HASH))
    except InvalidSignature:
        raise ConnectionFailed(
            "SS-3207",
            "a signature does not fit the certificate that it is said to come from",
            hint="The peer is broken or somebody altered the exchange; do not retry, ask its operator.",
        ) from None


def verify_chain(
    leaf_der: bytes, ca_pem: bytes, crl_pem: bytes, role: Role, now: datetime, *, whose: str = "the peer's certificate"
) -> Identity:
    """Check a leaf against the pinned authority and its revocation list, for one role.

    Args:
        leaf_der: the certificate, DER.
        ca_pem: exactly one authority's certificate, PEM.
        crl_pem: that authority's revocation list, PEM; a missing or outdated one fails, it never passes.
        role: what the certificate must be good for.
        now: the time of the check, with a time zone.
        whose: what to call the certificate in messages.

    Returns:
        The identity, now proven to be issued by the authority; possession of the key is *not* proven. Compare parties
        by identity or serial number, never by the bytes: an ECDSA signature has more than one valid encoding.

    Raises:
        ConnectionFailed: SS-3201 no identity, SS-3202 another authority or profile, SS-3203 expired, SS-3204 not yet
            valid, SS-3205 revoked, SS-3206 no usable revocation list, SS-3208 no certificate, SS-3210 another role,
            SS-3211 another domain.
    """
    identity = identity_of(leaf_der)
    leaf = read_certificate(leaf_der)
    root = _root(ca_pem)
    if identity.role != role or usages(leaf) != [USAGE[role]]:
        raise ConnectionFailed(
            "SS-3210",
            f"{whose} is for the role {identity.role!r}, and a {role}'s is needed here",
            hint=f"Name the folder of a party issued with --role {role}.",
        )
    if now > leaf.not_valid_after_utc:
        raise ConnectionFailed(
            "SS-3203",
            f"{whose} expired at {_instant(leaf.not_valid_after_utc)}",
            hint="Issue a new one; check the clock.",
        )
    if now < leaf.not_valid_before_utc:
        raise ConnectionFailed(
            "SS-3204",
            f"{whose} is not valid before {_instant(leaf.not_valid_before_utc)}",
            hint="Set this machine's clock: it is behind the authority's.",
        )
    require_issued_by(leaf, root, role, now, whose)
    if identity.domain != domain_of(root):
        raise ConnectionFailed(
            "SS-3211", f"{whose} belongs to another trust domain than its authority", hint="Issue it anew."
        )
    crl = require_fresh_crl(crl_pem, root, now)
    if crl.get_revoked_certificate_by_serial_number(leaf.serial_number) is not None:
        raise ConnectionFailed(
            "SS-3205",
            f"{whose} is revoked (serial {serial_text(leaf.serial_number)})",
            hint="The authority withdrew it; ask its operator for a new one if that was not meant.",
        )
    return identity


def require_fresh_crl(crl_pem: bytes, root: x509.Certificate, now: datetime) -> x509.CertificateRevocationList:
    """Read a revocation list and check that it is the authority's own and valid now.

    Raises:
        ConnectionFailed: SS-3206 otherwise.
    """
    hint = "Run 'securesplit certs crl' at the authority and copy its crl.pem into the party's folder."
    try:
        crl = x509.load_pem_x509_crl(crl_pem)
        ours = crl.issuer == root.subject and crl.is_signature_valid(_public(root))
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise ConnectionFailed("SS-3206", "the revocation list cannot be read", hint=hint) from None
    if not ours:
        raise ConnectionFailed("SS-3206", "the revocation list comes from another authority", hint=hint)
    if crl.next_update_utc is None or now >= crl.next_update_utc:
        raise ConnectionFailed("SS-3206", "the revocation list is out of date, so nobody can be admitted", hint=hint)
    if now < crl.last_update_utc:
        raise ConnectionFailed("SS-3206", "the revocation list is from the future", hint="Set this machine's clock.")
    return crl


def require_issued_by(leaf: x509.Certificate, root: x509.Certificate, role: Role, now: datetime, whose: str) -> None:
    builder = PolicyBuilder().store(Store([root])).time(now)
    try:
        leaf.verify_directly_issued_by(root)
        if role == "client":
            builder.build_client_verifier().verify(leaf, [])
        else:
            # The host name is the TLS layer's question; the verifier wants one, so it gets the leaf's own.
            builder.build_server_verifier(_first_host(leaf)).verify(leaf, [])
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError, VerificationError):
        raise ConnectionFailed(
            "SS-3202",
            f"{whose} was not issued by the pinned authority {fingerprint(root)[:16]}",
            hint="All parties of a run need certificates of one authority; compare ca.pem in both folders.",
        ) from None


def _first_host(leaf: x509.Certificate) -> x509.DNSName | x509.IPAddress:
    for name in leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value:
        if isinstance(name, x509.DNSName | x509.IPAddress):
            return name
    msg = "no host name"
    raise ValueError(msg)


def _root(ca_pem: bytes) -> x509.Certificate:
    try:
        roots = x509.load_pem_x509_certificates(ca_pem)
    except ValueError:
        roots = []
    if len(roots) != 1:
        raise ConnectionFailed(
            "SS-3209",
            f"the authority's file holds {len(roots)} certificates where exactly one is needed",
            hint="Copy ca/cert.pem into the party's folder as ca.pem.",
        )
    return roots[0]


def usages(leaf: x509.Certificate) -> list[x509.ObjectIdentifier]:
    try:
        return list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (ValueError, x509.ExtensionNotFound):
        return []


def _public(root: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = root.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        msg = "the authority's key is not on an elliptic curve"
        raise TypeError(msg)
    return key


def _instant(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
