"""A request for a certificate: made on the site, where the key stays, and approved at the authority.

Both sides print the same words for a request (words.py). They are taken from everything that is going to be signed: the
identity, the hosts and the public key. The authority signs only a request whose words somebody confirmed, having heard them
from the site's operator over another channel than the one that brought the file.

What this does not protect against: an operator who confirms words without having heard them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.authority import Authority
from securesplit.pki.certificate import USAGE
from securesplit.pki.files import make_private_folder, require_private, write_atomically
from securesplit.pki.grant import NEXT_KEY, REQUEST, Grant
from securesplit.pki.identity import Identity, identity_of
from securesplit.pki.keys import KeyType, PublicKey, generate_key, key_pem, key_type, load_key
from securesplit.pki.passphrase import Passphrase
from securesplit.pki.profile import Hosts, build_request, host_names
from securesplit.pki.words import same_words, words_of

__all__ = ["Request", "approve", "authority_words", "make_request", "read_request"]

_MOST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Request:
    """What a request asks for.

    Attributes:
        path: the file to carry to the authority; nothing in it is secret.
        identity, hosts: what shall be signed.
        key: the site's public key.
        words: to be read out on both sides.
    """

    path: Path
    identity: Identity
    hosts: Hosts
    key: PublicKey = field(repr=False)
    words: str


def make_request(
    folder: Path,
    identity: Identity,
    hosts: Hosts,
    *,
    kind: KeyType = "p256",
    new_passphrase: bytes | None = None,
    passphrase: Passphrase | None = None,
) -> Request:
    """Make a key in a party's folder and a request for it. The key never leaves the folder.

    Asked again, it makes the same request with the same key, and the same words.

    Args:
        folder: ``K/NAME`` on the site; made with mode 0700 when absent.
        identity, hosts: what to ask for.
        kind: of the key.
        new_passphrase: encrypts a key that is made now; None leaves it in the clear, in a file of mode 0600.
        passphrase: asked when a key that waits already is encrypted.

    Raises:
        InputError: SS-1804 not writable.
        ConnectionFailed: SS-3101 the folder is open to others, SS-3104 and SS-3105 no or a wrong passphrase.
    """
    make_private_folder(folder)
    waiting = folder / NEXT_KEY
    if waiting.exists():
        require_private(waiting)
        key, _ = load_key(waiting.read_bytes(), waiting, passphrase)
    else:
        key = generate_key(kind)
        write_atomically(waiting, key_pem(key, new_passphrase), mode=0o600)
    csr = build_request(key, identity, hosts)
    write_atomically(folder / REQUEST, csr.public_bytes(serialization.Encoding.PEM))
    return Request(folder / REQUEST, identity, hosts, key.public_key(), _words(csr))


def read_request(path: Path) -> Request:
    """Read a request and check that it is well formed and that whoever made it has the key.

    Raises:
        InputError: SS-1817 naming every fault.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES)
        csr = x509.load_pem_x509_csr(data) if data.lstrip().startswith(b"-----") else x509.load_der_x509_csr(data)
        genuine = csr.is_signature_valid
        names = list(csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        extensions = {type(extension.value) for extension in csr.extensions}
        public = csr.public_key()
    except (
        OSError,
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
        x509.InvalidVersion,
    ) as error:
        raise _unusable(path, (f"it cannot be read, or names nobody ({type(error).__name__})",)) from None
    faults = [] if genuine else ["its signature is not by its own key"]
    if not isinstance(public, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) or key_type(public) is None:
        faults.append("its key is neither P-256 nor Ed25519")
    if surplus := extensions - {x509.SubjectAlternativeName, x509.ExtendedKeyUsage}:
        faults.append(f"it asks for more than names: {', '.join(sorted(kind.__name__ for kind in surplus))}")
    identity = _named(names, faults)
    hosts = None if identity is None else _hosts(identity, names, faults)
    if identity is not None and x509.ExtendedKeyUsage in extensions:
        asked = list(csr.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        if asked != [USAGE[identity.role]]:
            faults.append("it asks for another use than its role's")
    if faults or identity is None or hosts is None:
        raise _unusable(path, tuple(faults))
    assert isinstance(public, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey)
    return Request(path, identity, hosts, public, _words(csr))


def approve(
    authority: Authority,
    request: Request,
    confirmed: str | Callable[[Request], bool],
    *,
    days: int | None = None,
    again: bool = False,
    now: datetime | None = None,
) -> Grant:
    """Sign what a request asks for, and nothing else.

    Args:
        authority: of the request's trust domain.
        request: as read here.
        confirmed: the words as the site's operator read them out, or somebody who is asked whether they are the same.
        days: lifetime; the role's own when absent.
        again: give a certificate to a party that has a good one for another key.
        now: the time of issue.

    Raises:
        InputError: SS-1802 another trust domain, SS-1806 bad lifetime, SS-1808 a host outside of the authority's constraints,
            SS-1809 the party has a certificate that is still good, SS-1813 as SS-1809 and with another role, SS-1818 not
            confirmed.
    """
    if request.identity.domain != authority.domain:
        raise InputError(
            "SS-1802",
            f"the request is for the trust domain {request.identity.domain}, and this authority's is {authority.domain}",
            hint="Have the site make it again with --domain.",
        )
    fits = confirmed(request) if callable(confirmed) else same_words(confirmed, request.words)
    if not fits:
        raise InputError(
            "SS-1818",
            "the words of the request were not confirmed, so nothing was signed",
            hint="Ask the site's operator to read the words out; if they differ, the request was exchanged on the way.",
        )
    now = now or datetime.now(UTC)
    with authority.locked() as lists:
        for leaf in authority.issued():
            other = identity_of(leaf.public_bytes(serialization.Encoding.DER))
            gone = now > leaf.not_valid_after_utc or authority.is_withdrawn(leaf, lists)
            if other.name != request.identity.name or gone or leaf.public_key() == request.key:
                continue
            if other.role != request.identity.role:
                raise InputError("SS-1813", f"{other.name} is a {other.role} here", hint="Choose another name.")
            if not again:
                raise InputError(
                    "SS-1809",
                    f"{other.name} has a certificate that is still good, for another key",
                    hint="If the site made a new key on purpose, approve with --again; if its key was lost to others, revoke first.",
                )
        return authority.grant(request.identity, request.key, request.hosts, lists, days=days, now=now)


def authority_words(root: x509.Certificate) -> str:
    """The words of an authority's root, for a site that is about to pin it."""
    return words_of(b"authority", root.public_bytes(serialization.Encoding.DER))


def _words(csr: x509.CertificateSigningRequest) -> str:
    return words_of(b"request", csr.tbs_certrequest_bytes)


def _named(names: list[x509.GeneralName], faults: list[str]) -> Identity | None:
    uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    if len(uris) != 1:
        faults.append(f"it names {len(uris)} URIs where exactly one is allowed")
        return None
    try:
        return Identity.parse(uris[0])
    except ConnectionFailed as error:
        faults.append(error.what)
        return None


def _hosts(identity: Identity, names: list[x509.GeneralName], faults: list[str]) -> Hosts | None:
    others = [name for name in names if not isinstance(name, x509.UniformResourceIdentifier)]
    dns = [name.value for name in others if isinstance(name, x509.DNSName)]
    ips = [str(name.value) for name in others if isinstance(name, x509.IPAddress)]
    if len(dns) + len(ips) != len(others):
        faults.append("it asks for a kind of name that no party has")
    if identity.role == "server" and not others:
        faults.append("a server has to name the hosts or addresses that clients dial")
        return None
    try:
        return host_names(identity.role, dns, ips)
    except InputError as error:
        faults.append(error.what)
        return None


def _unusable(path: Path, faults: tuple[str, ...]) -> InputError:
    return InputError(
        "SS-1817",
        f"{path} is no usable request",
        hint="Have the site make it again with 'securesplit certs request'.",
        details=faults,
    )
