"""Name constraints and paths. Oracle: a second reading of RFC 5280's rule for each kind of name, written for the test alone."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.authority import Authority
from securesplit.pki.constraints import name_constraints, permits
from securesplit.pki.founding import Plan
from securesplit.pki.profile import Scope
from securesplit.pki.trust import Trust
from tests.pki.forge import Leaf, Signer, authority_key, common_name, sign, uri, usage

NOW = datetime.now(UTC)


@pytest.fixture(autouse=True)
def fresh_now():
    """A long test run may reach this file hours after it was imported, and certificates are good from ten minutes ago."""
    global NOW  # noqa: PLW0603  # the tests read it as a constant
    NOW = datetime.now(UTC)


def authority_with(
    constraints: x509.NameConstraints | None, *, depth: int | None = 0, parent: Signer | None = None, days: int = 10
) -> Signer:
    key = ec.generate_private_key(ec.SECP256R1())
    name = common_name(f"authority {x509.random_serial_number()}")
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if parent is None else parent.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=depth), critical=True)
        .add_extension(usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if constraints is not None:
        builder = builder.add_extension(constraints, critical=True)
    if parent is not None:
        builder = builder.add_extension(authority_key(parent.certificate), critical=False)
    return Signer(builder.sign(key if parent is None else parent.key, hashes.SHA256()), key)  # type: ignore[arg-type]


label = st.sampled_from(["a", "b", "aa", "ba"])
host = st.lists(label, min_size=1, max_size=4).map(".".join)


@given(host, host)
@settings(max_examples=200, deadline=None)
def test_dns_suffixes_are_whole_labels(name: str, suffix: str) -> None:
    signer = CACHE.setdefault(suffix, authority_with(name_constraints("x.local", [suffix], [])))
    left, right = name.split("."), suffix.split(".")
    assert permits(signer.certificate, [x509.DNSName(name)]) == (left[-len(right) :] == right)


CACHE: dict[str, Signer] = {}
NETWORK = authority_with(name_constraints("x.local", [], ["10.0.0.0/8", "fe80::/10"]))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_addresses_by_their_first_byte(number: int) -> None:
    address = x509.IPAddress(ipaddress.IPv4Address(number))
    assert permits(NETWORK.certificate, [address]) == (number >> 24 == 10)
    assert not permits(NETWORK.certificate, [x509.IPAddress(ipaddress.IPv6Address(number))])


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("spiffe://x.local/securesplit/client/a", True),
        ("spiffe://X.local/securesplit/client/a", True),
        ("spiffe://y.x.local/securesplit/client/a", False),
        ("spiffe://x.local.evil/securesplit/client/a", False),
        (
            "spiffe://evil@x.local/securesplit/client/a",
            True,
        ),  # The host is x.local; the identity's own rule forbids the rest.
        ("spiffe://x.local@evil/securesplit/client/a", False),
        ("urn:x.local", False),
        ("x.local", False),
    ],
)
def test_uris_by_their_host(name: str, allowed: bool) -> None:
    assert permits(NETWORK.certificate, [uri(name)]) == allowed


def test_a_kind_that_cannot_be_checked_permits_nothing_and_a_kind_not_named_is_free() -> None:
    odd = authority_with(x509.NameConstraints([x509.DirectoryName(common_name("x"))], None))
    assert not permits(odd.certificate, [])
    assert permits(authority_with(None).certificate, [x509.DNSName("any.example")])
    assert permits(authority_with(name_constraints("x.local", [], [])).certificate, [x509.DNSName("any.example")])
    excluding = authority_with(x509.NameConstraints(None, [x509.DNSName("evil.example")]))
    assert not permits(excluding.certificate, [x509.DNSName("a.evil.example")])
    assert permits(excluding.certificate, [x509.DNSName("good.example")])


@pytest.mark.parametrize(
    ("dns", "ips"),
    [([""], []), (["*.example"], []), ([".example"], []), (["A.example"], []), ([], ["10.0.0.1/8"]), ([], ["x"])],
)
def test_constraints_that_are_none_are_refused(tmp_path: Path, dns: list[str], ips: list[str]) -> None:
    with pytest.raises(InputError, match="SS-1808"):
        Authority.create(tmp_path / "keys", plan=Plan(Scope("x.local", tuple(dns), tuple(ips))))
    assert not (tmp_path / "keys/ca").exists()


# --- paths ------------------------------------------------------------------------------------------------------------


def path(leaf: x509.Certificate, *authorities: Signer, now: datetime | None = None) -> int:
    found = Trust.of(tuple(one.certificate for one in authorities)).path(leaf, now or NOW)
    return 0 if found is None else len(found)


def test_depth_constraints_and_dates_hold_on_every_link() -> None:
    root = authority_with(None, depth=1)
    below = authority_with(None, depth=0, parent=root)
    deeper = authority_with(None, depth=0, parent=below)
    leaf, _ = sign(Leaf(), below)
    deep, _ = sign(Leaf(), deeper)
    assert path(leaf, root, below) == 2
    assert path(leaf, root) == 0, "an intermediate that is not pinned"
    assert path(deep, root, below, deeper) == 0, "the path lengths allow no third authority"
    assert path(leaf, root, below, now=NOW + timedelta(days=11)) == 0
    short = authority_with(None, depth=0, parent=root, days=2)
    ended, _ = sign(Leaf(ends=timedelta(days=9)), short)
    assert path(ended, root, short) == 2
    assert path(ended, root, short, now=NOW + timedelta(days=3)) == 0
    narrow = authority_with(name_constraints("other.local", [], []), depth=1)
    wide = authority_with(None, depth=0, parent=narrow)
    outside, _ = sign(Leaf(), wide)
    assert path(outside, narrow, wide) == 0, "the root's constraint holds below an intermediate without one"


def test_a_party_cannot_issue() -> None:
    root = authority_with(None, depth=None)
    alice, key = sign(Leaf(), root)
    forged, _ = sign(Leaf(name="bob"), Signer(alice, key))
    assert path(forged, root) == 0
    with pytest.raises(ConnectionFailed, match="SS-3209"):
        Trust.of((root.certificate, alice))


def test_two_domains_are_not_pinned_together(tmp_path: Path) -> None:
    one, two = Authority.create(tmp_path / "one"), Authority.create(tmp_path / "two", domain="hospital.example")
    pem = b"".join(a.certificate.public_bytes(serialization.Encoding.PEM) for a in (one, two))
    with pytest.raises(ConnectionFailed, match="two trust domains"):
        Trust.parse(pem)
