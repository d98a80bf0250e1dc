"""Renewal: when, for whom, with which key; and that a privacy ledger does not take it for another client."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from securesplit.errors import ConnectionFailed, InputError, PolicyDenied
from securesplit.pki.authority import Authority
from securesplit.pki.bring import bring_in
from securesplit.pki.grant import read_parcel
from securesplit.pki.renew import due_at, renew, renew_all
from securesplit.pki.rotate import begin_rotation, finish_rotation
from securesplit.pki.status import standings
from securesplit.pki.store import KeyFolder
from securesplit.privacy.ledger import Ledger
from tests.pki.oracle import openssl, verdict

NOW = datetime.now(UTC)


@pytest.fixture(autouse=True)
def fresh_now():
    """A long test run may reach this file hours after it was imported, and certificates are good from ten minutes ago."""
    global NOW  # noqa: PLW0603  # the tests read it as a constant
    NOW = datetime.now(UTC)


def nobody(_: object) -> bool:
    return False


def hosts(file: Path) -> str:
    return openssl("x509", "-in", file, "-noout", "-ext", "subjectAltName").stdout


def test_due_at_two_thirds_and_not_before(authority: Authority, keys: Path) -> None:
    leaf = x509.load_pem_x509_certificate((keys / "alice/cert.pem").read_bytes())
    due = due_at(leaf)
    assert timedelta(days=19, hours=23) < due - NOW < timedelta(days=20, hours=1)
    before = (keys / "alice/cert.pem").read_bytes()
    for moment in (NOW, due - timedelta(seconds=1)):
        assert not renew(authority, "alice", now=moment).renewed
    assert (keys / "alice/cert.pem").read_bytes() == before
    done = renew(authority, "alice", now=due)
    assert done.renewed
    assert done.issued.not_after - due > timedelta(days=29)
    authority.write_crl(now=due)
    assert KeyFolder.open(keys / "alice", "client", now=due + timedelta(days=1)).not_after == done.issued.not_after


def test_a_renewal_has_the_same_identity_hosts_and_key_and_another_serial(authority: Authority, keys: Path) -> None:
    authority.issue("srv", "server", dns=["gpu.example", "b.example"], ips=["10.0.0.7", "fe80::1"])
    key, old = (keys / "srv/key.pem").read_bytes(), hosts(keys / "srv/cert.pem")
    first = openssl("x509", "-in", keys / "srv/cert.pem", "-noout", "-serial").stdout
    done = renew(authority, "srv", force=True)
    assert (keys / "srv/key.pem").read_bytes() == key
    assert hosts(keys / "srv/cert.pem") == old
    assert (
        openssl("x509", "-in", keys / "srv/cert.pem", "-noout", "-serial").stdout
        == f"serial={done.issued.serial}\n"
        != first
    )
    assert verdict(keys / "srv", "server", "-verify_hostname", "b.example") == "OK"


def test_both_certificates_of_a_renewed_party_are_withdrawn_at_once(
    authority: Authority, keys: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(keys / "alice", tmp_path / "old")
    renew(authority, "alice", force=True)
    assert authority.revoke("alice").total == 2
    shutil.copy(keys / "ca/crl.pem", old / "crl.pem")
    assert "revoked" in verdict(old, "client")
    assert "revoked" in verdict(keys / "alice", "client")


def test_who_left_stays_out(authority: Authority, keys: Path) -> None:
    authority.revoke("alice")
    with pytest.raises(InputError, match="SS-1816"):
        renew(authority, "alice", force=True)
    with pytest.raises(InputError, match="SS-1816"):
        renew(authority, "mallory")
    later = NOW + timedelta(days=100)
    authority.issue("bob", "client")
    with pytest.raises(InputError, match="expired"):
        renew(authority, "bob", now=later)
    assert renew_all(authority, force=True, now=later) == ()
    assert renew(authority, "bob", force=True, now=later).renewed


def test_a_party_elsewhere_is_renewed_without_its_key(authority: Authority, keys: Path, tmp_path: Path) -> None:
    site = tmp_path / "site/alice"
    shutil.copytree(keys / "alice", site)
    shutil.rmtree(keys / "alice")
    key = (site / "key.pem").read_bytes()
    done = renew(authority, "alice", force=True)
    assert done.parcel == keys / "alice.signed.pem"
    brought = bring_in(site, read_parcel([done.parcel]), nobody, datetime.now(UTC))
    assert not brought.new_key
    assert (site / "key.pem").read_bytes() == key
    assert verdict(site, "client") == "OK"
    with pytest.raises(ConnectionFailed, match="SS-3100"):
        renew(authority, "alice", force=True, new_key="p256")


@pytest.mark.parametrize("rotated", [False, True])
def test_a_ledger_knows_a_renewed_client(authority: Authority, keys: Path, tmp_path: Path, rotated: bool) -> None:
    anchors = tmp_path / "anchors"
    Ledger(keys / "alice/ledger", anchors=anchors).close()
    if rotated:
        begin_rotation(authority)
        authority = Authority.open(keys)
        renew_all(authority)
        finish_rotation(authority)
    else:
        renew(authority, "alice", force=True)
    Ledger(keys / "alice/ledger", anchors=anchors).close()
    # A new key is another client to it, until somebody says otherwise. The command says so.
    done = renew(Authority.open(keys), "alice", force=True, new_key="p256")
    assert done.new_key
    with pytest.raises(PolicyDenied, match="SS-2023"):
        Ledger(keys / "alice/ledger", anchors=anchors)


def test_a_site_elsewhere_follows_a_rotation_on_the_old_root_s_word(
    authority: Authority, keys: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site/alice"
    shutil.copytree(keys / "alice", site)
    shutil.rmtree(keys / "alice")
    begun = begin_rotation(authority)
    assert begun.vouched
    authority = Authority.open(keys)
    authority.issue("bob", "client")
    # bob is the new authority's; alice's site has not heard of it.
    with pytest.raises(ConnectionFailed, match="SS-3202"):
        KeyFolder.open(site, "client").verify_peer(KeyFolder.open(keys / "bob", "client").cert_der, "client")
    done = renew(authority, "alice")
    assert done.renewed, "another authority is a reason"
    bring_in(site, read_parcel([done.parcel]), nobody, datetime.now(UTC))  # type: ignore[list-item]
    folder = KeyFolder.open(site, "client")
    assert folder.verify_peer(KeyFolder.open(keys / "gpu", "server").cert_der, "server").name == "gpu"
    assert folder.verify_peer(KeyFolder.open(keys / "bob", "client").cert_der, "client").name == "bob"


def test_a_false_successor_is_not_taken_on_its_own_word(authority: Authority, keys: Path, tmp_path: Path) -> None:
    site = tmp_path / "site/alice"
    shutil.copytree(keys / "alice", site)
    before = {path: path.read_bytes() for path in site.iterdir()}
    # Mallory's authority signs for alice's own public key, and appends the true root and a cross certificate of its own making.
    mallory = Authority.create(tmp_path / "mallory")
    mallory.issue("alice", "client")
    leaf = x509.load_pem_x509_certificate((site / "cert.pem").read_bytes())
    public = leaf.public_key()
    with mallory.locked() as lists:
        from securesplit.pki.identity import Identity
        from securesplit.pki.profile import Hosts, build_cross

        grant = mallory.grant(Identity("securesplit.local", "client", "alice"), public, Hosts(), lists, days=5, now=NOW)  # type: ignore[arg-type]
        cross = build_cross(mallory.certificate, mallory.signer, NOW)
    parcel = tmp_path / "parcel.pem"
    from securesplit.pki.founding import certificate_pem

    for extra in (b"", certificate_pem(authority.certificate), certificate_pem(cross)):
        parcel.write_bytes(grant.parcel() + extra)
        with pytest.raises(InputError, match="SS-1819"):
            bring_in(site, read_parcel([parcel]), nobody, datetime.now(UTC))
    assert {path: path.read_bytes() for path in site.iterdir()} == before


# --- status -----------------------------------------------------------------------------------------------------------


def state(keys: Path, now: datetime | None = None) -> dict[str, str]:
    return {
        f"{one.kind} {one.name}" if one.kind in {"client", "server"} else one.kind: one.state
        for one in standings(keys, now or NOW)
    }


def test_status_tells_good_due_expired_and_revoked(authority: Authority, keys: Path) -> None:
    authority.issue("bob", "client")
    authority.revoke("bob")
    assert state(keys) == {
        "authority": "good", "list": "good", "client alice": "good", "server gpu": "good", "client bob": "revoked",
    }  # fmt: skip
    later = NOW + timedelta(days=5)
    assert state(keys, later)["list"] == "due"
    later = NOW + timedelta(days=21)
    assert state(keys, later) == {
        "authority": "good", "list": "expired", "client alice": "due", "server gpu": "good", "client bob": "revoked",
    }  # fmt: skip
    later = NOW + timedelta(days=61)
    assert (state(keys, later)["client alice"], state(keys, later)["server gpu"]) == ("expired", "due")
    assert state(keys, NOW + timedelta(days=2500))["authority"] == "due"
    assert state(keys, NOW + timedelta(days=4000))["authority"] == "expired"
    assert state(keys / "alice") == {"client alice": "good"}


def test_status_follows_a_rotation_and_sees_what_was_not_brought_home(authority: Authority, keys: Path) -> None:
    begin_rotation(authority)
    found = standings(keys, datetime.now(UTC))
    assert sorted((one.kind, one.state) for one in found if one.kind == "authority") == [
        ("authority", "due"),
        ("authority", "good"),
    ]
    assert {one.name for one in found if one.needs_work} >= {"alice", "gpu"}
    renew_all(Authority.open(keys))
    finish_rotation(Authority.open(keys))
    assert not [one for one in standings(keys, datetime.now(UTC)) if one.needs_work]
    old = (keys / "alice/cert.pem").read_bytes(), (keys / "alice/chain.pem").read_bytes()
    renew(Authority.open(keys), "alice", force=True)
    (keys / "alice/cert.pem").write_bytes(old[0])
    (keys / "alice/chain.pem").write_bytes(old[1])
    assert [one.name for one in standings(keys, datetime.now(UTC)) if one.needs_work] == ["alice"]


def test_a_rotation_is_neither_begun_twice_nor_finished_early(authority: Authority, keys: Path) -> None:
    with pytest.raises(InputError, match="SS-1823"):
        finish_rotation(authority)
    begin_rotation(authority)
    with pytest.raises(InputError, match="SS-1820"):
        begin_rotation(authority)
    with pytest.raises(InputError, match="SS-1820"):
        authority.revoke("alice")
    again = Authority.open(keys)
    with pytest.raises(InputError, match="SS-1823"):
        begin_rotation(again)
    with pytest.raises(Exception, match="SS-1824") as caught:
        finish_rotation(again)
    assert caught.value.exit_code == 1  # type: ignore[attr-defined]
    assert len(caught.value.details) == 2  # type: ignore[attr-defined]
    again.revoke("alice")
    renew(again, "gpu")
    finish_rotation(again)
    with pytest.raises(InputError, match="SS-1816"):
        renew(Authority.open(keys), "alice", force=True)


def test_revocations_of_before_and_during_a_rotation_are_kept_while_they_count(
    authority: Authority, keys: Path
) -> None:
    authority.issue("bob", "client")
    authority.revoke("bob")
    begin_rotation(authority)
    assert "revoked" in verdict(keys / "bob", "client")
    assert Authority.open(keys).write_crl().total == 1
    assert "revoked" in verdict(keys / "bob", "client")
