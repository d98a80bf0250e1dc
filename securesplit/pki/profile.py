"""The kinds of certificates and lists that exist: a root, an intermediate, a party's, a request, a revocation list.

A root without an intermediate signs parties directly (path length 0); one with an intermediate can be kept offline (path length
1). An authority carries its trust domain as a URI name, ``spiffe://<domain>``, and as a critical name constraint
(constraints.py), so that OpenSSL too refuses what it would sign for another domain.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.x509.oid import NameOID

from securesplit.errors import InputError
from securesplit.pki.certificate import USAGE
from securesplit.pki.constraints import name_constraints
from securesplit.pki.identity import Identity, Role, require_domain
from securesplit.pki.keys import PrivateKey, PublicKey, signature_hash

__all__ = [
    "AUTHORITY_DAYS",
    "BACKDATE",
    "CRL_DAYS",
    "INTERMEDIATE_DAYS",
    "LEAF_DAYS",
    "MAX_LEAF_DAYS",
    "ROOT_CRL_DAYS",
    "Address",
    "Hosts",
    "Scope",
    "Signer",
    "build_authority",
    "build_crl",
    "build_cross",
    "build_leaf",
    "build_request",
    "host_names",
    "require_days",
]

AUTHORITY_DAYS = 3650
INTERMEDIATE_DAYS = 730
LEAF_DAYS: dict[Role, int] = {"client": 30, "server": 90}
CRL_DAYS = 7
# A root in a safe signs a list once a year; it only ever revokes intermediates.
ROOT_CRL_DAYS = 365
# Clocks of two machines differ; a certificate that is "not yet valid" is a puzzling failure.
BACKDATE = timedelta(minutes=10)

MAX_LEAF_DAYS = 397

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_DNS = re.compile(r"(?=.{1,253}\Z)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*")
_LOCAL_DNS = ("localhost",)
_LOCAL_IPS = ("127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Signer:
    """An authority's certificate and its key."""

    certificate: x509.Certificate = field(repr=False)
    key: PrivateKey = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Scope:
    """What an authority may speak for.

    Attributes:
        domain: its trust domain.
        dns, ips: suffixes and address ranges of servers; empty means any.
    """

    domain: str
    dns: tuple[str, ...] = ()
    ips: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hosts:
    """The names and addresses that a server's certificate proves beside its identity; both empty for a client."""

    dns: tuple[str, ...] = ()
    ips: tuple[Address, ...] = ()

    def names(self) -> list[x509.GeneralName]:
        """As they stand in a certificate."""
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in self.dns]
        return names + [x509.IPAddress(address) for address in self.ips]


def build_authority(
    key: PrivateKey, scope: Scope, now: datetime, days: int, *, path_length: int, parent: Signer | None = None
) -> x509.Certificate:
    """An authority's certificate, valid for ``days`` from ``now``: a root, or below ``parent`` an intermediate.

    Raises:
        InputError: SS-1802 bad domain, SS-1808 bad DNS suffix or address range.
    """
    require_domain(scope.domain)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # Two authorities of one domain must not share a name, or the wrong one's CRL would look like the right one's.
    kind = "authority" if parent is None else "issuing authority"
    name = _common_name(f"SecureSplit {kind} {identifier.digest.hex()[:16]}")
    latest = None if parent is None else parent.certificate.not_valid_after_utc
    builder = _dated(x509.CertificateBuilder(), now, days, latest=latest).subject_name(name)
    builder = (
        builder.issuer_name(name if parent is None else parent.certificate.subject)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(name_constraints(scope.domain, scope.dns, scope.ips), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{scope.domain}")]), critical=False
        )
        .add_extension(identifier, critical=False)
    )
    if parent is not None:
        builder = builder.add_extension(_authority_key(parent.certificate), critical=False)
    signing = key if parent is None else parent.key
    return builder.sign(signing, signature_hash(signing))


def build_cross(new: x509.Certificate, old: Signer, now: datetime) -> x509.Certificate:
    """The old root's word that a new root follows it: the new one's name and key in a certificate that the old one signed.

    A party that has pinned the old root may pin the new one on the strength of it. It is no link of a chain: where the
    old root allows no authority below itself, no verifier would follow it, and it is never sent in a handshake.
    """
    end = min(new.not_valid_after_utc, old.certificate.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .subject_name(new.subject)
        .issuer_name(old.certificate.subject)
        .public_key(new.public_key())
        .not_valid_before(_whole(now) - BACKDATE)
        .not_valid_after(end)
    )
    for extension in new.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    builder = builder.add_extension(_authority_key(old.certificate), critical=False)
    return builder.sign(old.key, signature_hash(old.key))


def build_leaf(
    signer: Signer, public_key: PublicKey, identity: Identity, hosts: Hosts, *, now: datetime, days: int
) -> x509.Certificate:
    """A party's certificate: one identity, one purpose; it never outlives its authority."""
    builder = _dated(x509.CertificateBuilder(), now, days, latest=signer.certificate.not_valid_after_utc)
    return (
        builder.subject_name(_common_name(identity.name))
        .issuer_name(signer.certificate.subject)
        .public_key(public_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([USAGE[identity.role]]), critical=False)
        .add_extension(_alternative_names(identity, hosts), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(_authority_key(signer.certificate), critical=False)
        .sign(signer.key, signature_hash(signer.key))
    )


def build_request(key: PrivateKey, identity: Identity, hosts: Hosts) -> x509.CertificateSigningRequest:
    """A site's request for a certificate: everything that the authority shall sign, signed by the site's own key."""
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_common_name(identity.name))
        .add_extension(_alternative_names(identity, hosts), critical=False)
        .add_extension(x509.ExtendedKeyUsage([USAGE[identity.role]]), critical=False)
        .sign(key, signature_hash(key))
    )


def build_crl(
    signer: Signer,
    *,
    previous: x509.CertificateRevocationList | None,
    revoke: Sequence[int],
    now: datetime,
    days: int = CRL_DAYS,
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
        .issuer_name(signer.certificate.subject)
        .last_update(last_update)
        .next_update(max(now, last_update) + timedelta(days=days))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority_key(signer.certificate), critical=False)
    )
    known = {entry.serial_number: entry for entry in previous or ()}
    for serial in revoke:
        if serial not in known:
            known[serial] = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
    for entry in known.values():
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(signer.key, signature_hash(signer.key))


def host_names(role: Role, dns: Sequence[str], ips: Sequence[str]) -> Hosts:
    """What a server's certificate proves beside its identity: the names and addresses that clients dial.

    Raises:
        InputError: SS-1808 for a malformed one, and for any at all in a client's certificate.
    """
    if role == "client":
        if dns or ips:
            raise InputError("SS-1808", "a client has no host name or address to prove", hint="Drop --dns and --ip.")
        return Hosts()
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
    return Hosts(tuple(dict.fromkeys(dns)), addresses)


def require_days(days: int, most: int) -> None:
    """Accept a lifetime of 1 to ``most`` days.

    Raises:
        InputError: SS-1806 otherwise.
    """
    if not 1 <= days <= most:
        raise InputError("SS-1806", f"a lifetime of {days} days is not possible", hint=f"Use 1 to {most} days.")


def _whole(now: datetime) -> datetime:
    return now.astimezone(UTC).replace(microsecond=0)


def _dated(
    builder: x509.CertificateBuilder, now: datetime, days: int, *, latest: datetime | None = None
) -> x509.CertificateBuilder:
    now = _whole(now)
    end = now + timedelta(days=days)
    # 159 random bits: nobody can guess a serial number, and two never meet.
    serial = x509.random_serial_number()
    builder = builder.serial_number(serial).not_valid_before(now - BACKDATE)
    return builder.not_valid_after(end if latest is None else min(end, latest))


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative_names(identity: Identity, hosts: Hosts) -> x509.SubjectAlternativeName:
    own = x509.UniformResourceIdentifier(identity.uri)
    return x509.SubjectAlternativeName([own, *hosts.names()])


def _authority_key(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    own = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
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
