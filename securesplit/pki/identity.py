"""Who a certificate speaks for: one URI, ``spiffe://<domain>/securesplit/<role>/<name>``, and nothing else.

The common name is cosmetic and DNS names only tell a client that it reached the right host. Authorisation goes by this
URI alone. An identity is believed only after the chain was verified (securesplit/pki/certificate.py or a TLS
handshake); parsing proves nothing.

Source: the X.509-SVID specification, which asks for exactly one URI in the subject alternative name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from securesplit.errors import ConnectionFailed, InputError

__all__ = [
    "AUTHORITY_NAME",
    "DEFAULT_DOMAIN",
    "Identity",
    "Role",
    "identity_of",
    "name_of",
    "read_certificate",
    "require_domain",
    "require_name",
]

Role = Literal["client", "server"]

DEFAULT_DOMAIN = "securesplit.local"
AUTHORITY_NAME = "ca"

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DOMAIN = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_URI = re.compile(r"spiffe://([^/?#@:%\s]+)/securesplit/(client|server)/([^/?#@:%\s]+)")


def require_name(name: str) -> None:
    """Accept a party's name: lower-case letters, digits and hyphens, at most 63 of them.

    Raises:
        InputError: SS-1801 for any other name, and for ``ca``, whose folder is the authority's own.
    """
    if not _NAME.fullmatch(name) or name == AUTHORITY_NAME:
        raise InputError(
            "SS-1801",
            f"{name[:80]!r} cannot name a party",
            hint="Use 1 to 63 lower-case letters, digits and hyphens, starting with a letter or digit; 'ca' is taken.",
        )


def require_domain(domain: str) -> None:
    """Accept a trust domain: a lower-case DNS name, which nobody has to own or resolve.

    Raises:
        InputError: SS-1802 for anything else.
    """
    if not _DOMAIN.fullmatch(domain):
        raise InputError(
            "SS-1802",
            f"{domain[:80]!r} cannot be a trust domain",
            hint="Use a lower-case DNS name such as securesplit.local or hospital.example.",
        )


@dataclass(frozen=True, slots=True)
class Identity:
    """One party.

    Attributes:
        domain: the trust domain; one authority serves exactly one.
        role: ``client`` or ``server``; a certificate is good for one of them.
        name: unique inside the domain and the role.

    Raises:
        InputError: SS-1801, SS-1802 when a part is malformed, so that an illegal identity cannot be built.
    """

    domain: str
    role: Role
    name: str

    def __post_init__(self) -> None:
        require_domain(self.domain)
        require_name(self.name)
        if self.role not in {"client", "server"}:
            raise InputError("SS-1803", f"{self.role[:80]!r} is not a role", hint="Use client or server.")

    @property
    def uri(self) -> str:
        """The identity as it stands in the certificate."""
        return f"spiffe://{self.domain}/securesplit/{self.role}/{self.name}"

    @classmethod
    def parse(cls, uri: str) -> Identity:
        """Read the URI back; the inverse of :attr:`uri`, with no second spelling accepted.

        Raises:
            ConnectionFailed: SS-3201 when it is not such a URI.
        """
        match = _URI.fullmatch(uri)
        if match is None:
            raise _malformed("its URI name is not of the form spiffe://<domain>/securesplit/<role>/<name>")
        try:
            return cls(domain=match[1], role=cast("Role", match[2]), name=match[3])
        except InputError as error:
            raise _malformed(error.what) from None


def read_certificate(cert_der: bytes) -> x509.Certificate:
    """Parse a certificate; nothing about it is checked.

    Raises:
        ConnectionFailed: SS-3208 when the bytes are no certificate.
    """
    try:
        return x509.load_der_x509_certificate(cert_der)
    except (ValueError, x509.InvalidVersion):
        raise ConnectionFailed(
            "SS-3208", "the bytes given as a certificate are none", hint="The file or the peer is broken; issue anew."
        ) from None


def identity_of(cert_der: bytes) -> Identity:
    """The identity that a certificate claims.

    Args:
        cert_der: the certificate, DER.

    Does not protect against: a forged certificate. Verify the chain as well.

    Raises:
        ConnectionFailed: SS-3201 when there is not exactly one well-formed URI in the subject alternative name;
            SS-3208 when the bytes are no certificate.
    """
    try:
        names = read_certificate(cert_der).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise _malformed("it has no subject alternative name") from None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise _malformed("its extensions cannot be read") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise _malformed(f"it names {len(uris)} URIs where exactly one is allowed")
    return Identity.parse(uris[0])


def name_of(certificate: x509.Certificate) -> str:
    """The name in a certificate's identity. Raises as :func:`identity_of`."""
    return identity_of(certificate.public_bytes(serialization.Encoding.DER)).name


def _malformed(why: str) -> ConnectionFailed:
    return ConnectionFailed(
        "SS-3201",
        f"the certificate names no SecureSplit party: {why}",
        hint="Use a certificate made by 'securesplit certs issue'; the authority's own one identifies nobody.",
    )
