"""Certificates and revocation lists that this package would never make, with the authority's true signature on them.

Written on `cryptography` alone: no line of securesplit/ runs here, so a fault there cannot hide itself. Each flaw comes as
a whole key folder of right modes, or, for the lists, as bytes; :func:`context` presents a folder without asking the product.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Role = Literal["client", "server"]
Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

DOMAIN = "securesplit.local"
PURPOSE = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}
OTHER: dict[Role, Role] = {"client": "server", "server": "client"}
LOCAL: tuple[x509.GeneralName, ...] = (
    x509.DNSName("localhost"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    x509.IPAddress(ipaddress.ip_address("::1")),
)


@dataclass(frozen=True, slots=True)
class Signer:
    """Who signs: a certificate and its key."""

    certificate: x509.Certificate
    key: Key

    @classmethod
    def of(cls, keys: Path) -> Signer:
        """The authority in ``keys/ca`` (root or, where there is one, whatever ca/cert.pem and ca/key.pem are)."""
        certificate = x509.load_pem_x509_certificate((keys / "ca/cert.pem").read_bytes())
        key = serialization.load_pem_private_key((keys / "ca/key.pem").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey)
        return cls(certificate, key)

    @classmethod
    def stranger(cls, *, like: x509.Certificate | None = None) -> Signer:
        """Another authority; with ``like`` it bears that one's name and key identifier."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = common_name("another authority") if like is None else like.subject
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        if like is not None:
            identifier = like.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=100))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage(authority=True), critical=True)
            .add_extension(x509.SubjectAlternativeName([uri(f"spiffe://{DOMAIN}")]), critical=False)
            .add_extension(identifier, critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a leaf says; the defaults are a good client's. Change a field and it is forged."""

    role: Role = "client"
    name: str = "alice"
    names: tuple[x509.GeneralName, ...] | None = None  # None: the identity, and for a server localhost
    purposes: tuple[x509.ObjectIdentifier, ...] | None = None  # None: the role's own
    begins: timedelta = timedelta(minutes=-10)
    ends: timedelta = timedelta(days=1)
    key: Callable[[], Key] = lambda: ec.generate_private_key(ec.SECP256R1())
    ca: bool = False
    key_usage: bool = True
    serial: int | None = None

    def san(self) -> tuple[x509.GeneralName, ...]:
        """The subject alternative names that it will have."""
        if self.names is not None:
            return self.names
        own = uri(f"spiffe://{DOMAIN}/securesplit/{self.role}/{self.name}")
        return (own, *LOCAL) if self.role == "server" else (own,)


@dataclass(frozen=True, slots=True)
class Forged:
    """A forged party: its folder (cert, key, chain, ca and crl .pem, modes right) and its certificate."""

    folder: Path
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def serial(self) -> str:
        text = f"{self.certificate.serial_number:X}"
        return text if len(text) % 2 == 0 else "0" + text


def sign(leaf: Leaf, signer: Signer, *, now: datetime | None = None) -> tuple[x509.Certificate, Key]:
    """Make the certificate that ``leaf`` describes."""
    now = now or datetime.now(UTC)
    key = leaf.key()
    public = key.public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(common_name(leaf.name))
        .issuer_name(signer.certificate.subject)
        .public_key(public)
        .serial_number(leaf.serial or x509.random_serial_number())
        .not_valid_before(now + leaf.begins)
        .not_valid_after(now + leaf.ends)
        .add_extension(x509.BasicConstraints(ca=leaf.ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(authority_key(signer.certificate), critical=False)
    )
    if leaf.key_usage:
        builder = builder.add_extension(usage(authority=leaf.ca), critical=True)
    purposes = (PURPOSE[leaf.role],) if leaf.purposes is None else leaf.purposes
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    if leaf.san():
        builder = builder.add_extension(x509.SubjectAlternativeName(leaf.san()), critical=False)
    return builder.sign(signer.key, _digest(signer.key)), key


def write(folder: Path, leaf: Leaf, signer: Signer, keys: Path, *, now: datetime | None = None) -> Forged:
    """Sign ``leaf`` and lay out its key folder; ``ca.pem`` and ``crl.pem`` are the true ones of ``keys/ca``.

    Where ``keys/ca/trust.pem`` exists (an intermediate, or a rotation), it becomes ``ca.pem``.
    """
    certificate, key = sign(leaf, signer, now=now)
    folder.mkdir(mode=0o700)
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    trust = keys / "ca/trust.pem"
    files = {
        "cert.pem": pem,
        "key.pem": key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        "chain.pem": pem + signer.certificate.public_bytes(serialization.Encoding.PEM),
        "ca.pem": (trust if trust.exists() else keys / "ca/cert.pem").read_bytes(),
        "crl.pem": (keys / "ca/crl.pem").read_bytes(),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600 if name == "key.pem" else 0o644)
    return Forged(folder, certificate)


# By name: what is wrong. The first has no flaw: without it, no refusal of the others would prove anything.
FLAWS: dict[str, Callable[[Leaf], Leaf]] = {
    "none": lambda leaf: leaf,
    "ed25519": lambda leaf: replace(leaf, key=ed25519.Ed25519PrivateKey.generate),  # good, too
    "wrong-ca": lambda leaf: leaf,
    "impostor-ca": lambda leaf: leaf,
    "wrong-eku": lambda leaf: replace(leaf, purposes=(PURPOSE[OTHER[leaf.role]],)),
    "both-ekus": lambda leaf: replace(leaf, purposes=tuple(PURPOSE.values())),
    "no-eku": lambda leaf: replace(leaf, purposes=()),
    "any-eku": lambda leaf: replace(leaf, purposes=(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)),
    # Purpose right for the connection, role in the URI that of the other side.
    "wrong-role": lambda leaf: replace(leaf, names=_as_role(leaf, OTHER[leaf.role])),
    "expired": lambda leaf: replace(leaf, begins=timedelta(days=-2), ends=timedelta(seconds=-5)),
    "not-yet-valid": lambda leaf: replace(leaf, begins=timedelta(hours=2)),
    "cn-only": lambda leaf: replace(leaf, names=()),
    "two-uris": lambda leaf: replace(
        leaf, names=(*leaf.san(), uri("spiffe://securesplit.local/securesplit/client/bob"))
    ),
    "foreign-uri": lambda leaf: replace(leaf, names=(uri("https://example.org/alice"), *leaf.san()[1:])),
    "other-domain": lambda leaf: replace(
        leaf, names=(uri(f"spiffe://evil.local/securesplit/{leaf.role}/{leaf.name}"), *leaf.san()[1:])
    ),
    "unknown-identity": lambda leaf: replace(leaf, name="mallory"),
    "rsa-1024": lambda leaf: replace(leaf, key=lambda: rsa.generate_private_key(65537, 1024)),
    "rsa-3072": lambda leaf: replace(leaf, key=lambda: rsa.generate_private_key(65537, 3072)),
    "p-384": lambda leaf: replace(leaf, key=lambda: ec.generate_private_key(ec.SECP384R1())),
    "is-ca": lambda leaf: replace(leaf, ca=True),
    "no-key-usage": lambda leaf: replace(leaf, key_usage=False),
    "long-life": lambda leaf: replace(leaf, ends=timedelta(days=3000)),
    # Servers: the host.
    "ip-only": lambda leaf: replace(leaf, names=(leaf.san()[0], LOCAL[1])),
    "dns-only": lambda leaf: replace(leaf, names=(leaf.san()[0], LOCAL[0])),
    "other-host": lambda leaf: replace(leaf, names=(leaf.san()[0], x509.DNSName("gpu.example"))),
    "other-ip": lambda leaf: replace(leaf, names=(leaf.san()[0], x509.IPAddress(ipaddress.ip_address("10.9.8.7")))),
    "no-host": lambda leaf: replace(leaf, names=(leaf.san()[0],)),
}


def forge(keys: Path, flaw: str, *, role: Role = "client", name: str | None = None, at: Path | None = None) -> Forged:
    """A party with one flaw, by name (see ``FLAWS``).

    Args:
        keys: holds the true authority, ``keys/ca``, unencrypted key.
        flaw: a key of ``FLAWS``.
        role: of the identity; ``alice`` is the default client, ``gpu`` the default server.
        name: of the identity.
        at: the folder to make; ``keys/../forged-ROLE-FLAW`` when absent, so that ``keys`` stays as it was.
    """
    signer = Signer.of(keys)
    if flaw == "wrong-ca":
        signer = Signer.stranger()
    elif flaw == "impostor-ca":
        signer = Signer.stranger(like=signer.certificate)
    leaf = Leaf(role=role, name=name or ("alice" if role == "client" else "gpu"))
    folder = at or keys.parent / f"forged-{role}-{flaw}"
    return write(folder, FLAWS[flaw](leaf), signer, keys)


CrlKind = Literal["good", "missing", "empty", "garbage", "expired", "future", "foreign", "impostor"]


def crl(keys: Path, kind: CrlKind, *, revoked: tuple[int, ...] = (), now: datetime | None = None) -> bytes | None:
    """A revocation list for ``crl.pem``; None for "missing": delete the file.

    ``good`` is signed by the true authority, ``expired`` and ``future`` too; ``foreign`` is another authority's, and
    ``impostor`` another's that bears the true one's name.
    """
    now = now or datetime.now(UTC)
    if kind in {"missing", "empty", "garbage"}:
        return {"missing": None, "empty": b"", "garbage": b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"}[
            kind
        ]
    signer = Signer.of(keys)
    if kind == "foreign":
        signer = Signer.stranger()
    elif kind == "impostor":
        signer = Signer.stranger(like=signer.certificate)
    begins, ends = {
        "expired": (timedelta(days=-8), timedelta(seconds=-5)),
        "future": (timedelta(hours=2), timedelta(days=7)),
    }.get(kind, (timedelta(seconds=-1), timedelta(days=7)))
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.certificate.subject)
        .last_update(now + begins)
        .next_update(now + ends)
        .add_extension(x509.CRLNumber(1000), critical=False)
        .add_extension(authority_key(signer.certificate), critical=False)
    )
    for serial in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(signer.key, _digest(signer.key)).public_bytes(serialization.Encoding.PEM)


def put_crl(folder: Path, keys: Path, kind: CrlKind, **more: object) -> None:
    """Put such a list into a party's folder (and into ``keys/ca`` when ``folder`` is that)."""
    data = crl(keys, kind, **more)  # type: ignore[arg-type]
    if data is None:
        (folder / "crl.pem").unlink(missing_ok=True)
    else:
        (folder / "crl.pem").write_bytes(data)


def context(
    folder: Path | None, role: Role, ca: Path, *, newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> ssl.SSLContext:
    """A TLS context without a line of the product: presents ``folder`` (None: no certificate), trusts ``ca``.

    Checks neither revocation nor host names: a peer with no manners. ``newest=TLSv1_2`` is the TLS 1.2 row.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if role == "client" else ssl.PROTOCOL_TLS_SERVER)
    made.check_hostname = False
    # So that OpenSSL itself sends RSA-1024; a hostile peer would do the same.
    made.set_ciphers("ALL:@SECLEVEL=0")
    made.maximum_version = newest
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(cafile=ca)
    if folder is not None:
        made.load_cert_chain(folder / "chain.pem", folder / "key.pem")
    return made


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def authority_key(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False)


def _as_role(leaf: Leaf, role: Role) -> tuple[x509.GeneralName, ...]:
    return (uri(f"spiffe://{DOMAIN}/securesplit/{role}/{leaf.name}"), *leaf.san()[1:])


def _digest(key: Key) -> hashes.SHA256 | None:
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
