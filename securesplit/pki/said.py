"""What a certificate says about itself, for people; nothing is verified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa

from securesplit.errors import InputError
from securesplit.pki.certificate import USAGE, moment_text, read_pem
from securesplit.pki.keys import key_type
from securesplit.pki.renew import due_at
from securesplit.pki.request import authority_words

__all__ = ["Said", "said_by"]


@dataclass(frozen=True, slots=True)
class Said:
    """A certificate in words.

    Attributes:
        key_type: ``p256``, ``ed25519``, ``rsa-BITS`` or ``other``.
        not_before, renew_from: ISO 8601.
        issuer: the issuer's name, with whatever is not printable ASCII escaped.
        hosts: DNS names and addresses.
        purposes: of ``client`` and ``server`` those that it may be used as; others by number.
        words: of an authority, to be compared by telephone; None for a party.
    """

    key_type: str
    not_before: str
    renew_from: str
    issuer: str
    hosts: tuple[str, ...]
    purposes: tuple[str, ...]
    words: str | None


def said_by(path: Path) -> Said:
    """Read the first certificate of a file or of a folder's ``cert.pem``.

    Raises:
        InputError: SS-1812 when there is none, or its extensions cannot be parsed.
    """
    file, certificate = read_pem(path)
    try:
        extensions = {type(one.value): one.value for one in certificate.extensions}
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise InputError("SS-1812", f"the certificate in {file} is malformed", hint="Look with certs lint.") from None
    names = extensions.get(x509.SubjectAlternativeName, ())
    usage = extensions.get(x509.ExtendedKeyUsage, ())
    basic = extensions.get(x509.BasicConstraints)
    authority = isinstance(basic, x509.BasicConstraints) and basic.ca
    assert isinstance(names, x509.SubjectAlternativeName | tuple)
    assert isinstance(usage, x509.ExtendedKeyUsage | tuple)
    roles = {oid: role for role, oid in USAGE.items()}
    rsa_bits = f"rsa-{key.key_size}" if isinstance(key, rsa.RSAPublicKey) else "other"
    return Said(
        key_type=key_type(key) or rsa_bits,
        not_before=moment_text(certificate.not_valid_before_utc),
        renew_from=moment_text(due_at(certificate)),
        issuer=ascii(certificate.issuer.rfc4514_string())[1:-1],
        hosts=tuple(str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)),
        purposes=tuple(roles.get(oid) or oid.dotted_string for oid in usage),
        words=authority_words(certificate) if authority else None,
    )
