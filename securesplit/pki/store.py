"""A party's folder on disk: opened only when everything about it is in order.

``K/NAME`` holds ``cert.pem``, ``key.pem``, ``chain.pem`` (what a handshake sends), ``ca.pem`` (the pinned authorities) and
``crl.pem``; nothing else is needed to take part. The folder is 0700, the key 0600, both owned by the process's user.

A renewal may have been killed between two files (grant.py). So the certificate is the first of ``chain.pem`` where that one has
the identity of ``cert.pem``, and the key is whichever of ``key.pem`` and ``key.next.pem`` fits it.

What this does not protect against: root, and with a key in the clear a backup or a stolen disk. An encrypted key is
decrypted into this process's memory for as long as it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from securesplit.errors import ConnectionFailed
from securesplit.pki.certificate import verify_chain
from securesplit.pki.files import require_private
from securesplit.pki.grant import NEXT_KEY
from securesplit.pki.identity import AUTHORITY_NAME, Identity, Role, identity_of
from securesplit.pki.keys import PrivateKey, load_key, sign_bytes
from securesplit.pki.passphrase import Passphrase
from securesplit.pki.revocation import Lists
from securesplit.pki.trust import Trust

__all__ = ["KeyFolder", "leaf_of", "open_pair"]

_MAX_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class KeyFolder:
    """One party's identity, as it was when the folder was opened.

    Attributes:
        path: the party's folder.
        identity: proven against ``ca.pem`` and the revocation list.
        cert_der: the leaf certificate.
        ca_pem, crl_pem: the pinned authorities and their newest known revocation lists.
        crl_path: where those are: the folder's copy, or ``../ca/crl.pem`` when that one is newer.
        not_after: when the leaf expires.
        key_path: the private key that fits the leaf, PKCS #8 PEM.
    """

    path: Path
    identity: Identity
    cert_der: bytes = field(repr=False)
    ca_pem: bytes = field(repr=False)
    crl_pem: bytes = field(repr=False)
    crl_path: Path
    not_after: datetime
    key_path: Path
    _key: PrivateKey = field(repr=False, compare=False)
    _secret: bytes | None = field(repr=False, compare=False)

    @classmethod
    def open(
        cls, path: str | Path, role: Role, *, now: datetime | None = None, passphrase: Passphrase | None = None
    ) -> KeyFolder:
        """Open and check a folder.

        Args:
            path: a party's folder, or the folder above when exactly one party in it has the role.
            role: what the certificate must be good for.
            now: the time of the check; the current time when absent.
            passphrase: asked when the key is encrypted.

        Raises:
            ConnectionFailed: SS-3100 nothing usable there, SS-3101 others may read the key, SS-3102 unusable key,
                SS-3103 several parties of that role, SS-3104 and SS-3105 no or a wrong passphrase, SS-32xx as
                :func:`securesplit.pki.certificate.verify_chain`.
        """
        folder = _resolve(Path(path), role)
        require_private(folder)
        require_private(folder / "key.pem" if (folder / "key.pem").exists() else folder / NEXT_KEY)
        cert_der = leaf_of(folder)
        leaf = x509.load_der_x509_certificate(cert_der)
        key_path, key, secret = open_pair(folder, leaf, passphrase)
        ca_pem = _read(folder / "ca.pem")
        crl_path, crl_pem = _newest_crl(folder, ca_pem)
        now = now or datetime.now(UTC)
        whose = f"the certificate {folder}/cert.pem"
        identity = verify_chain(cert_der, ca_pem, crl_pem, role, now, whose=whose)
        return cls(
            path=folder,
            identity=identity,
            cert_der=cert_der,
            ca_pem=ca_pem,
            crl_pem=crl_pem,
            crl_path=crl_path,
            not_after=leaf.not_valid_after_utc,
            key_path=key_path,
            _key=key,
            _secret=secret,
        )

    def reopen(self, *, now: datetime | None = None) -> KeyFolder:
        """The same folder as its files are now; the passphrase is remembered. Raises as :meth:`open`."""
        return KeyFolder.open(self.path, self.identity.role, now=now, passphrase=self._remembered())

    @property
    def password(self) -> Callable[[], bytes]:
        """What ``ssl.SSLContext.load_cert_chain`` needs as its ``password``, encrypted or not.

        Always pass it: without one, OpenSSL would ask the terminal for the passphrase of an encrypted key, and wait.
        """
        return lambda: self._secret or b""

    @property
    def chain_path(self) -> Path:
        """What a handshake sends: the leaf, then its authorities' certificates; PEM."""
        return self.path / "chain.pem"

    @property
    def ca_pem_path(self) -> Path:
        """The pinned authorities' certificates, PEM."""
        return self.path / "ca.pem"

    def _remembered(self) -> Passphrase | None:
        secret = self._secret
        return None if secret is None else lambda: secret

    def sign(self, data: bytes) -> bytes:
        """Sign with the leaf's key: ECDSA, SHA-256, DER-encoded (r, s), or 64 bytes of Ed25519.

        ``data`` must say what it is for (a context string) and hold both sides' nonces; the signature itself proves
        neither purpose nor freshness.
        """
        return sign_bytes(self._key, data)

    def verify_peer(self, cert_der: bytes, role: Role, *, now: datetime | None = None) -> Identity:
        """Check another party's certificate against this folder's authorities, revocation lists and trust domain.

        Raises:
            ConnectionFailed: SS-32xx, as :func:`securesplit.pki.certificate.verify_chain`.
        """
        now, domain = now or datetime.now(UTC), self.identity.domain
        return verify_chain(cert_der, self.ca_pem, self.crl_pem, role, now, domain=domain)

    def stamps(self) -> tuple[tuple[str, int, int, int], ...]:
        """What changes when any file that :meth:`open` reads is replaced; cheap enough to ask every second."""
        files = [self.path / name for name in ("cert.pem", "key.pem", NEXT_KEY, "chain.pem", "ca.pem", "crl.pem")]
        files.append(_authority_crl(self.path))
        stamps = []
        for file in files:
            with suppress(OSError):
                found = file.stat()
                stamps.append((str(file), found.st_mtime_ns, found.st_ino, found.st_size))
        return tuple(stamps)


def open_pair(
    folder: Path, leaf: x509.Certificate, passphrase: Passphrase | None
) -> tuple[Path, PrivateKey, bytes | None]:
    """The private key of a certificate out of a party's folder, where it lies, and the passphrase that opened it.

    Raises:
        ConnectionFailed: SS-3100 no key can be read, SS-3101 others may read it, SS-3102 no key that fits, SS-3104 and
            SS-3105 no or a wrong passphrase, SS-3215 a key of another kind.
    """
    fault: ConnectionFailed | None = None
    for path in (folder / "key.pem", folder / NEXT_KEY):
        if not path.exists():
            continue
        require_private(path)
        try:
            key, secret = load_key(_read(path), path, passphrase)
        except ConnectionFailed as error:
            fault = fault or error
            continue
        if key.public_key() == leaf.public_key():
            return path, key, secret
    raise fault or ConnectionFailed(
        "SS-3102",
        f"{folder}/key.pem is not the key of {folder}/cert.pem",
        hint="The files come from two issues; issue the party anew or restore the pair.",
    )


def _resolve(path: Path, role: Role) -> Path:
    if (path / "cert.pem").is_file():
        if path.resolve().name == AUTHORITY_NAME:
            raise _missing(f"{path} is the authority's folder, not a party's")
        return path
    found = _parties(path)
    fitting = [name for name, identity in found if identity.role == role]
    if len(fitting) == 1:
        return path / fitting[0]
    if fitting:
        raise ConnectionFailed(
            "SS-3103",
            f"{path} holds {len(fitting)} parties of the role {role!r}: {', '.join(fitting)}",
            hint=f"Name one of them, for example --keys {path}/{fitting[0]}",
        )
    others = ", ".join(f"{name} ({identity.role})" for name, identity in found)
    raise _missing(f"{path} holds no certificate of a {role}" + (f"; only {others}" if others else ""))


def _parties(path: Path) -> list[tuple[str, Identity]]:
    try:
        names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    except OSError:
        raise _missing(f"{path} is not a folder that can be read") from None
    found = []
    for name in names:
        if name != AUTHORITY_NAME and (path / name / "cert.pem").is_file():
            with suppress(ConnectionFailed):
                found.append((name, identity_of(_certificate(path / name / "cert.pem"))))
    return found


def _certificate(path: Path) -> bytes:
    try:
        return x509.load_pem_x509_certificate(_read(path)).public_bytes(serialization.Encoding.DER)
    except ValueError:
        raise _missing(f"{path} holds no certificate") from None


def leaf_of(folder: Path) -> bytes:
    """The certificate that a folder stands for, DER; see the head of this file. Raises ConnectionFailed SS-3100."""
    plain = _certificate(folder / "cert.pem")
    with suppress(ConnectionFailed):
        sent = _certificate(folder / "chain.pem")
        if sent != plain and identity_of(sent) == identity_of(plain):
            return sent
    return plain


def _authority_crl(folder: Path) -> Path:
    return folder.parent / AUTHORITY_NAME / "crl.pem"


def _newest_crl(folder: Path, ca_pem: bytes) -> tuple[Path, bytes]:
    own, shared = folder / "crl.pem", _authority_crl(folder)
    own_pem = _read(own)
    try:
        trust, ours, shared_pem = Trust.parse(ca_pem), Lists.parse(own_pem), _read(shared)
        theirs = Lists.parse(shared_pem)
        ages = [(theirs.of(one), ours.of(one)) for one in trust.authorities]
    except ConnectionFailed:
        # Whatever is wrong with the party's own copy is reported by the chain check.
        return own, own_pem
    # Lists that another authority signed, or that nobody did, must not push good ones aside; nor may one list more
    # be paid for with an older one of another authority.
    if any(new is None or (old is not None and new.last_update_utc < old.last_update_utc) for new, old in ages):
        return own, own_pem
    if any(new is not None and (old is None or new.last_update_utc > old.last_update_utc) for new, old in ages):
        return shared, shared_pem
    return own, own_pem


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise _missing(f"{path} is larger than any such file")
        return path.read_bytes()
    except OSError as error:
        raise _missing(f"{path} cannot be read ({type(error).__name__})") from None


def _missing(what: str) -> ConnectionFailed:
    return ConnectionFailed(
        "SS-3100",
        f"no usable identity: {what}",
        hint="Make one with 'securesplit certs issue NAME --role client|server --keys K' and pass --keys K/NAME.",
    )
