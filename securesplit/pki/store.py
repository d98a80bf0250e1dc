"""A party's folder on disk: opened only when everything about it is in order.

``K/NAME`` holds ``cert.pem``, ``key.pem``, ``chain.pem`` (what a handshake sends), ``ca.pem`` (the pinned authority) and
``crl.pem``; nothing else is needed to take part. The folder is 0700, the key 0600, both owned by the process's user.

What this does not protect against: root, a backup, or a stolen disk. Keys are not encrypted in this version.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from securesplit.errors import ConnectionFailed
from securesplit.pki.certificate import verify_chain
from securesplit.pki.files import require_private
from securesplit.pki.identity import AUTHORITY_NAME, Identity, Role, identity_of

__all__ = [
    "KeyFolder",
    "read_private_key",
]

_MAX_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class KeyFolder:
    """One party's identity, as it was when the folder was opened.

    Attributes:
        path: the party's folder.
        identity: proven against ``ca.pem`` and the revocation list.
        cert_der: the leaf certificate.
        ca_pem, crl_pem: the pinned authority and its newest known revocation list.
        crl_path: where that list is: the folder's copy, or ``../ca/crl.pem`` when that one is newer.
        not_after: when the leaf expires.
    """

    path: Path
    identity: Identity
    cert_der: bytes = field(repr=False)
    ca_pem: bytes = field(repr=False)
    crl_pem: bytes = field(repr=False)
    crl_path: Path
    not_after: datetime
    _key: ec.EllipticCurvePrivateKey = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path, role: Role, *, now: datetime | None = None) -> KeyFolder:
        """Open and check a folder.

        Args:
            path: a party's folder, or the folder above when exactly one party in it has the role.
            role: what the certificate must be good for.
            now: the time of the check; the current time when absent.

        Raises:
            ConnectionFailed: SS-3100 nothing usable there, SS-3101 others may read the key, SS-3102 unusable key,
                SS-3103 several parties of that role, SS-32xx as :func:`securesplit.pki.certificate.verify_chain`.
        """
        folder = _resolve(Path(path), role)
        require_private(folder)
        require_private(folder / "key.pem")
        cert_der = _certificate(folder / "cert.pem")
        key = read_private_key(folder / "key.pem")
        leaf = x509.load_der_x509_certificate(cert_der)
        if leaf.public_key() != key.public_key():
            raise ConnectionFailed(
                "SS-3102",
                f"{folder}/key.pem is not the key of {folder}/cert.pem",
                hint="The files come from two issues; issue the party anew or restore the pair.",
            )
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
            _key=key,
        )

    @property
    def chain_path(self) -> Path:
        """What a handshake sends: the leaf, then the authority's certificate; PEM."""
        return self.path / "chain.pem"

    @property
    def key_path(self) -> Path:
        """The private key, PKCS #8 PEM."""
        return self.path / "key.pem"

    @property
    def ca_pem_path(self) -> Path:
        """The pinned authority's certificate, PEM."""
        return self.path / "ca.pem"

    def sign(self, data: bytes) -> bytes:
        """Sign with the leaf's key: ECDSA, SHA-256, DER-encoded (r, s).

        ``data`` must say what it is for (a context string) and hold both sides' nonces; the signature itself proves
        neither purpose nor freshness.
        """
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))

    def verify_peer(self, cert_der: bytes, role: Role, *, now: datetime | None = None) -> Identity:
        """Check another party's certificate against this folder's authority and revocation list.

        Raises:
            ConnectionFailed: SS-32xx, as :func:`securesplit.pki.certificate.verify_chain`.
        """
        return verify_chain(cert_der, self.ca_pem, self.crl_pem, role, now or datetime.now(UTC))

    def stamps(self) -> tuple[tuple[str, int, int, int], ...]:
        """What changes when any file that :meth:`open` reads is replaced; cheap enough to ask every second."""
        files = [self.path / name for name in ("cert.pem", "key.pem", "chain.pem", "ca.pem", "crl.pem")]
        files.append(_authority_crl(self.path))
        stamps = []
        for file in files:
            with suppress(OSError):
                found = file.stat()
                stamps.append((str(file), found.st_mtime_ns, found.st_ino, found.st_size))
        return tuple(stamps)


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read an unencrypted P-256 key.

    Raises:
        ConnectionFailed: SS-3100 when it cannot be read, SS-3102 when it is no such key.
    """
    try:
        key = serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConnectionFailed(
            "SS-3102", f"{path} holds no unencrypted P-256 key", hint="Issue the party anew or restore the file."
        )
    return key


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


def _authority_crl(folder: Path) -> Path:
    return folder.parent / AUTHORITY_NAME / "crl.pem"


def _newest_crl(folder: Path, ca_pem: bytes) -> tuple[Path, bytes]:
    own, shared = folder / "crl.pem", _authority_crl(folder)
    own_pem = _read(own)
    try:
        root = x509.load_pem_x509_certificate(ca_pem).public_key()
        newer = x509.load_pem_x509_crl(shared_pem := _read(shared))
        # A list that another authority signed, or that nobody did, must not push a good one aside.
        if not isinstance(root, ec.EllipticCurvePublicKey) or not newer.is_signature_valid(root):
            return own, own_pem
        if newer.last_update_utc > x509.load_pem_x509_crl(own_pem).last_update_utc:
            return shared, shared_pem
    except (ValueError, ConnectionFailed):
        # Whatever is wrong with the party's own copy is reported by the chain check.
        pass
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
