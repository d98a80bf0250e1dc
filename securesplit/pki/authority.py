"""The certificate authority: a folder, a key, and the record of what it issued.

``K/ca`` holds ``cert.pem``, ``key.pem``, ``crl.pem`` and ``issued/SERIAL.pem``, a copy of every certificate ever made,
so that a party can be revoked after its folder was handed over and deleted here. Revocations live in ``crl.pem`` only.
founding.py says what else may lie there.

What this does not protect against: whoever can read ``K/ca/key.pem``, and its passphrase if it has one, can be anybody of
the trust domain. Keep the folder off the server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.certificate import Issued, serial_text
from securesplit.pki.constraints import permits
from securesplit.pki.files import make_private_folder, require_private, write_atomically
from securesplit.pki.founding import (
    Plan,
    certificate_pem,
    found,
    locked_folder,
    open_signer,
    promote,
    retired_folders,
    trust_of,
    write_authority,
)
from securesplit.pki.grant import NEXT_KEY, Grant
from securesplit.pki.identity import AUTHORITY_NAME, DEFAULT_DOMAIN, Identity, Role, name_of, require_name
from securesplit.pki.keys import KeyType, PrivateKey, PublicKey, generate_key, key_pem
from securesplit.pki.passphrase import Passphrase
from securesplit.pki.profile import (
    AUTHORITY_DAYS,
    LEAF_DAYS,
    MAX_LEAF_DAYS,
    Hosts,
    Scope,
    Signer,
    build_leaf,
    host_names,
    require_days,
)
from securesplit.pki.publish import Revoked, publish, read_lists, spread, with_retired
from securesplit.pki.revocation import Lists, is_revoked
from securesplit.pki.trust import Trust, domain_of

__all__ = ["Authority", "Issued", "Revoked"]


@dataclass(frozen=True, slots=True)
class Authority:
    """An opened authority. Its operations lock the folder, so that two processes cannot lose a revocation.

    Attributes:
        keys: the folder above ``ca/``.
        domain: its trust domain.
        certificate: of whoever signs parties: the root, or the intermediate.
        trust: everything that parties pin.
    """

    keys: Path
    domain: str
    certificate: x509.Certificate = field(repr=False)
    trust: Trust = field(repr=False)
    _key: PrivateKey = field(repr=False, compare=False)
    _retired: tuple[Signer, ...] = field(repr=False, compare=False)

    @classmethod
    def create(
        cls,
        keys: str | Path,
        *,
        domain: str = DEFAULT_DOMAIN,
        days: int = AUTHORITY_DAYS,
        now: datetime | None = None,
        plan: Plan | None = None,
        root_at: Path | None = None,
    ) -> Authority:
        """Make ``keys/ca``: a key, a certificate and an empty revocation list, and what else the plan says.

        Args:
            keys: the folder above.
            domain, days: in place of a plan: a root that signs parties itself, with a P-256 key in the clear.
            now: the time of issue.
            plan: anything else.
            root_at: with an intermediate, where the root's key goes; ``keys/ca/root`` when absent.

        Raises:
            InputError: SS-1802 bad domain, SS-1804 not writable, SS-1805 there is one already, SS-1806 bad lifetime, SS-1808
                bad DNS suffix or address range.
        """
        keys, now = Path(keys), now or datetime.now(UTC)
        plan = plan or Plan(Scope(domain), days)
        write_authority(keys, keys / AUTHORITY_NAME, found(plan, now), plan, now, root_at)
        secret = plan.passphrase
        return cls.open(keys, passphrase=None if secret is None else lambda: secret)

    @classmethod
    def open(cls, keys: str | Path, *, passphrase: Passphrase | None = None) -> Authority:
        """Open ``keys/ca``; an exchange that was interrupted is completed first.

        Args:
            keys: the folder above.
            passphrase: asked when the key is encrypted.

        Raises:
            InputError: SS-1807 when there is none.
            ConnectionFailed: SS-3101 others may use it, SS-3102 no usable key, SS-3104 and SS-3105 no or a wrong
                passphrase, SS-3209 no usable certificate.
        """
        keys = Path(keys)
        folder = keys / AUTHORITY_NAME
        if not (folder / "cert.pem").is_file():
            raise InputError(
                "SS-1807", f"there is no certificate authority in {keys}", hint="Run 'securesplit certs init-ca' first."
            )
        require_private(folder)
        with locked_folder(folder):
            exchanged = promote(folder)
            signer = open_signer(folder, passphrase)
            trust = Trust.parse(trust_of(folder))
            retired = tuple(open_signer(path, passphrase) for path in retired_folders(folder))
        domain = domain_of(signer.certificate)
        if domain is None or signer.certificate not in trust.authorities:
            raise ConnectionFailed(
                "SS-3209", f"{folder} holds no single authority with a trust domain", hint="Restore it from a backup."
            )
        counted = tuple(one for one in retired if one.certificate in trust.authorities)
        opened = cls(keys, domain, signer.certificate, trust, signer.key, counted)
        if exchanged:
            with opened.locked() as lists:
                spread(keys, trust, lists)
        return opened

    @property
    def path(self) -> Path:
        """The authority's folder."""
        return self.keys / AUTHORITY_NAME

    @property
    def signer(self) -> Signer:
        """Who signs parties now."""
        return Signer(self.certificate, self._key)

    @property
    def signers(self) -> tuple[Signer, ...]:
        """Who signs parties now, and whoever did before, while that still counts."""
        return (self.signer, *self._retired)

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
        key_type: KeyType = "p256",
        passphrase: bytes | None = None,
    ) -> Issued:
        """Make a key and a certificate for a party, in ``keys/NAME``.

        Args:
            name: the party's name.
            role: ``client`` or ``server``.
            dns, ips: what clients will dial, for a server; localhost, 127.0.0.1 and ::1 when none is given.
            days: lifetime; 30 for clients and 90 for servers when absent.
            now: the time of issue.
            key_type: of the party's key.
            passphrase: encrypts it; None leaves it in the clear, in a file of mode 0600.

        Raises:
            InputError: SS-1801, SS-1803 bad name or role, SS-1804 not writable, SS-1806 bad lifetime, SS-1808 bad host
                name or address, SS-1809 the party exists and its certificate is still good.
            ConnectionFailed: SS-3101 when the folder exists and is open to others.
        """
        identity = Identity(domain=self.domain, role=role, name=name)
        hosts = host_names(role, dns, ips)
        now, days = now or datetime.now(UTC), LEAF_DAYS[role] if days is None else days
        require_days(days, MAX_LEAF_DAYS)
        folder = self.keys / name
        with self.locked() as lists:
            self._require_free(folder, lists, now)
            key = generate_key(key_type)
            # The key comes before the record, so that a folder without a certificate tells of an issue that was killed.
            make_private_folder(folder)
            write_atomically(folder / NEXT_KEY, key_pem(key, passphrase), mode=0o600)
            grant = self.grant(identity, key.public_key(), hosts, lists, days=days, now=now)
            path = grant.install(folder, next_key=True)
        return Issued.of(path, grant.leaf, identity.uri)

    def grant(
        self, identity: Identity, key: PublicKey, hosts: Hosts, lists: Lists, *, days: int | None, now: datetime
    ) -> Grant:
        """Sign a certificate and record it; for callers inside :meth:`locked`.

        Raises:
            InputError: SS-1804 not writable, SS-1806 bad lifetime, SS-1808 a host outside of the authority's constraints.
        """
        days = LEAF_DAYS[identity.role] if days is None else days
        require_days(days, MAX_LEAF_DAYS)
        if now > self.certificate.not_valid_after_utc:
            raise InputError("SS-1806", "the authority's own certificate has expired", hint="Make a new authority.")
        leaf = build_leaf(self.signer, key, identity, hosts, now=now, days=days)
        path = self.trust.path(leaf, max(now, *(one.not_valid_before_utc for one in self.trust.authorities)))
        if path is None:
            narrow = not all(permits(one, hosts.names()) for one in self.trust.authorities)
            raise InputError(
                "SS-1808" if narrow else "SS-1806",
                "the authority's name constraints forbid one of these hosts" if narrow else "the authority has expired",
                hint="Name hosts that it may speak for, or exchange it with 'securesplit certs rotate-ca'.",
            )
        # The record comes first: a certificate that exists but cannot be revoked is the worse half of a crash.
        write_atomically(self.path / "issued" / f"{serial_text(leaf.serial_number)}.pem", certificate_pem(leaf))
        return Grant(leaf, path, self.trust, lists, self._cross())

    def revoke(self, name: str, *, now: datetime | None = None) -> Revoked:
        """Withdraw every certificate that was ever issued to a name, and publish a new list.

        Repeating it is harmless. The list reaches ``keys/ca/crl.pem`` and every party folder beside it; parties on
        other machines need their copy carried to them.

        Raises:
            InputError: SS-1801 bad name, SS-1810 when nothing was issued to it, SS-1811 when the list is lost.
        """
        require_name(name)
        with self.locked() as lists:
            withdrawn = [leaf for leaf in self.issued() if name_of(leaf) == name]
            if not withdrawn:
                raise InputError(
                    "SS-1810", f"this authority never issued a certificate to {name!r}", hint="Check the name."
                )
            return publish(self.keys, self.signers, self.trust, lists, withdrawn, now or datetime.now(UTC))

    def write_crl(self, *, now: datetime | None = None, root: Signer | None = None) -> Revoked:
        """Publish the same revocations in a fresh list, good for another 7 days.

        Args:
            now: the time of issue.
            root: above an intermediate, the opened root, to publish its list anew, too; that one is good for a year.

        Raises:
            InputError: SS-1811 when the current list is lost, SS-1821 when ``root`` is not this authority's.
        """
        with self.locked() as lists:
            return publish(self.keys, self.signers, self.trust, lists, [], now or datetime.now(UTC), root=root)

    def is_withdrawn(self, leaf: x509.Certificate, lists: Lists) -> bool:
        """Whether a certificate is revoked, by this authority or by a predecessor whose list counts no more."""
        return is_revoked(leaf, with_retired(self.path, lists))

    def issued(self) -> Iterator[x509.Certificate]:
        """Every certificate that was ever made here, the last one last."""
        for path in sorted((self.path / "issued").glob("*.pem"), key=lambda path: (path.stat().st_mtime_ns, path)):
            yield x509.load_pem_x509_certificate(path.read_bytes())

    @contextmanager
    def locked(self) -> Iterator[Lists]:
        """Nobody else changes the authority meanwhile. Gives its lists, one for every pinned authority.

        Raises:
            InputError: SS-1811 a list is missing or not its authority's, SS-1820 the authority was exchanged since it was opened.
        """
        with locked_folder(self.path):
            current = certificate_pem(self.certificate) == (self.path / "cert.pem").read_bytes()
            if (self.path / "next").exists() or not current or trust_of(self.path) != self.trust.pem():
                raise InputError("SS-1820", "the authority was exchanged meanwhile", hint="Run the command again.")
            yield read_lists(self.path, self.trust)

    def _cross(self) -> tuple[x509.Certificate, ...]:
        with suppress(OSError, ValueError):
            return tuple(x509.load_pem_x509_certificates((self.path / "cross.pem").read_bytes()))
        return ()

    def _require_free(self, folder: Path, lists: Lists, now: datetime) -> None:
        try:
            present = x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())
        except (OSError, ValueError):
            return
        if not self.is_withdrawn(present, lists) and now <= present.not_valid_after_utc:
            raise InputError(
                "SS-1809",
                f"{folder} already holds a certificate that is still good",
                hint=f"Renew it ('securesplit certs renew {folder.name}'), revoke it first, or choose another name.",
            )
