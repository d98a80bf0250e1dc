"""A party's audit log, from its key folder: ``K/NAME/audit``. Whoever serves or trains opens it before anything else.

The journal itself knows no certificates; this file tells it whose key signs and whose signatures count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from cryptography.x509 import load_pem_x509_certificate

from securesplit.errors import ConnectionFailed, InputError
from securesplit.journal.log import Journal
from securesplit.journal.seal import Signer
from securesplit.pki.certificate import verify_signature
from securesplit.pki.identity import identity_of, read_certificate
from securesplit.pki.past import PastAuthority
from securesplit.pki.store import KeyFolder

__all__ = ["AUDIT", "known_to", "open_journal", "parties", "pinned", "signer_of"]

AUDIT = "audit"
"""The log's folder inside a key folder."""
_PROCESSES = 256


def open_journal(
    folder: KeyFolder, *, path: Path | None = None, shared: bool = False, clock: Callable[[], int] = time.time_ns
) -> Journal:
    """Open a party's log, or begin it.

    Args:
        folder: the party's keys.
        path: the log's folder; ``audit`` beside the keys when absent.
        shared: where another process has the log, take ``audit.2`` beside it, ``audit.3`` and so on: a client may have
            several processes at once, and each has a log of its own.
        clock: nanoseconds since 1970.

    Raises:
        CheckFailed: SS-1580, SS-1581, SS-1582 when it was altered, cut, or is not this party's; SS-1585 when it cannot be
            written. Nothing may be served or sent then.
        InputError: SS-1586 when another process has it.
    """
    place, signer = path or folder.path / AUDIT, signer_of(folder)
    for number in range(2, _PROCESSES + 1 if shared else 2):
        try:
            return Journal.open(place, signer, party=folder.identity.uri, clock=clock)
        except InputError as error:
            if error.code != "SS-1586":
                raise
            place = place.with_name(f"{AUDIT}.{number}")
    return Journal.open(place, signer, party=folder.identity.uri, clock=clock)


def signer_of(folder: KeyFolder) -> Signer:
    """A key folder as what signs a log; again after a renewal, for :meth:`Journal.rekey`.

    Rows that older certificates of the same key began are the party's own, whatever became of the authority that issued
    them: a renewal keeps the key, and a retired authority vouches for nothing any more.
    """
    own = read_certificate(folder.cert_der).public_bytes(Encoding.PEM)
    trust = pinned((own,), known_to(folder.ca_pem, folder.crl_pem))
    return Signer(folder.cert_der, folder.sign, verify_signature, trust)


def known_to(
    ca_pem: bytes, crl_pem: bytes, *, otherwise: Callable[[bytes, int], str] | None = None
) -> Callable[[bytes, int], str]:
    """Whose a certificate was at a time of the past, by an authority's files: for journals and those who check them.

    A revocation counts from its date: what a party logged before its key was lost stays true. Who stole the key can write
    earlier dates; the other ends' logs tell.

    Args:
        ca_pem, crl_pem: the authority's certificates and revocation lists.
        otherwise: asked where this authority does not vouch for a certificate.

    Raises, when called: ConnectionFailed: SS-32xx. InputError: SS-1621 when the authority's files are unusable.
    """

    def owner(certificate: bytes, at: int) -> str:
        moment = datetime.fromtimestamp(at / 1e9, UTC)
        try:
            role = identity_of(certificate).role
            return PastAuthority.parse(ca_pem, crl_pem).verify(certificate, role, at=moment, vouched=True).uri
        except ConnectionFailed:
            if otherwise is None:
                raise
            return otherwise(certificate, at)

    return owner


def pinned(
    pem_files: Sequence[bytes], otherwise: Callable[[bytes, int], str] | None = None
) -> Callable[[bytes, int], str]:
    """Whose a certificate is, where its very key is known: for who checks a log far away from its authority.

    Args:
        pem_files: certificates or public keys, PEM.
        otherwise: asked about certificates of other keys; they are refused when absent.

    Raises:
        InputError: SS-1588 for a file that is neither. When called: ConnectionFailed: SS-3202.
    """
    known = {_public(pem) for pem in pem_files}

    def owner(certificate: bytes, at: int) -> str:
        if _raw(read_certificate(certificate).public_key()) in known:
            return identity_of(certificate).uri
        if otherwise is None:
            raise ConnectionFailed(
                "SS-3202", "its key is none of those that were named", hint="Name the authority with --ca as well."
            )
        return otherwise(certificate, at)

    return owner


def parties(pem_files: Sequence[bytes]) -> frozenset[str]:
    """Whose the certificates among these files say that they are; nothing is verified.

    Raises:
        ConnectionFailed: SS-3201, SS-3208 for a certificate without an identity.
    """
    found = (load_pem_x509_certificate(pem) for pem in pem_files if b"BEGIN CERTIFICATE" in pem)
    return frozenset(identity_of(certificate.public_bytes(Encoding.DER)).uri for certificate in found)


def _public(pem: bytes) -> bytes:
    try:
        if b"BEGIN CERTIFICATE" in pem:
            return _raw(load_pem_x509_certificate(pem).public_key())
        return _raw(load_pem_public_key(pem))
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(
            "SS-1588",
            "a file that was named as a key holds neither a certificate nor a public key",
            hint="PEM is expected.",
        ) from None


def _raw(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
