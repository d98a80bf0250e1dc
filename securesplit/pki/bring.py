"""Taking in what an authority signed for this site's own key: ours, or one from outside.

Everything is checked before a file changes: that the certificate is for the key that lies here, that it names the party that
asked, that it has a path to an authority which this site pins, that lists of all of them came along, and that it is not on one.

An authority is pinned the first time somebody confirms its words or its fingerprint. Later ones are taken on the old one's word
(a certificate of the new root's key by the old root), or again by confirmation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.certificate import Issued, fingerprint, verify_chain
from securesplit.pki.files import require_private
from securesplit.pki.grant import NEXT_KEY, REQUEST, Grant, Parcel
from securesplit.pki.identity import Identity, identity_of, require_name
from securesplit.pki.keys import PublicKey, load_key
from securesplit.pki.passphrase import Passphrase
from securesplit.pki.request import authority_words, read_request
from securesplit.pki.revocation import Lists
from securesplit.pki.trust import Trust, issued
from securesplit.pki.words import same_words

__all__ = ["Brought", "Newcomer", "bring_in", "confirmed_by"]


@dataclass(frozen=True, slots=True)
class Newcomer:
    """An authority that this site does not pin yet.

    Attributes:
        words, fingerprint: of its root, to be compared with its operator.
    """

    words: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Brought:
    """What was taken in.

    Attributes:
        issued: the certificate, at its place.
        new_key: whether ``key.pem`` is another file now than before. A privacy ledger then needs `securesplit privacy adopt`.
        words: of the root that the certificate leads to.
        pinned: fingerprints of the authorities that this site pins now.
    """

    issued: Issued
    new_key: bool
    words: str
    pinned: tuple[str, ...]


Confirm = Callable[[Newcomer], bool]


def confirmed_by(said: str) -> Confirm:
    """Somebody who was told an authority's words, or its SHA-256 fingerprint in hex, on the command line."""
    plain = said.replace(":", "").strip().lower()
    return lambda newcomer: same_words(said, newcomer.words) or plain == newcomer.fingerprint


def bring_in(
    folder: Path,
    parcel: Parcel,
    confirm: Confirm,
    now: datetime,
    *,
    passphrase: Passphrase | None = None,
) -> Brought:
    """Take a certificate into the folder of the party whose request it answers.

    Args:
        folder: ``K/NAME`` with the key that the request was made with, or with the key in use.
        parcel: certificates and lists, in any order.
        confirm: asked about every root that nobody vouches for.
        now: the time of the check.
        passphrase: asked when the key is encrypted.

    Raises:
        InputError: SS-1801 bad name, SS-1804 not writable, SS-1819 an authority that nobody confirmed, SS-1822 no
            certificate for this key and identity.
        ConnectionFailed: SS-3100 no key here, SS-3101 others may read it, SS-3104 and SS-3105 no or a wrong passphrase, SS-32xx
            as :func:`securesplit.pki.certificate.verify_chain`.
    """
    require_name(folder.name)
    ours = _keys(folder, passphrase)
    leaf, file = _ours(parcel.certificates, ours, folder)
    der = leaf.public_bytes(serialization.Encoding.DER)
    identity = identity_of(der)
    _require_asked_for(folder, identity, file)
    trust, cross = _trust(folder, parcel, confirm, now)
    lists = _lists(folder, parcel, trust)
    whose = "the certificate to import"
    verify_chain(der, trust.pem(), lists.pem(), identity.role, now, whose=whose, domain=identity.domain)
    path = trust.path(leaf, now)
    assert path is not None
    grant = Grant(leaf, path, trust, lists, cross)
    replaced = file == NEXT_KEY
    placed = grant.install(folder, next_key=replaced)
    if replaced:
        (folder / REQUEST).unlink(missing_ok=True)
    return Brought(
        issued=Issued.of(placed, leaf, identity.uri),
        new_key=replaced,
        words=authority_words(path[-1]),
        pinned=tuple(fingerprint(one) for one in trust.authorities),
    )


def _keys(folder: Path, passphrase: Passphrase | None) -> list[tuple[str, PublicKey]]:
    require_private(folder)
    found = []
    for name in (NEXT_KEY, "key.pem"):
        path = folder / name
        if path.exists():
            require_private(path)
            found.append((name, load_key(path.read_bytes(), path, passphrase)[0].public_key()))
    if not found:
        raise ConnectionFailed(
            "SS-3100",
            f"no usable identity: {folder} holds no key",
            hint="Make one with 'securesplit certs request', on this site.",
        )
    return found


def _ours(
    certificates: Sequence[x509.Certificate], keys: Sequence[tuple[str, PublicKey]], folder: Path
) -> tuple[x509.Certificate, str]:
    fitting = [
        (leaf, name)
        for name, key in keys
        for leaf in certificates
        if leaf.public_key() == key and not issued(leaf, leaf)
    ]
    if not fitting:
        raise InputError(
            "SS-1822",
            f"none of the {len(certificates)} certificates is for a key in {folder}",
            hint="Import what the authority signed for this site's request; a certificate for another key is of no use here.",
        )
    return max(fitting, key=lambda one: one[0].not_valid_before_utc)


def _require_asked_for(folder: Path, identity: Identity, file: str) -> None:
    """The certificate must name the party of the request, or, for the key in use, of the certificate in use."""
    wanted: Identity | None = None
    if file == NEXT_KEY and (folder / REQUEST).exists():
        wanted = read_request(folder / REQUEST).identity
    elif (folder / "cert.pem").exists():
        present = x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())
        wanted = identity_of(present.public_bytes(serialization.Encoding.DER))
    faults = []
    if identity.name != folder.name:
        faults.append(f"it names {identity.name!r}, and the folder is {folder.name!r}")
    if wanted is not None and identity != wanted:
        faults.append(f"it is for {identity.uri}, and {wanted.uri} was asked for")
    if faults:
        raise InputError(
            "SS-1822",
            "the certificate is for this site's key, but not for its identity",
            hint="Have the authority sign the request as it is.",
            details=tuple(faults),
        )


def _trust(folder: Path, parcel: Parcel, confirm: Confirm, now: datetime) -> tuple[Trust, tuple[x509.Certificate, ...]]:
    pinned = Trust.parse((folder / "ca.pem").read_bytes()) if (folder / "ca.pem").exists() else None
    authorities = [one for one in parcel.certificates if _is_authority(one)]
    roots = [one for one in authorities if issued(one, one)]
    # A cross certificate has a root's name and key, and another root's signature.
    cross = tuple(one for one in authorities if one not in roots and any(_same_party(one, root) for root in roots))
    own = [one for one in authorities if one not in cross]
    if pinned is not None and not roots:
        own = list(dict.fromkeys((*own, *pinned.authorities)))
    trust = Trust.of(tuple(own))
    for root in trust.roots:
        known = pinned is not None and root in pinned.roots
        vouched = pinned is not None and any(
            _same_party(one, root) and one.not_valid_before_utc <= now <= one.not_valid_after_utc and issued(one, old)
            for one in cross
            for old in pinned.roots
        )
        newcomer = Newcomer(authority_words(root), fingerprint(root))
        if not (known or vouched or confirm(newcomer)):
            raise InputError(
                "SS-1819",
                f"the authority with the words {newcomer.words} is not pinned here, and nobody confirmed it",
                hint="Compare these words, or the fingerprint, with its operator; then import with --authority and them.",
                details=(f"fingerprint {newcomer.fingerprint}",),
            )
    return trust, cross


def _lists(folder: Path, parcel: Parcel, trust: Trust) -> Lists:
    present: tuple[x509.CertificateRevocationList, ...] = ()
    if (folder / "crl.pem").exists():
        try:
            present = Lists.parse((folder / "crl.pem").read_bytes()).lists
        except ConnectionFailed:
            present = ()
    found = Lists(parcel.lists).joined(present, trust.authorities)
    if not found.lists:
        raise ConnectionFailed(
            "SS-3206",
            "no revocation list of these authorities came along, so nobody could be admitted",
            hint="Import the authority's list in the same command; an authority that publishes none cannot be used.",
        )
    return found


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return False


def _same_party(left: x509.Certificate, right: x509.Certificate) -> bool:
    return left.subject == right.subject and left.public_key() == right.public_key()
