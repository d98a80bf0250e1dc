"""What is wrong with one certificate, everything at once: a party's or an authority's, from here or from outside.

Verification stops at the first reason to refuse; a person who repairs a certificate wants all of them. The rules are stricter
than verification: what they warn of still works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from securesplit.errors import ConnectionFailed
from securesplit.pki.certificate import USAGE, moment_text
from securesplit.pki.identity import Identity, Role, identity_of
from securesplit.pki.keys import key_type
from securesplit.pki.profile import LEAF_DAYS, MAX_LEAF_DAYS
from securesplit.pki.renew import due_at

__all__ = ["Finding", "Severity", "findings_of"]

Severity = Literal["error", "warning"]
_RSA_BITS = 3072
_SERIAL_BITS = 64
_SOUND = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault.

    Attributes:
        severity: an error is refused somewhere, a warning deserves a word.
        rule: its stable name.
        message: what is wrong, in a sentence.
    """

    severity: Severity
    rule: str
    message: str


def findings_of(certificate: x509.Certificate, now: datetime) -> tuple[Finding, ...]:
    """Every fault of a certificate by itself; chains, lists and files are lint.py's.

    A certificate so malformed that a part of it cannot be parsed gives a finding for that part and goes on with the others.
    """
    authority = _claims_authority(certificate)
    rules: list[Callable[[x509.Certificate, datetime], Iterator[Finding]]] = [_form, _key, _dates, _identifiers]
    rules += [_authority] if authority else [_names, _purpose, _usage, _life]
    found: list[Finding] = []
    for rule in rules:
        try:
            found += rule(certificate, now)
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
            found.append(_error("malformed", f"its {rule.__name__.strip('_')} cannot be parsed"))
    return tuple(found)


def _form(certificate: x509.Certificate, _now: datetime) -> Iterator[Finding]:
    if certificate.version is not x509.Version.v3:
        yield _error("version", "it is not an X.509 version 3 certificate, so it can have no names or uses")
    if not 0 < certificate.serial_number < 1 << 160:
        yield _error("serial", "its serial number is not a positive number of at most 20 bytes")
    elif certificate.serial_number.bit_length() < _SERIAL_BITS:
        yield _warning("serial", "its serial number is short, so it was not drawn at random")
    algorithm = certificate.signature_hash_algorithm
    if algorithm is not None and not isinstance(algorithm, _SOUND):
        yield _error("signature", f"it is signed with {algorithm.name}")
    known = (
        x509.BasicConstraints,
        x509.KeyUsage,
        x509.ExtendedKeyUsage,
        x509.SubjectAlternativeName,
        x509.NameConstraints,
    )
    for extension in certificate.extensions:
        if extension.critical and not isinstance(extension.value, known):
            yield _error(
                "critical", f"it has a critical extension that is not understood ({extension.oid.dotted_string})"
            )


def _key(certificate: x509.Certificate, _now: datetime) -> Iterator[Finding]:
    key = certificate.public_key()
    party = not _claims_authority(certificate)
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < _RSA_BITS:
            yield _error("key-size", f"its RSA key has {key.key_size} bits; {_RSA_BITS} are the least")
        if party:
            yield _error("key-type", "its key is RSA; parties have P-256 or Ed25519 keys")
    elif isinstance(key, ec.EllipticCurvePublicKey):
        if key.curve.key_size < 256:
            yield _error("key-size", f"its key is on a curve of {key.curve.key_size} bits; 256 are the least")
        if party and key_type(key) is None:
            yield _error("key-type", f"its key is on {key.curve.name}; parties have P-256 or Ed25519 keys")
    elif key_type(key) is None:
        yield _error("key-type", "its key is of a kind that is not accepted")


def _dates(certificate: x509.Certificate, now: datetime) -> Iterator[Finding]:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if ends <= begins:
        yield _error("dates", "it ends before it begins")
    elif now > ends:
        yield _error("expired", f"it expired at {moment_text(ends)}")
    elif now < begins:
        yield _error("not-yet-valid", f"it is not valid before {moment_text(begins)}; check the clock")
    elif now >= due_at(certificate):
        yield _warning("renew", f"two thirds of its life are over; it ends at {moment_text(ends)}")


def _identifiers(certificate: x509.Certificate, _now: datetime) -> Iterator[Finding]:
    if _extension(certificate, x509.SubjectKeyIdentifier) is None:
        yield _error("key-identifier", "it has no subject key identifier, which strict verification demands")
    own = certificate.issuer == certificate.subject
    if _extension(certificate, x509.AuthorityKeyIdentifier) is None and not own:
        yield _error("key-identifier", "it has no authority key identifier, which strict verification demands")


def _names(certificate: x509.Certificate, _now: datetime) -> Iterator[Finding]:
    names = _extension(certificate, x509.SubjectAlternativeName)
    if names is None:
        yield _error("no-san", "it has no alternative names; a common name identifies nobody")
        return
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        yield _error("uri", f"it names {len(uris)} URIs where exactly one is allowed")
    for uri in uris:
        try:
            Identity.parse(uri)
        except ConnectionFailed:
            yield _error("uri", "one of its URIs is not spiffe://<domain>/securesplit/<role>/<name>")
    dns = names.get_values_for_type(x509.DNSName)
    hosts = [name for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]
    if any("*" in name for name in dns):
        yield _warning("wildcard", "it speaks for every host under a wildcard")
    role = _role(certificate)
    if role == "server" and not hosts:
        yield _error("no-host", "a server's certificate names no host or address, so no client can dial it")
    if role == "client" and hosts:
        yield _warning("host", "a client's certificate names hosts, which it has no use for")
    if len(names) - len(uris) - len(hosts):
        yield _warning("names", "it has names of other kinds, which nothing here looks at")


def _purpose(certificate: x509.Certificate, _now: datetime) -> Iterator[Finding]:
    usage = _extension(certificate, x509.ExtendedKeyUsage)
    if usage is None:
        yield _error("no-eku", "it has no extended key usage, so it would be good for anything")
        return
    purposes = list(usage)
    if ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in purposes:
        yield _error("any-eku", "its extended key usage allows anything")
    if set(USAGE.values()) <= set(purposes):
        yield _error("both-ekus", "it is good for a client and for a server; one certificate has one purpose")
    role = _role(certificate)
    if role is not None and USAGE[role] not in purposes:
        yield _error("wrong-eku", f"its identity is a {role}'s, and its extended key usage is not")
    if set(purposes) - {*USAGE.values(), ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}:
        yield _error("other-eku", "its extended key usage names other purposes, too")


def _usage(certificate: x509.Certificate, _now: datetime) -> Iterator[Finding]:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    except x509.ExtensionNotFound:
        yield _error("no-key-usage", "it has no key usage, so its key would be good for anything")
        return
    if not usage.value.digital_signature:
        yield _error("key-usage", "its key usage forbids signatures, which TLS 1.3 and the handshake need")
    if usage.value.key_cert_sign or usage.value.crl_sign:
        yield _error("key-usage", "its key usage lets it sign certificates or lists")
    if not usage.critical:
        yield _warning("key-usage", "its key usage is not critical")
    if _extension(certificate, x509.BasicConstraints) is None:
        yield _warning("constraints", "it does not say that it is no authority")


def _life(certificate: x509.Certificate, _now: datetime) -> Iterator[Finding]:
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    role = _role(certificate)
    usual = LEAF_DAYS[role] if role is not None else max(LEAF_DAYS.values())
    if life > timedelta(days=MAX_LEAF_DAYS + 1):
        yield _error("life", f"it lives for {life.days} days; {MAX_LEAF_DAYS} are the most")
    elif life > timedelta(days=usual + 1):
        yield _warning(
            "life", f"it lives for {life.days} days; {usual} are usual, so that a stolen key is soon worthless"
        )


def _authority(certificate: x509.Certificate, _now: datetime) -> Iterator[Finding]:
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    if not basic.critical:
        yield _error("constraints", "an authority's basic constraints are not critical")
    if basic.value.path_length is None:
        yield _warning("path-length", "an authority may have any number of authorities below it")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is None or not usage.key_cert_sign:
        yield _error("key-usage", "an authority's key usage does not let it sign certificates")
    if usage is None or not usage.crl_sign:
        yield _error("key-usage", "an authority's key usage does not let it sign revocation lists")
    if usage is not None and usage.digital_signature:
        yield _warning("key-usage", "an authority's key may sign other things, too")
    if _extension(certificate, x509.NameConstraints) is None:
        yield _warning("name-constraints", "an authority may speak for every trust domain and host")


def _role(certificate: x509.Certificate) -> Role | None:
    try:
        return identity_of(certificate.public_bytes(serialization.Encoding.DER)).role
    except ConnectionFailed:
        return None


def _claims_authority(certificate: x509.Certificate) -> bool:
    try:
        found = _extension(certificate, x509.BasicConstraints)
    except (ValueError, x509.DuplicateExtension):
        return False
    # A party's certificate that claims to be an authority is judged by what it is meant for.
    return found is not None and found.ca and _role(certificate) is None


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _error(rule: str, message: str) -> Finding:
    return Finding("error", rule, message)


def _warning(rule: str, message: str) -> Finding:
    return Finding("warning", rule, message)
