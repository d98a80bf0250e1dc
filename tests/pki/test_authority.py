"""The oracle is the openssl program: it parses and verifies what this package wrote, and shares no code with it."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.authority import Authority

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl program is the oracle")


def openssl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=30)


def verify(keys: Path, name: str, purpose: str, *more: object) -> subprocess.CompletedProcess[str]:
    return openssl(
        "verify", "-x509_strict", "-purpose", purpose, "-crl_check", "-CRLfile", keys / "ca/crl.pem",
        "-CAfile", keys / "ca/cert.pem", *more, keys / name / "cert.pem",
    )  # fmt: skip


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@needs_openssl
@pytest.mark.parametrize(
    ("name", "good", "bad"), [("gpu", "sslserver", "sslclient"), ("alice", "sslclient", "sslserver")]
)
def test_openssl_accepts_each_certificate_for_its_one_purpose(
    authority: Authority, keys: Path, name: str, good: str, bad: str
) -> None:
    accepted = verify(keys, name, good)
    assert accepted.returncode == 0, accepted.stderr
    refused = verify(keys, name, bad)
    assert refused.returncode != 0
    assert "purpose" in refused.stderr + refused.stdout


@needs_openssl
def test_openssl_accepts_the_server_for_its_default_hosts_only(authority: Authority, keys: Path) -> None:
    assert verify(keys, "gpu", "sslserver", "-verify_hostname", "localhost").returncode == 0
    assert verify(keys, "gpu", "sslserver", "-verify_ip", "127.0.0.1").returncode == 0
    assert verify(keys, "gpu", "sslserver", "-verify_ip", "::1").returncode == 0
    assert verify(keys, "gpu", "sslserver", "-verify_hostname", "gpu").returncode != 0
    assert verify(keys, "gpu", "sslserver", "-verify_ip", "127.0.0.2").returncode != 0


@needs_openssl
def test_the_profile_as_openssl_prints_it(authority: Authority, keys: Path) -> None:
    issued = authority.issue("srv", "server", dns=["gpu.example"], ips=["10.0.0.7"])
    text = openssl("x509", "-in", issued.path, "-noout", "-text").stdout
    assert "ASN1 OID: prime256v1" in text
    assert re.search(r"Basic Constraints: critical\s+CA:FALSE", text)
    assert re.search(r"Key Usage: critical\s+Digital Signature\n", text)
    assert re.search(r"Extended Key Usage: \n?\s+TLS Web Server Authentication\n", text)
    assert "URI:spiffe://securesplit.local/securesplit/server/srv, DNS:gpu.example, IP Address:10.0.0.7\n" in text, (
        "a server that names its hosts gets those and no others"
    )
    assert "Subject Key Identifier" in text
    assert "Authority Key Identifier" in text
    root = openssl("x509", "-in", keys / "ca/cert.pem", "-noout", "-text").stdout
    assert re.search(r"Basic Constraints: critical\s+CA:TRUE, pathlen:0", root)
    assert re.search(r"Key Usage: critical\s+Certificate Sign, CRL Sign\n", root)
    assert "URI:spiffe://securesplit.local\n" in root


@needs_openssl
def test_what_is_reported_is_what_openssl_reads(authority: Authority, keys: Path) -> None:
    issued = authority.issue("bob", "client")
    said = openssl("x509", "-in", issued.path, "-noout", "-serial", "-fingerprint", "-sha256", "-enddate").stdout
    assert f"serial={issued.serial}\n" in said
    assert issued.fingerprint == re.search(r"Fingerprint=(.*)", said)[1].replace(":", "").lower()  # type: ignore[index]
    assert issued.not_after.strftime("%b %e %H:%M:%S %Y GMT") in said
    assert issued.uri_san == "spiffe://securesplit.local/securesplit/client/bob"
    public = openssl("x509", "-in", issued.path, "-noout", "-pubkey").stdout
    assert public == openssl("pkey", "-in", keys / "bob/key.pem", "-pubout").stdout


@needs_openssl
def test_openssl_refuses_a_revoked_certificate_and_still_accepts_the_others(authority: Authority, keys: Path) -> None:
    authority.revoke("alice")
    refused = verify(keys, "alice", "sslclient")
    assert "certificate revoked" in refused.stderr + refused.stdout
    assert verify(keys, "gpu", "sslserver").returncode == 0


def test_modes_on_disk(authority: Authority, keys: Path) -> None:
    for folder in (keys, keys / "ca", keys / "ca/issued", keys / "gpu", keys / "alice"):
        assert mode(folder) == 0o700, folder
    for name in ("ca", "gpu", "alice"):
        assert mode(keys / name / "key.pem") == 0o600
    assert sorted(p.name for p in (keys / "alice").iterdir()) == [
        "ca.pem",
        "cert.pem",
        "chain.pem",
        "crl.pem",
        "key.pem",
    ]
    assert not list(keys.rglob("*.tmp"))


def test_lifetimes_and_serials(keys: Path) -> None:
    now = datetime(2026, 5, 1, 12, tzinfo=UTC)
    authority = Authority.create(keys, now=now)
    root = authority.describe()
    client = authority.issue("alice", "client", now=now)
    server = authority.issue("gpu", "server", now=now)
    short = authority.issue("bob", "client", now=now, days=1)
    assert [issued.not_after - now for issued in (root, client, server, short)] == [
        timedelta(days=days) for days in (3650, 30, 90, 1)
    ]
    assert authority.certificate.not_valid_before_utc == now - timedelta(minutes=10)
    serials = {int(issued.serial, 16) for issued in (root, client, server, short)}
    assert len(serials) == 4
    assert all(1 << 128 < serial < 1 << 160 for serial in serials), "a chance of 2^-30 each to fail"


def test_a_party_never_outlives_its_authority(keys: Path) -> None:
    authority = Authority.create(keys, days=10)
    assert authority.issue("alice", "client").not_after == authority.describe().not_after
    with pytest.raises(InputError, match="expired") as caught:
        authority.issue("bob", "client", now=datetime.now(UTC) + timedelta(days=11))
    assert caught.value.code == "SS-1806"


def test_an_authority_is_never_overwritten(authority: Authority, keys: Path) -> None:
    before = {path: path.read_bytes() for path in keys.rglob("*.pem")}
    with pytest.raises(InputError) as caught:
        Authority.create(keys)
    assert caught.value.code == "SS-1805"
    assert {path: path.read_bytes() for path in keys.rglob("*.pem")} == before


def test_a_new_party_touches_no_other_file(authority: Authority, keys: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in keys.rglob("*.pem")}
    authority.issue("carol", "client")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before


def test_a_good_certificate_is_not_replaced_but_a_revoked_or_expired_one_is(authority: Authority, keys: Path) -> None:
    with pytest.raises(InputError) as caught:
        authority.issue("alice", "client")
    assert caught.value.code == "SS-1809"
    authority.revoke("alice")
    second = authority.issue("alice", "client")
    third = authority.issue("alice", "client", now=datetime.now(UTC) + timedelta(days=31))
    assert second.serial != third.serial
    revoked = authority.revoke("alice")
    assert set(revoked.serials) == {second.serial, third.serial}
    assert revoked.total == 3


def test_a_party_is_revoked_after_its_folder_is_gone(authority: Authority, keys: Path) -> None:
    shutil.rmtree(keys / "alice")
    assert Authority.open(keys).revoke("alice").total == 1


def test_revoking_twice_is_harmless_and_a_stranger_is_an_error(authority: Authority) -> None:
    assert len(authority.revoke("alice").serials) == 1
    again = authority.revoke("alice")
    assert (again.serials, again.total) == ((), 1)
    with pytest.raises(InputError) as caught:
        authority.revoke("mallory")
    assert caught.value.code == "SS-1810"


@needs_openssl
def test_every_list_is_newer_than_the_last_and_none_is_from_the_future(authority: Authority, keys: Path) -> None:
    def read() -> tuple[datetime, int, datetime]:
        said = openssl("crl", "-in", keys / "ca/crl.pem", "-noout", "-lastupdate", "-crlnumber", "-nextupdate").stdout
        dates = [
            datetime.strptime(date, "%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC)
            for date in re.findall(r"Update=(.*)", said)
        ]
        return dates[0], int(re.search(r"crlNumber=(?:0x)?([0-9A-F]+)", said)[1], 16), dates[1]  # type: ignore[index]

    last = read()
    assert last[2] - datetime.now(UTC) > timedelta(days=6, hours=23)
    for _ in range(5):
        authority.write_crl()
        new = read()
        assert new[0] > last[0]
        assert new[0] <= datetime.now(UTC)
        assert new[1] == last[1] + 1
        last = new


def test_the_copies_of_the_parties_follow_and_a_foreign_folder_is_left_alone(
    authority: Authority, keys: Path, tmp_path: Path
) -> None:
    foreign = Authority.create(tmp_path / "other")
    foreign.issue("zoe", "client")
    shutil.copytree(tmp_path / "other" / "zoe", keys / "zoe")
    theirs = (keys / "zoe/crl.pem").read_bytes()
    authority.revoke("alice")
    new = (keys / "ca/crl.pem").read_bytes()
    assert (keys / "alice/crl.pem").read_bytes() == new
    assert (keys / "gpu/crl.pem").read_bytes() == new
    assert (keys / "zoe/crl.pem").read_bytes() == theirs


def test_a_lost_or_foreign_list_is_not_replaced_by_an_empty_one(
    authority: Authority, keys: Path, tmp_path: Path
) -> None:
    authority.revoke("alice")
    good = (keys / "ca/crl.pem").read_bytes()
    Authority.create(tmp_path / "other")
    for bad in (None, b"", (tmp_path / "other/ca/crl.pem").read_bytes()):
        (keys / "ca/crl.pem").unlink(missing_ok=True)
        if bad is not None:
            (keys / "ca/crl.pem").write_bytes(bad)
        for act in (authority.write_crl, lambda: authority.revoke("gpu"), lambda: authority.issue("bob", "client")):
            with pytest.raises(InputError) as caught:
                act()
            assert caught.value.code == "SS-1811"
    (keys / "ca/crl.pem").write_bytes(good)
    assert authority.write_crl().total == 1


def test_no_authority_and_an_open_authority(authority: Authority, keys: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Authority.open(tmp_path / "nowhere")
    assert caught.value.code == "SS-1807"
    (keys / "ca/key.pem").chmod(0o640)
    with pytest.raises(ConnectionFailed, match="0640") as refused:
        Authority.open(keys)
    assert refused.value.code == "SS-3101"
    (keys / "ca/key.pem").chmod(0o600)
    (keys / "ca").chmod(0o755)
    with pytest.raises(ConnectionFailed, match="0755"):
        Authority.open(keys)


def test_the_key_of_another_authority_is_refused(authority: Authority, keys: Path, tmp_path: Path) -> None:
    Authority.create(tmp_path / "other")
    shutil.copy(tmp_path / "other/ca/key.pem", keys / "ca/key.pem")
    with pytest.raises(ConnectionFailed) as caught:
        Authority.open(keys)
    assert caught.value.code == "SS-3102"


@pytest.mark.parametrize(
    ("role", "dns", "ips"),
    [
        ("client", ["localhost"], []),
        ("client", [], ["127.0.0.1"]),
        ("server", ["*.example"], []),
        ("server", ["Gpu.example"], []),
        ("server", ["gpu.example\n"], []),
        ("server", [""], []),
        ("server", [], ["localhost"]),
        ("server", [], ["127.0.0.1/8"]),
    ],
)
def test_hosts_that_prove_nothing_are_refused(
    authority: Authority, keys: Path, role: str, dns: list[str], ips: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        authority.issue("bob", role, dns=dns, ips=ips)  # type: ignore[arg-type]
    assert caught.value.code == "SS-1808"
    assert not (keys / "bob").exists()


@pytest.mark.parametrize("days", [0, -1, 398])
def test_lifetimes_without_sense_are_refused(authority: Authority, days: int) -> None:
    with pytest.raises(InputError) as caught:
        authority.issue("bob", "client", days=days)
    assert caught.value.code == "SS-1806"


def test_a_name_cannot_climb_out_of_the_folder(authority: Authority) -> None:
    for name in ("../evil", "a/b", "ca", ".", ""):
        with pytest.raises(InputError) as caught:
            authority.issue(name, "client")
        assert caught.value.code == "SS-1801"
        with pytest.raises(InputError):
            authority.revoke(name)
