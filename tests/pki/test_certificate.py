from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from securesplit.errors import ConnectionFailed
from securesplit.pki.authority import Authority
from securesplit.pki.certificate import verify_chain, verify_signature
from securesplit.pki.store import KeyFolder

ALICE = "spiffe://securesplit.local/securesplit/client/alice"
NOW = datetime.now(UTC)


@pytest.fixture(autouse=True)
def fresh_now():
    """A long test run may reach this file hours after it was imported, and certificates are good from ten minutes ago."""
    global NOW  # noqa: PLW0603  # the tests read it as a constant
    NOW = datetime.now(UTC)


def forged(
    authority: Authority,
    names: list[x509.GeneralName] | None,
    *,
    usages: tuple[x509.ObjectIdentifier, ...] = (ExtendedKeyUsageOID.CLIENT_AUTH,),
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey | None = None,
    ca: bool = False,
    key_usage: bool = True,
) -> bytes:
    """A certificate with the authority's true signature and a profile that this package would never issue."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    root = authority.certificate
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "alice")]))
        .issuer_name(root.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(minutes=5))
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False)  # type: ignore[arg-type]
    )
    if key_usage:
        usage = x509.KeyUsage(True, False, False, False, False, ca, ca, False, False)
        builder = builder.add_extension(usage, critical=True)
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(authority._key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def check(authority: Authority, leaf: bytes, role: str = "client", now: datetime | None = None) -> str:
    ca_pem = (authority.path / "cert.pem").read_bytes()
    crl_pem = (authority.path / "crl.pem").read_bytes()
    return verify_chain(leaf, ca_pem, crl_pem, role, now or NOW).uri  # type: ignore[arg-type]


def code(authority: Authority, leaf: bytes, role: str = "client", now: datetime | None = None) -> str:
    with pytest.raises(ConnectionFailed) as caught:
        check(authority, leaf, role, now)
    assert caught.value.hint
    return caught.value.code


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


def test_a_good_chain_names_its_party(authority: Authority, keys: Path) -> None:
    assert check(authority, KeyFolder.open(keys, "client").cert_der) == ALICE
    assert check(authority, KeyFolder.open(keys, "server").cert_der, "server").endswith("/server/gpu")
    # The forger's own profile, once without a flaw: otherwise the refusals below would prove nothing.
    assert check(authority, forged(authority, [uri(ALICE)])) == ALICE


def test_identities_that_are_not_exactly_one(authority: Authority) -> None:
    assert code(authority, forged(authority, [uri(ALICE), uri(ALICE.replace("alice", "bob"))])) == "SS-3201"
    assert code(authority, forged(authority, [uri(ALICE), uri("https://example.org/")])) == "SS-3201"
    assert code(authority, forged(authority, [uri("https://example.org/")])) == "SS-3201"
    assert code(authority, forged(authority, [x509.DNSName("alice")])) == "SS-3201"
    assert code(authority, forged(authority, None)) == "SS-3201", "a common name identifies nobody"
    assert code(authority, (authority.certificate).public_bytes(serialization.Encoding.DER)) == "SS-3201"


def test_roles_and_purposes_must_agree(authority: Authority) -> None:
    both = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
    for usages in ((), both, both[1:], (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)):
        assert code(authority, forged(authority, [uri(ALICE)], usages=usages)) == "SS-3210"
    assert code(authority, forged(authority, [uri(ALICE)]), "server") == "SS-3210"
    server = "spiffe://securesplit.local/securesplit/server/gpu"
    assert code(authority, forged(authority, [uri(server)], usages=both[:1])) == "SS-3210"
    assert code(authority, forged(authority, [uri(server)], usages=both[1:]), "server") == "SS-3202", "no host name"


def test_a_foreign_domain_under_our_own_authority(authority: Authority) -> None:
    assert code(authority, forged(authority, [uri(ALICE.replace("securesplit.local", "evil.local"))])) == "SS-3211"


def test_a_party_that_claims_to_be_an_authority(authority: Authority) -> None:
    assert code(authority, forged(authority, [uri(ALICE)], ca=True)) == "SS-3202"


def test_the_chain(authority: Authority, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other")
    assert code(authority, forged(other, [uri(ALICE)])) == "SS-3202"
    # The same name and identifiers in the issuer field, another key's signature.
    good = x509.load_der_x509_certificate(forged(authority, [uri(ALICE)]))
    builder = x509.CertificateBuilder(
        good.issuer, good.subject, good.public_key(), good.serial_number, good.not_valid_before_utc, good.not_valid_after_utc,
        list(good.extensions),
    )  # fmt: skip
    fake = builder.sign(other._key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    assert code(authority, fake) == "SS-3202"


def test_dates_and_lists(authority: Authority) -> None:
    leaf = forged(authority, [uri(ALICE)])
    assert code(authority, leaf, now=NOW + timedelta(days=2)) == "SS-3203"
    assert code(authority, leaf, now=NOW - timedelta(days=1)) == "SS-3204"
    ca_pem = (authority.path / "cert.pem").read_bytes()
    for crl in (b"", b"junk", ca_pem):
        with pytest.raises(ConnectionFailed, match="SS-3206"):
            verify_chain(leaf, ca_pem, crl, "client", NOW)
    for roots in (b"", b"junk", ca_pem + ca_pem):
        with pytest.raises(ConnectionFailed, match="SS-3209"):
            verify_chain(leaf, roots, (authority.path / "crl.pem").read_bytes(), "client", NOW)


# A flipped bit can make the serial number negative, of which the library warns before we refuse it.
@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_no_changed_bit_of_the_signed_part_survives_and_none_raises_anything_else(
    authority: Authority, keys: Path
) -> None:
    alice = KeyFolder.open(keys, "client")
    signature = alice.sign(b"data")
    ca_pem, crl_pem = alice.ca_pem, alice.crl_pem
    signed = x509.load_der_x509_certificate(alice.cert_der).tbs_certificate_bytes
    for place in range(8 * len(alice.cert_der)):
        leaf = bytearray(alice.cert_der)
        leaf[place // 8] ^= 1 << place % 8
        try:
            verify_chain(bytes(leaf), ca_pem, crl_pem, "client", NOW)
        except ConnectionFailed:
            pass
        else:
            # The count of unused bits in front of the signature is not covered by it.
            assert x509.load_der_x509_certificate(bytes(leaf)).tbs_certificate_bytes == signed
        # Only the key counts here; what matters is that a hostile certificate raises nothing of another kind.
        with suppress(ConnectionFailed):
            verify_signature(bytes(leaf), signature, b"data")
    for length in range(len(alice.cert_der)):
        with pytest.raises(ConnectionFailed):
            verify_chain(alice.cert_der[:length], ca_pem, crl_pem, "client", NOW)


@given(st.binary(max_size=80))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_that_are_no_signature(authority: Authority, data: bytes) -> None:
    with pytest.raises(ConnectionFailed, match="SS-3207"):
        verify_signature((authority.certificate).public_bytes(serialization.Encoding.DER), data, b"data")


def test_signatures(authority: Authority, keys: Path) -> None:
    alice, gpu = KeyFolder.open(keys, "client"), KeyFolder.open(keys, "server")
    signature = alice.sign(b"data")
    verify_signature(alice.cert_der, signature, b"data")
    for leaf, signed, data in (
        (alice.cert_der, signature, b"Data"),
        (gpu.cert_der, signature, b"data"),
        (alice.cert_der, b"", b"data"),
        (alice.cert_der, signature[:-1], b"data"),
        (alice.cert_der, bytes(72), b"data"),
    ):
        with pytest.raises(ConnectionFailed, match="SS-3207"):
            verify_signature(leaf, signed, data)
    for bad in (b"", b"junk"):
        with pytest.raises(ConnectionFailed, match="SS-3208"):
            verify_signature(bad, signature, b"data")
    for odd in (rsa.generate_private_key(65537, 3072), ec.generate_private_key(ec.SECP384R1())):
        with pytest.raises(ConnectionFailed, match="SS-3215"):
            verify_signature(forged(authority, [uri(ALICE)], key=odd), signature, b"data")
    key = ed25519.Ed25519PrivateKey.generate()
    edwards = forged(authority, [uri(ALICE)], key=key)
    verify_signature(edwards, key.sign(b"data"), b"data")
    for bad in (signature, key.sign(b"Data"), b"", bytes(64)):
        with pytest.raises(ConnectionFailed, match="SS-3207"):
            verify_signature(edwards, bad, b"data")
