"""The certificate authority: a folder, a key, and the record of what it issued.

``K/ca`` holds ``cert.pem``, ``key.pem``, ``crl.pem`` and ``issued/SERIAL.pem``, a copy of every certificate ever made,
so that a party can be revoked after its folder was handed over and deleted here. Revocations live in ``crl.pem`` only.

What this does not protect against: whoever can read ``K/ca/key.pem`` can be anybody. Keep the folder off the server.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.certificate import Issued, domain_of, serial_text
from securesplit.pki.files import make_private_folder, require_private, write_atomically
from securesplit.pki.identity import AUTHORITY_NAME, DEFAULT_DOMAIN, Identity, Role, identity_of, require_name
from securesplit.pki.profile import (
    AUTHORITY_DAYS,
    LEAF_DAYS,
    MAX_LEAF_DAYS,
    build_crl,
    build_leaf,
    build_root,
    generate_key,
    host_names,
    require_days,
)
from securesplit.pki.store import read_private_key

__all__ = ["Authority", "Issued", "Revoked"]


@dataclass(frozen=True, slots=True)
class Revoked:
    """What a revocation list says now.

    Attributes:
        path: the authority's list.
        serials: the serial numbers that this call put on it; empty when all of them were there before.
        total: how many it holds.
        next_update: after this moment nobody is admitted by it.
        stale: party folders beside the authority whose copy could not be replaced.
    """

    path: Path
    serials: tuple[str, ...]
    total: int
    next_update: datetime
    stale: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Authority:
    """An opened authority. Its operations lock the folder, so that two processes cannot lose a revocation."""

    keys: Path
    domain: str
    certificate: x509.Certificate = field(repr=False)
    _key: ec.EllipticCurvePrivateKey = field(repr=False, compare=False)

    @classmethod
    def create(
        cls,
        keys: str | Path,
        *,
        domain: str = DEFAULT_DOMAIN,
        days: int = AUTHORITY_DAYS,
        now: datetime | None = None,
    ) -> Authority:
        """Make ``keys/ca`` with a new key, a self-signed certificate and an empty revocation list.

        Raises:
            InputError: SS-1802 bad domain, SS-1804 not writable, SS-1805 there is one already, SS-1806 bad lifetime.
        """
        keys = Path(keys)
        folder = keys / AUTHORITY_NAME
        if folder.exists():
            raise InputError(
                "SS-1805",
                f"{folder} exists already, and replacing it would strand every certificate it issued",
                hint="Use another --keys folder, or move the old authority away by hand.",
            )
        require_days(days, 36500)
        now = now or datetime.now(UTC)
        key = generate_key()
        certificate = build_root(key, domain, now, days)
        make_private_folder(folder)
        make_private_folder(folder / "issued")
        write_atomically(folder / "key.pem", _key_pem(key), mode=0o600)
        crl = build_crl(certificate, key, previous=None, revoke=(), now=now)
        write_atomically(folder / "crl.pem", crl.public_bytes(serialization.Encoding.PEM))
        # Last, because a certificate is what marks the authority as complete.
        write_atomically(folder / "cert.pem", _pem(certificate))
        return cls(keys, domain, certificate, key)

    @classmethod
    def open(cls, keys: str | Path) -> Authority:
        """Open ``keys/ca``.

        Raises:
            InputError: SS-1807 when there is none.
            ConnectionFailed: SS-3101 others may use it, SS-3102 no usable key, SS-3209 no usable certificate.
        """
        keys = Path(keys)
        folder = keys / AUTHORITY_NAME
        try:
            certificate = x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())
        except (OSError, ValueError):
            raise InputError(
                "SS-1807", f"there is no certificate authority in {keys}", hint="Run 'securesplit certs init-ca' first."
            ) from None
        require_private(folder)
        require_private(folder / "key.pem")
        key = read_private_key(folder / "key.pem")
        if key.public_key() != certificate.public_key():
            raise ConnectionFailed(
                "SS-3102", f"{folder}/key.pem is not the key of cert.pem", hint="Restore the pair from a backup."
            )
        return cls(keys, domain_of(certificate), certificate, key)

    @property
    def path(self) -> Path:
        """The authority's folder."""
        return self.keys / AUTHORITY_NAME

    def describe(self) -> Issued:
        """The authority's own certificate."""
        return Issued.of(self.path / "cert.pem", self.certificate, f"spiffe://{self.domain}")

    def issue(
        self,
        name: str,
        role: Role,
        *,
        dns: Sequence[str] = (),
        ips: Sequence[str] = (),
        days: int | None = None,
        now: datetime | None = None,
    ) -> Issued:
        """Make a key and a certificate for a party, in ``keys/NAME``.

        Args:
            name: the party's name.
            role: ``client`` or ``server``.
            dns, ips: what clients will dial, for a server; localhost, 127.0.0.1 and ::1 when none is given.
            days: lifetime; 30 for clients and 90 for servers when absent.
            now: the time of issue.

        Raises:
            InputError: SS-1801, SS-1803 bad name or role, SS-1804 not writable, SS-1806 bad lifetime, SS-1808 bad host
                name or address, SS-1809 the party exists and its certificate is still good.
            ConnectionFailed: SS-3101 when the folder exists and is open to others.
        """
        identity = Identity(domain=self.domain, role=role, name=name)
        hosts, addresses = host_names(role, dns, ips)
        days = LEAF_DAYS[role] if days is None else days
        require_days(days, MAX_LEAF_DAYS)
        now = now or datetime.now(UTC)
        if now > self.certificate.not_valid_after_utc:
            raise InputError("SS-1806", "the authority's own certificate has expired", hint="Make a new authority.")
        folder = self.keys / name
        with self._locked():
            crl = self._crl()
            self._require_free(folder, crl, now)
            key = generate_key()
            leaf = build_leaf(
                self.certificate, self._key, key.public_key(), identity, dns=hosts, ips=addresses, now=now, days=days
            )
            make_private_folder(folder)
            # The record comes first: a certificate that exists but cannot be revoked is the worse half of a crash.
            record = self.path / "issued" / f"{serial_text(leaf.serial_number)}.pem"
            write_atomically(record, _pem(leaf))
            write_atomically(folder / "ca.pem", _pem(self.certificate))
            write_atomically(folder / "crl.pem", crl.public_bytes(serialization.Encoding.PEM))
            write_atomically(folder / "key.pem", _key_pem(key), mode=0o600)
            write_atomically(folder / "chain.pem", _pem(leaf) + _pem(self.certificate))
            write_atomically(folder / "cert.pem", _pem(leaf))
        return Issued.of(folder / "cert.pem", leaf, identity.uri)

    def revoke(self, name: str, *, now: datetime | None = None) -> Revoked:
        """Withdraw every certificate that was ever issued to a name, and publish a new list.

        Repeating it is harmless. The list reaches ``keys/ca/crl.pem`` and every party folder beside it; parties on
        other machines need their copy carried to them.

        Raises:
            InputError: SS-1801 bad name, SS-1810 when nothing was issued to it, SS-1811 when the list is lost.
        """
        require_name(name)
        with self._locked():
            serials = [leaf.serial_number for leaf in self._issued() if _name_of(leaf) == name]
            if not serials:
                raise InputError(
                    "SS-1810", f"this authority never issued a certificate to {name!r}", hint="Check the name."
                )
            return self._publish(serials, now or datetime.now(UTC))

    def write_crl(self, *, now: datetime | None = None) -> Revoked:
        """Publish the same revocations in a fresh list, good for another 7 days.

        Raises:
            InputError: SS-1811 when the current list is lost.
        """
        with self._locked():
            return self._publish([], now or datetime.now(UTC))

    def _publish(self, serials: Sequence[int], now: datetime) -> Revoked:
        previous = self._crl()
        known = {entry.serial_number for entry in previous}
        crl = build_crl(self.certificate, self._key, previous=previous, revoke=serials, now=now)
        pem = crl.public_bytes(serialization.Encoding.PEM)
        write_atomically(self.path / "crl.pem", pem)
        stale = []
        for folder in self._party_folders():
            try:
                write_atomically(folder / "crl.pem", pem)
            except InputError:
                # The revocation stands; one folder that is read-only must not keep the others from learning of it.
                stale.append(folder)
        added = tuple(serial_text(serial) for serial in serials if serial not in known)
        assert crl.next_update_utc is not None
        return Revoked(self.path / "crl.pem", added, len(crl), crl.next_update_utc, tuple(stale))

    def _party_folders(self) -> list[Path]:
        own = _pem(self.certificate)
        found = []
        for folder in sorted(self.keys.iterdir()):
            # A folder that pins another authority, or none, is not ours to write to.
            with suppress(OSError):
                if folder != self.path and (folder / "ca.pem").read_bytes() == own:
                    found.append(folder)
        return found

    def _crl(self) -> x509.CertificateRevocationList:
        path = self.path / "crl.pem"
        try:
            crl = x509.load_pem_x509_crl(path.read_bytes())
            key = self._key.public_key()
            if crl.issuer == self.certificate.subject and crl.is_signature_valid(key):
                return crl
        except (OSError, ValueError):
            pass
        raise InputError(
            "SS-1811",
            f"{path} is missing or not this authority's, and a new one would forget every revocation",
            hint="Restore it from a backup or from the crl.pem of any party.",
        )

    def _issued(self) -> Iterator[x509.Certificate]:
        for path in sorted((self.path / "issued").glob("*.pem")):
            yield x509.load_pem_x509_certificate(path.read_bytes())

    @staticmethod
    def _require_free(folder: Path, crl: x509.CertificateRevocationList, now: datetime) -> None:
        try:
            present = x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())
        except (OSError, ValueError):
            return
        revoked = crl.get_revoked_certificate_by_serial_number(present.serial_number) is not None
        if not revoked and now <= present.not_valid_after_utc:
            raise InputError(
                "SS-1809",
                f"{folder} already holds a certificate that is still good",
                hint=f"Revoke it first ('securesplit certs revoke {folder.name}') or choose another name.",
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _name_of(leaf: x509.Certificate) -> str:
    return identity_of(leaf.public_bytes(serialization.Encoding.DER)).name


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
