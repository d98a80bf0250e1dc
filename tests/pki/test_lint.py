"""Lint: each forged flaw has its finding, several flaws have several, and what is issued here has none."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError
from securesplit.pki.authority import Authority
from securesplit.pki.findings import findings_of
from securesplit.pki.founding import Plan
from securesplit.pki.lint import lint
from securesplit.pki.profile import Scope
from tests.pki.forge import FLAWS, Leaf, Signer, forge, put_crl, sign, uri

NOW = datetime.now(UTC)


@pytest.fixture(autouse=True)
def fresh_now():
    """A long test run may reach this file hours after it was imported, and certificates are good from ten minutes ago."""
    global NOW  # noqa: PLW0603  # the tests read it as a constant
    NOW = datetime.now(UTC)


RULES = {
    "wrong-eku": {"wrong-eku"},
    "both-ekus": {"both-ekus"},
    "no-eku": {"no-eku"},
    "any-eku": {"any-eku", "wrong-eku"},
    "wrong-role": {"wrong-eku"},
    "expired": {"expired"},
    "not-yet-valid": {"not-yet-valid"},
    "cn-only": {"no-san"},
    "two-uris": {"uri"},
    "foreign-uri": {"uri"},
    "rsa-1024": {"key-size", "key-type"},
    "rsa-3072": {"key-type"},
    "p-384": {"key-type"},
    "is-ca": {"key-usage"},
    "no-key-usage": {"no-key-usage"},
    "long-life": {"life"},
    "no-host": {"no-host"},
}


def rules(path: Path, severity: str = "error", now: datetime | None = None) -> set[str]:
    return {one.finding.rule for one in lint(path, now or datetime.now(UTC)) if one.finding.severity == severity}


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("flaw", sorted(FLAWS))
def test_each_flaw_has_its_finding(authority: Authority, keys: Path, flaw: str, role: str) -> None:
    forged = forge(keys, flaw, role=role)  # type: ignore[arg-type]
    wanted = set(RULES.get(flaw, set()))
    if role == "client":
        wanted -= {"no-host"}
        if flaw == "wrong-role":
            wanted |= {"no-host"}  # Its identity is a server's, and it has no host.
    assert rules(forged.folder / "cert.pem") == wanted
    # In its folder, whatever verification refuses shows too, but what only other things refuse does not.
    folder = rules(forged.folder)
    assert folder >= wanted
    accepted = {
        "none",
        "ed25519",
        "unknown-identity",
        "no-key-usage",
        "long-life",
        "ip-only",
        "dns-only",
        "other-host",
        "other-ip",
    }
    assert ("verify" in folder) == (
        flaw
        not in accepted
        | {"expired", "not-yet-valid", "cn-only", "two-uris", "foreign-uri"}
        | ({"no-host"} if role == "client" else set())
    )


def test_what_is_issued_here_has_no_finding(keys: Path, tmp_path: Path) -> None:
    for name, plan in (
        ("clear", Plan(Scope("securesplit.local"))),
        ("safe", Plan(Scope("securesplit.local"), passphrase=b"a long passphrase", intermediate=True)),
    ):
        authority = Authority.create(
            tmp_path / name, plan=plan, root_at=tmp_path / "safe-root" if name == "safe" else None
        )
        authority.issue("gpu", "server")
        authority.issue("alice", "client", key_type="ed25519", passphrase=b"a long passphrase")
        assert rules(tmp_path / name) == set()
        assert rules(tmp_path / name, "warning") == ({"clear-key"} if name == "clear" else set())


def test_every_fault_at_once(authority: Authority, keys: Path) -> None:
    bad = Leaf(
        names=(uri("https://x.example/"), uri("https://y.example/"), x509.DNSName("*.example")),
        purposes=(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE, ExtendedKeyUsageOID.CODE_SIGNING),
        key=lambda: rsa.generate_private_key(65537, 1024), begins=timedelta(days=-900), ends=timedelta(days=-1), key_usage=False, serial=7,
    )  # fmt: skip
    certificate, _ = sign(bad, Signer.of(keys))
    found = {one.rule for one in findings_of(certificate, NOW)}
    assert found >= {
        "uri",
        "wildcard",
        "any-eku",
        "other-eku",
        "key-size",
        "key-type",
        "expired",
        "no-key-usage",
        "life",
        "serial",
    }


def test_a_folder_s_surroundings(authority: Authority, keys: Path, tmp_path: Path) -> None:
    alice = keys / "alice"
    (alice / "key.pem").chmod(0o644)
    alice.chmod(0o755)
    put_crl(alice, keys, "foreign")
    shutil.copy(keys / "gpu/chain.pem", alice / "chain.pem")
    (alice / "key.pem").write_bytes((keys / "gpu/key.pem").read_bytes())
    assert rules(alice) == {"mode", "list", "chain", "key", "verify"}
    assert sum(one.finding.rule == "mode" for one in lint(alice, NOW)) == 2
    (keys / "gpu/key.pem").write_bytes(b"junk")
    (keys / "gpu/ca.pem").write_bytes(b"")
    assert rules(keys / "gpu") == {"key", "SS-3209", "verify"}
    assert rules(keys) >= {"mode", "list", "chain", "key", "verify"}
    (keys / "gpu/chain.pem").unlink()
    (keys / "gpu/key.pem").unlink()
    assert "missing" in rules(keys / "gpu")
    assert "no-key" in rules(keys / "gpu", "warning")
    for nothing in (tmp_path / "none", keys / "ca/issued", keys / "alice/key.pem"):
        with pytest.raises(InputError, match="SS-1812"):
            lint(nothing, NOW)


def test_what_becomes_due_is_a_warning_and_what_is_over_an_error(authority: Authority, keys: Path) -> None:
    authority.revoke("gpu")
    assert rules(keys / "gpu") == {"verify"}
    later = NOW + timedelta(days=5)
    assert rules(keys / "alice", now=later) == set()
    assert rules(keys / "alice", "warning", now=later) == {"list"}
    assert rules(keys / "alice", "warning", now=NOW + timedelta(days=21)) == {"renew"}
    assert rules(keys / "alice", now=NOW + timedelta(days=31)) == {"expired", "list"}
    assert rules(keys / "ca", now=NOW + timedelta(days=8)) == {"list"}


def test_an_authority_from_outside(tmp_path: Path) -> None:
    stranger = Signer.stranger()
    found = {(one.severity, one.rule) for one in findings_of(stranger.certificate, NOW)}
    assert found == {("warning", "name-constraints")}


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_malformed_certificate_has_findings_and_raises_nothing(
    authority: Authority, keys: Path, place: int, change: int
) -> None:
    der = bytearray(
        (x509.load_pem_x509_certificate((keys / "alice/cert.pem").read_bytes())).public_bytes(
            serialization.Encoding.DER
        )
    )
    der[place % len(der)] ^= change
    try:
        certificate = x509.load_der_x509_certificate(bytes(der))
    except (ValueError, x509.InvalidVersion):
        return
    findings_of(certificate, NOW)
