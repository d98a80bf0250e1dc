"""The three profiles that exist: the authority's own certificate, a party's, and a revocation list.

Keys are ECDSA on P-256. A root signs leaves directly (path length 0). The root carries its trust domain as a URI name,
``spiffe://<domain>``, and the checks in securesplit/pki/certificate.py accept only leaves of that domain. X.509 name
constraints would say the same to OpenSSL, but the verifier of `cryptography` refuses every certificate below a URI
constraint ("unsupported name constraint"), so they are left out: one rule that every check applies is better than one
that half of them cannot read.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from securesplit.errors import InputError
from securesplit.pki.certificate import USAGE
from securesplit.pki.identity import Identity, Role, require_domain

__all__ = [
    "AUTHORITY_DAYS",
    "LEAF_DAYS",
    "MAX_LEAF_DAYS",
    "Address",
    "build_crl",
    "build_leaf",
    "build_root",
    "generate_key",
    "host_names",
    "require_days",
]

AUTHORITY_DAYS = 3650
LEAF_DAYS: dict[Role, int] = {"client": 30, "server": 90}
CRL_DAYS = 7
# Clocks of two machines differ; a certificate that is "not yet valid" is a puzzling failure.
BACKDATE = timedelta(minutes=10)

MAX_LEAF_DAYS = 397

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_DNS = re.compile(r"(?=.{1,253}\Z)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*")
_LOCAL_DNS = ("localhost",)
_LOCAL_IPS = ("127.0.0.1", "::1")
_HASH = hashes.SHA256()


def generate_key() -> ec.EllipticCurvePrivateKey:
    """A new P-256 key from the operating system's generator."""
    return ec.generate_private_key(ec.SECP256R1())


def build_root(key: ec.EllipticCurvePrivateKey, domain: str, now: datetime, days: int) -> x509.Certificate:
    """The authority's own certificate, valid for ``days`` from ``now``."""
    require_domain(domain)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # Two authorities of one domain must not share a name, or the wrong one's CRL would look like the right one's.
    name = _common_name(f"SecureSplit authority {identifier.digest.hex()[:16]}")
    builder = _dated(x509.CertificateBuilder(), now, days).subject_name(name).issuer_name(name)
    return (
        builder.public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{domain}")]), critical=False
        )
        .add_extension(identifier, critical=False)
        .sign(key, _HASH)
    )


def build_leaf(
    root: x509.Certificate,
    root_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    identity: Identity,
    *,
    dns: Sequence[str],
    ips: Sequence[Address],
    now: datetime,
    days: int,
) -> x509.Certificate:
    """A party's certificate: one identity, one purpose; it never outlives the root."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    names += [x509.DNSName(name) for name in dns]
    names += [x509.IPAddress(address) for address in ips]
    builder = _dated(x509.CertificateBuilder(), now, days, latest=root.not_valid_after_utc)
    return (
        builder.subject_name(_common_name(identity.name))
        .issuer_name(root.subject)
        .public_key(public_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([USAGE[identity.role]]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(_authority_key(root), critical=False)
        .sign(root_key, _HASH)
    )


def build_crl(
    root: x509.Certificate,
    root_key: ec.EllipticCurvePrivateKey,
    *,
    previous: x509.CertificateRevocationList | None,
    revoke: Sequence[int],
    now: datetime,
) -> x509.CertificateRevocationList:
    """The next revocation list: everything on the previous one, and the serial numbers in ``revoke``.

    ``lastUpdate`` is always later than the previous list's: OpenSSL ignores a newer list of the same second. It starts
    ten minutes back, so that many lists in a row do not end in the future, where they would refuse everybody.
    """
    now = now.replace(microsecond=0)
    last_update, number = now - BACKDATE, 1
    if previous is not None:
        last_update = max(last_update, previous.last_update_utc + timedelta(seconds=1))
        number = previous.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number + 1
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(root.subject)
        .last_update(last_update)
        .next_update(max(now, last_update) + timedelta(days=CRL_DAYS))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority_key(root), critical=False)
    )
    known = {entry.serial_number: entry for entry in previous or ()}
    for serial in revoke:
        if serial not in known:
            known[serial] = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
    for entry in known.values():
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(root_key, _HASH)


def host_names(role: Role, dns: Sequence[str], ips: Sequence[str]) -> tuple[tuple[str, ...], tuple[Address, ...]]:
    """What a server's certificate proves beside its identity: the names and addresses that clients dial.

    Raises:
        InputError: SS-1808 for a malformed one, and for any at all in a client's certificate.
    """
    if role == "client":
        if dns or ips:
            raise InputError("SS-1808", "a client has no host name or address to prove", hint="Drop --dns and --ip.")
        return (), ()
    if not dns and not ips:
        dns, ips = _LOCAL_DNS, _LOCAL_IPS
    for host in dns:
        if not _DNS.fullmatch(host):
            raise InputError(
                "SS-1808",
                f"{host[:80]!r} is not a host name",
                hint="Use lower-case DNS names without wildcards; addresses go into --ip.",
            )
    try:
        addresses = tuple(dict.fromkeys(ipaddress.ip_address(address) for address in ips))
    except ValueError:
        raise InputError("SS-1808", "one of the addresses is not an IP address", hint="Names go into --dns.") from None
    return tuple(dict.fromkeys(dns)), addresses


def require_days(days: int, most: int) -> None:
    """Accept a lifetime of 1 to ``most`` days.

    Raises:
        InputError: SS-1806 otherwise.
    """
    if not 1 <= days <= most:
        raise InputError("SS-1806", f"a lifetime of {days} days is not possible", hint=f"Use 1 to {most} days.")


def _dated(
    builder: x509.CertificateBuilder, now: datetime, days: int, *, latest: datetime | None = None
) -> x509.CertificateBuilder:
    now = now.astimezone(UTC).replace(microsecond=0)
    end = now + timedelta(days=days)
    # 159 random bits: nobody can guess a serial number, and two never meet.
    serial = x509.random_serial_number()
    builder = builder.serial_number(serial).not_valid_before(now - BACKDATE)
    return builder.not_valid_after(end if latest is None else min(end, latest))


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _authority_key(root: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    own = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
