"""Checks of a certificate that somebody else presents, and of what its key signed.

What they do not protect against: a stolen authority's key (whoever has it is every party that its constraints allow), and a
revocation that has not reached the verifier yet (a list is valid for 7 days; a server next to its authority sees a new one
within seconds, clients get theirs by hand).
"""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.identity import Identity, Role, identity_of, read_certificate
from securesplit.pki.keys import PublicKey, key_type, verify_bytes
from securesplit.pki.revocation import Lists
from securesplit.pki.trust import Trust, domain_of, issued

__all__ = [
    "USAGE",
    "Issued",
    "fingerprint",
    "moment_text",
    "party_key",
    "read_issued",
    "read_pem",
    "require_fresh_crl",
    "require_path",
    "require_purpose",
    "require_same_domain",
    "serial_text",
    "verify_chain",
    "verify_signature",
]

USAGE: dict[Role, x509.ObjectIdentifier] = {
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
}


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 over the DER encoding, lower-case hex, 64 digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


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


def read_pem(path: Path) -> tuple[Path, x509.Certificate]:
    """The first certificate of a file, or of a folder's ``cert.pem``, and which file that was.

    Raises:
        InputError: SS-1812 when there is none.
    """
    file = path / "cert.pem" if path.is_dir() else path
    try:
        return file, x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise InputError(
            "SS-1812",
            f"{file} holds no certificate ({type(error).__name__})",
            hint="Name a PEM file or a party's folder.",
        ) from None


def read_issued(path: Path) -> Issued:
    """Describe the certificate in a file, or the ``cert.pem`` of a folder, without verifying anything.

    Raises:
        InputError: SS-1812 when there is none.
        ConnectionFailed: SS-3201 when it has no identity.
    """
    file, certificate = read_pem(path)
    domain = domain_of(certificate)
    if domain is not None:
        return Issued.of(file, certificate, f"spiffe://{domain}")
    return Issued.of(file, certificate, identity_of(certificate.public_bytes(serialization.Encoding.DER)).uri)


def party_key(certificate: x509.Certificate) -> PublicKey:
    """The public key of a party's certificate.

    Raises:
        ConnectionFailed: SS-3215 when it is neither P-256 nor Ed25519.
    """
    key: object = None
    with suppress(ValueError, UnsupportedAlgorithm):
        key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) and key_type(key) is not None:
        return key
    raise ConnectionFailed(
        "SS-3215",
        "a party's certificate has a key that is neither P-256 nor Ed25519",
        hint="Make a new key with 'securesplit certs request' or 'certs issue'; RSA and other curves are not accepted.",
    )


def verify_signature(cert_der: bytes, signature: bytes, data: bytes) -> None:
    """Check a signature by a certificate's key: ECDSA with SHA-256 on P-256, or Ed25519, as the key is.

    Args:
        cert_der: the signer's certificate, DER; its chain has to be verified separately.
        signature: DER-encoded (r, s), or the 64 bytes of Ed25519.
        data: what was signed; it must hold its own context and nonces, a signature alone proves no freshness.

    Raises:
        ConnectionFailed: SS-3207 when the signature does not fit, SS-3208 no certificate, SS-3215 another kind of key.
    """
    try:
        verify_bytes(party_key(read_certificate(cert_der)), signature, data)
    except InvalidSignature:
        raise ConnectionFailed(
            "SS-3207",
            "a signature does not fit the certificate that it is said to come from",
            hint="The peer is broken or somebody altered the exchange; do not retry, ask its operator.",
        ) from None


def verify_chain(
    leaf_der: bytes,
    ca_pem: bytes,
    crl_pem: bytes,
    role: Role,
    now: datetime,
    *,
    whose: str = "the peer's certificate",
    domain: str | None = None,
) -> Identity:
    """Check a leaf against the pinned authorities and their revocation lists, for one role.

    Args:
        leaf_der: the certificate, DER.
        ca_pem: the pinned authorities, PEM: every root and intermediate that counts.
        crl_pem: their revocation lists, PEM; a missing or outdated one fails, it never passes.
        role: what the certificate must be good for.
        now: the time of the check, with a time zone.
        whose: what to call the certificate in messages.
        domain: the trust domain that it must belong to, where the authorities do not state one.

    Returns:
        The identity, now proven to be issued by an authority; possession of the key is *not* proven. Compare parties
        by identity or serial number, never by the bytes: an ECDSA signature has more than one valid encoding.

    Raises:
        ConnectionFailed: SS-3201 no identity, SS-3202 another authority or profile, SS-3203 expired, SS-3204 not yet
            valid, SS-3205 revoked, SS-3206 no usable revocation list, SS-3208 no certificate, SS-3209 unusable
            ``ca_pem``, SS-3210 another role, SS-3211 another domain, SS-3215 a kind of key that is not accepted.
    """
    identity = identity_of(leaf_der)
    leaf = read_certificate(leaf_der)
    trust = Trust.parse(ca_pem)
    require_purpose(leaf, identity, role, whose)
    _require_dates(leaf, now, whose)
    require_same_domain(leaf, identity, trust, whose, domain=domain)
    path = require_path(leaf, trust, role, now, whose)
    party_key(leaf)
    _require_unrevoked((leaf, *path), Lists.parse(crl_pem), now, whose)
    return identity


def require_purpose(leaf: x509.Certificate, identity: Identity, role: Role, whose: str) -> None:
    """Refuse a certificate whose identity or extended key usage is not exactly the role's. Raises SS-3210."""
    if identity.role == role and _usages(leaf) == [USAGE[role]]:
        return
    raise ConnectionFailed(
        "SS-3210",
        f"{whose} is for the role {identity.role!r}, and a {role}'s is needed here",
        hint=f"Name the folder of a party issued with --role {role}.",
    )


def require_same_domain(
    leaf: x509.Certificate, identity: Identity, trust: Trust, whose: str, *, domain: str | None = None
) -> None:
    """Refuse another trust domain than the authorities state, or, where they state none, than ``domain``. Raises SS-3211.

    A certificate of a foreign authority is left to :func:`require_path`, whose complaint says more.
    """
    if {identity.domain} == (trust.domains or {domain or identity.domain}):
        return
    if any(issued(leaf, one) for one in trust.authorities):
        raise ConnectionFailed(
            "SS-3211", f"{whose} belongs to another trust domain than its authority", hint="Issue it anew."
        )


def require_path(
    leaf: x509.Certificate, trust: Trust, role: Role, now: datetime, whose: str
) -> tuple[x509.Certificate, ...]:
    """The leaf's path of authorities up to a root. Raises SS-3202, and SS-3203 when only an authority's date is wrong."""
    path = trust.path(leaf, now)
    if path is not None and (role == "client" or _names_a_host(leaf)):
        return path
    if path is None and trust.path(leaf, leaf.not_valid_before_utc) is not None:
        raise ConnectionFailed(
            "SS-3203",
            f"an authority of {whose} has expired",
            hint="Exchange the authority with 'securesplit certs rotate-ca'; check the clock.",
        )
    pinned = ", ".join(fingerprint(root)[:16] for root in trust.roots)
    raise ConnectionFailed(
        "SS-3202",
        f"{whose} was not issued by the pinned authority {pinned}",
        hint="All parties of a run need certificates of one authority; compare ca.pem in both folders.",
    )


def require_fresh_crl(crl_pem: bytes, root: x509.Certificate, now: datetime) -> x509.CertificateRevocationList:
    """An authority's own revocation list out of a file, valid now.

    Raises:
        ConnectionFailed: SS-3206 otherwise.
    """
    return Lists.parse(crl_pem).fresh(root, now)


def moment_text(moment: datetime) -> str:
    """A moment as people and JSON get it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _require_dates(leaf: x509.Certificate, now: datetime, whose: str) -> None:
    if now > leaf.not_valid_after_utc:
        raise ConnectionFailed(
            "SS-3203",
            f"{whose} expired at {moment_text(leaf.not_valid_after_utc)}",
            hint="Renew it with 'securesplit certs renew' at the authority; check the clock.",
        )
    if now < leaf.not_valid_before_utc:
        raise ConnectionFailed(
            "SS-3204",
            f"{whose} is not valid before {moment_text(leaf.not_valid_before_utc)}",
            hint="Set this machine's clock: it is behind the authority's.",
        )


def _require_unrevoked(chain: tuple[x509.Certificate, ...], lists: Lists, now: datetime, whose: str) -> None:
    for below, issuer in itertools.pairwise(chain):
        crl = lists.fresh(issuer, now)
        if crl.get_revoked_certificate_by_serial_number(below.serial_number) is None:
            continue
        what = whose if below is chain[0] else f"an authority of {whose}"
        raise ConnectionFailed(
            "SS-3205",
            f"{what} is revoked (serial {serial_text(below.serial_number)})",
            hint="The authority withdrew it; ask its operator for a new one if that was not meant.",
        )


def _names_a_host(leaf: x509.Certificate) -> bool:
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return any(isinstance(name, x509.DNSName | x509.IPAddress) for name in names)


def _usages(leaf: x509.Certificate) -> list[x509.ObjectIdentifier]:
    try:
        return list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return []
