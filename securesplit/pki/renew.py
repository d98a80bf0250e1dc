"""Renewal: another certificate for the same identity, the same hosts and, unless asked otherwise, the same key.

A certificate is due when two thirds of its life are over, so that a failed renewal leaves a third of it to notice. The
authority keeps a copy of every certificate, and with it every public key: to renew one it needs nothing from the site, and
the site's key file stays as it is, byte for byte. So a renewal does not look like another client to a privacy ledger, which is
bound to that file.

What this does not protect against: a key that was copied long ago. A renewed certificate is good for the copy, too.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.authority import Authority
from securesplit.pki.certificate import Issued, party_key
from securesplit.pki.files import write_atomically
from securesplit.pki.grant import NEXT_KEY
from securesplit.pki.identity import Identity, identity_of, require_name
from securesplit.pki.keys import KeyType, generate_key, is_encrypted, key_pem
from securesplit.pki.profile import Hosts
from securesplit.pki.revocation import Lists
from securesplit.pki.store import leaf_of

__all__ = ["Renewal", "certificate_held", "due_at", "hosts_of", "is_due", "newest", "renew", "renew_all"]


@dataclass(frozen=True, slots=True)
class Renewal:
    """What became of one certificate.

    Attributes:
        issued: the newest certificate, renewed or not.
        renewed: whether it was made now.
        due: from when on the one that was there is due.
        new_key: whether the party has another key file now. Its privacy ledger then needs `securesplit privacy adopt`.
        parcel: the file to carry to the site and import there, where the party's folder is not here.
    """

    issued: Issued
    renewed: bool
    due: datetime
    new_key: bool = False
    parcel: Path | None = None


def due_at(certificate: x509.Certificate) -> datetime:
    """When two thirds of a certificate's life are over."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return begins + (ends - begins) * 2 / 3


def hosts_of(leaf: x509.Certificate) -> Hosts:
    """The hosts that a party's certificate proves."""
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = [name.value for name in names if isinstance(name, x509.IPAddress)]
    ips = tuple(one for one in addresses if isinstance(one, ipaddress.IPv4Address | ipaddress.IPv6Address))
    return Hosts(tuple(names.get_values_for_type(x509.DNSName)), ips)


def newest(authority: Authority) -> dict[Identity, x509.Certificate]:
    """The last certificate that each party got from this authority, by identity."""
    found: dict[Identity, x509.Certificate] = {}
    for leaf in authority.issued():
        identity = _identity(leaf)
        # Of two that begin in the same second, the record's order decides.
        if identity not in found or found[identity].not_valid_before_utc <= leaf.not_valid_before_utc:
            found[identity] = leaf
    return found


def renew(
    authority: Authority,
    name: str,
    *,
    force: bool = False,
    days: int | None = None,
    new_key: KeyType | None = None,
    secret: bytes | None = None,
    out: Path | None = None,
    now: datetime | None = None,
) -> Renewal:
    """Renew a party's certificate if it is due.

    Args:
        authority: whose record knows the party.
        name: the party.
        force: renew it although it is not due, or has expired.
        days: lifetime; the role's own when absent.
        new_key: make a new key of this kind, too; only where the party's folder is here.
        secret: encrypts that key; needed where the old one is encrypted.
        out: write the parcel for the site here, too. Without the party's folder, ``keys/NAME.signed.pem`` when absent.
        now: the time of issue.

    Raises:
        InputError: SS-1801 bad name, SS-1804 not writable, SS-1806 bad lifetime, SS-1816 nothing to renew.
        ConnectionFailed: SS-3100 a new key without the party's folder, SS-3104 the new key would be less protected.
    """
    require_name(name)
    now = now or datetime.now(UTC)
    with authority.locked() as lists:
        identity, leaf = _renewable(authority, name, lists, now, force=force)
        folder = authority.keys / name
        held = certificate_held(folder, identity)
        # The folder's own counts: a certificate that was recorded and never got there may be for a key that is lost.
        due = is_due(authority, held or leaf, now) or (held is not None and held != leaf)
        leaf = held or leaf
        if not (force or due):
            return Renewal(Issued.of(folder / "cert.pem", leaf, identity.uri), renewed=False, due=due_at(leaf))
        public = party_key(leaf)
        if new_key is not None:
            _require_replaceable(folder, secret, here=held is not None)
            key = generate_key(new_key)
            write_atomically(folder / NEXT_KEY, key_pem(key, secret), mode=0o600)
            public = key.public_key()
        grant = authority.grant(identity, public, hosts_of(leaf), lists, days=days, now=now)
        path = folder / "cert.pem"
        if held is not None:
            grant.install(folder, next_key=new_key is not None)
        parcel = out or (None if held is not None else authority.keys / f"{name}.signed.pem")
        if parcel is not None:
            write_atomically(parcel, grant.parcel())
            path = path if held is not None else parcel
        issued = Issued.of(path, grant.leaf, identity.uri)
        return Renewal(issued, renewed=True, due=due_at(leaf), new_key=new_key is not None, parcel=parcel)


def renew_all(authority: Authority, *, force: bool = False, now: datetime | None = None) -> tuple[Renewal, ...]:
    """Renew every party whose certificate is due. Who is revoked or has expired stays out: that is how access ends."""
    now = now or datetime.now(UTC)
    with authority.locked() as lists:
        good = [
            identity.name
            for identity, leaf in newest(authority).items()
            if now <= leaf.not_valid_after_utc and not authority.is_withdrawn(leaf, lists)
        ]
    return tuple(renew(authority, name, force=force, now=now) for name in sorted(set(good)))


def is_due(authority: Authority, leaf: x509.Certificate, now: datetime) -> bool:
    """Whether two thirds of its life are over, or another authority than the present one issued it."""
    return now >= due_at(leaf) or leaf.issuer != authority.certificate.subject


def certificate_held(folder: Path, identity: Identity) -> x509.Certificate | None:
    """The certificate of a party's folder beside the authority; None where there is none, or another party's."""
    try:
        leaf = x509.load_der_x509_certificate(leaf_of(folder))
        return leaf if _identity(leaf) == identity else None
    except (ValueError, ConnectionFailed):
        return None


def _renewable(
    authority: Authority, name: str, lists: Lists, now: datetime, *, force: bool
) -> tuple[Identity, x509.Certificate]:
    known = [(identity, leaf) for identity, leaf in newest(authority).items() if identity.name == name]
    why = f"this authority never issued a certificate to {name!r}"
    for identity, leaf in sorted(known, key=lambda one: one[1].not_valid_before_utc, reverse=True):
        if authority.is_withdrawn(leaf, lists):
            why = f"{name} is revoked"
        elif now > leaf.not_valid_after_utc and not force:
            why = f"the certificate of {name} has expired"
        else:
            return identity, leaf
    raise InputError(
        "SS-1816",
        why,
        hint="Issue a new one with 'certs issue' or 'certs approve', or renew an expired one with --force.",
    )


def _require_replaceable(folder: Path, secret: bytes | None, *, here: bool) -> None:
    if not here:
        raise ConnectionFailed(
            "SS-3100",
            f"no usable identity: {folder} is not here, and a new key is made where it is used",
            hint="On the site, run 'securesplit certs request', and approve that request here with --again.",
        )
    if secret is None and is_encrypted((folder / "key.pem").read_bytes()):
        raise ConnectionFailed(
            "SS-3104",
            f"{folder}/key.pem is encrypted, and its successor would not be",
            hint="Give a passphrase for the new key with --key-pass-file or --key-pass-fd.",
        )


def _identity(leaf: x509.Certificate) -> Identity:
    return identity_of(leaf.public_bytes(serialization.Encoding.DER))
