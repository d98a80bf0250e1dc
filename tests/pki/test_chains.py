"""Every kind of chain that this package issues: openssl accepts it for its one purpose, and refuses it once it is revoked."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.authority import Authority
from securesplit.pki.bring import bring_in, confirmed_by
from securesplit.pki.certificate import verify_chain, verify_signature
from securesplit.pki.founding import Plan, open_signer
from securesplit.pki.grant import read_parcel
from securesplit.pki.identity import Identity
from securesplit.pki.profile import Hosts, Scope, host_names
from securesplit.pki.renew import renew, renew_all
from securesplit.pki.request import approve, authority_words, make_request, read_request
from securesplit.pki.rotate import begin_rotation, finish_rotation
from securesplit.pki.store import KeyFolder
from tests.pki.forge import FLAWS, forge, put_crl
from tests.pki.oracle import needs_openssl, openssl, verdict

pytestmark = needs_openssl

KINDS = ("root", "intermediate", "ed25519", "ed25519-intermediate", "constrained")


def found(keys: Path, kind: str) -> Authority:
    scope = Scope("securesplit.local")
    if kind == "constrained":
        scope = Scope("securesplit.local", ("localhost", "hospital.example"), ("127.0.0.0/8", "::1/128"))
    plan = Plan(scope, key_type="ed25519" if "ed25519" in kind else "p256", intermediate="intermediate" in kind)
    return Authority.create(keys, plan=plan)


@pytest.mark.parametrize("kind", KINDS)
def test_each_chain_is_accepted_for_its_purpose_and_refused_once_revoked(keys: Path, kind: str) -> None:
    authority = found(keys, kind)
    parties = {"gpu": "server", "alice": "client", "eve": "client", "gpu-ed": "server"}
    for name, role in parties.items():
        authority.issue(name, role, key_type="ed25519" if name in {"eve", "gpu-ed"} else "p256")  # type: ignore[arg-type]
    for name, role in parties.items():
        other = "client" if role == "server" else "server"
        assert verdict(keys / name, role) == "OK"
        assert "purpose" in verdict(keys / name, other)
        folder = KeyFolder.open(keys / name, role)  # type: ignore[arg-type]
        verify_signature(folder.cert_der, folder.sign(b"data"), b"data")
    assert verdict(keys / "gpu", "server", "-verify_hostname", "localhost", "-verify_ip", "127.0.0.1") == "OK"
    for name, role in parties.items():
        authority.revoke(name)
        assert "certificate revoked" in verdict(keys / name, role)
        with pytest.raises(ConnectionFailed, match="SS-3205"):
            KeyFolder.open(keys / name, role)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["root", "intermediate"])
def test_the_profile_of_authorities_as_openssl_prints_it(keys: Path, kind: str) -> None:
    found(keys, kind)

    def text(file: Path) -> str:
        return openssl("x509", "-in", file, "-noout", "-text").stdout

    signing = text(keys / "ca/cert.pem")
    assert "CA:TRUE, pathlen:0" in signing
    assert "X509v3 Name Constraints: critical" in signing
    assert "URI:securesplit.local" in signing
    if kind == "intermediate":
        root = text(keys / "ca/root/cert.pem")
        assert "CA:TRUE, pathlen:1" in root
        assert (keys / "ca/root/key.pem").stat().st_mode & 0o777 == 0o600


def test_the_root_is_needed_for_nothing_daily(keys: Path, tmp_path: Path) -> None:
    safe = tmp_path / "medium" / "root"
    plan = Plan(Scope("securesplit.local"), intermediate=True, root_passphrase=b"a passphrase of the root")
    authority = Authority.create(keys, plan=plan, root_at=safe)
    assert not (keys / "ca/root").exists()
    safe.parent.rename(tmp_path / "in the safe")
    authority = Authority.open(keys)
    authority.issue("alice", "client")
    renew(authority, "alice", force=True)
    authority.write_crl()
    assert verdict(keys / "alice", "client") == "OK"
    authority.revoke("alice")
    assert "revoked" in verdict(keys / "alice", "client")
    # Once a year the root comes out of the safe; its list is then good for another year.
    root = open_signer(tmp_path / "in the safe/root", lambda: b"a passphrase of the root")
    later = datetime.now(UTC) + timedelta(days=400)
    assert authority.write_crl(now=later).next_update < later, "the root's list has ended"
    fresh = authority.write_crl(root=root, now=later)
    assert fresh.total == 2, "both certificates of alice"
    assert fresh.next_update > later
    authority.issue("bob", "client", now=later)
    assert verdict(keys / "bob", "client", "-attime", int(later.timestamp())) == "OK"
    with pytest.raises(InputError, match="SS-1821"):
        authority.write_crl(root=found(tmp_path / "other", "root").signer)


def test_openssl_and_we_refuse_what_lies_outside_of_the_constraints(keys: Path, tmp_path: Path) -> None:
    authority = found(keys, "constrained")
    for dns, ips in ((["gpu.evil.example"], []), (["hospital.example.evil"], []), ([], ["10.0.0.7"])):
        with pytest.raises(InputError, match="constraints") as caught:
            authority.issue("gpu", "server", dns=dns, ips=ips)
        assert caught.value.code == "SS-1808"
    authority.issue("gpu", "server", dns=["gpu.hospital.example"])
    assert verdict(keys / "gpu", "server", "-verify_hostname", "gpu.hospital.example") == "OK"
    for flaw in ("other-host", "other-ip", "other-domain"):
        forged = forge(keys, flaw, role="server")
        assert "permitted subtree violation" in verdict(forged.folder, "server")
        with pytest.raises(ConnectionFailed, match=r"SS-3202|SS-3211"):
            KeyFolder.open(forged.folder, "server")


# --- the same answers as openssl, on certificates that were forged -------------------------------------------------------

# What openssl lets pass, because it is not asked: identities, roles, our own key sizes, exactly one purpose.
OURS_ALONE = {
    "cn-only": "SS-3201",
    "two-uris": "SS-3201",
    "both-ekus": "SS-3210",
    "any-eku": "SS-3210",
    "no-eku": "SS-3210",
    "wrong-role": "SS-3210",
    "rsa-1024": "SS-3215",
    "rsa-3072": "SS-3215",
    "p-384": "SS-3215",
    "foreign-uri": "SS-3201",
}


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("flaw", sorted(FLAWS))
def test_what_openssl_refuses_we_refuse(authority: Authority, keys: Path, flaw: str, role: str) -> None:
    forged = forge(keys, flaw, role=role)  # type: ignore[arg-type]
    theirs = verdict(forged.folder, role, "-auth_level", "0") == "OK"
    try:
        ca, crl = ((forged.folder / name).read_bytes() for name in ("ca.pem", "crl.pem"))
        verify_chain(forged.der, ca, crl, role, datetime.now(UTC))  # type: ignore[arg-type]
        ours = "OK"
    except ConnectionFailed as error:
        ours = error.code
    if not theirs:
        assert ours != "OK"
    elif ours != "OK":
        assert OURS_ALONE.get(flaw, "SS-3202" if flaw == "no-host" else "") == ours


@pytest.mark.parametrize("kind", ["good", "missing", "empty", "garbage", "expired", "future", "foreign", "impostor"])
def test_lists_are_judged_as_openssl_judges_them(authority: Authority, keys: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(keys / "alice", tmp_path / "alice")
    put_crl(folder, keys, kind)  # type: ignore[arg-type]
    theirs = verdict(folder, "client") == "OK"
    assert theirs == (kind == "good")
    if kind == "good":
        KeyFolder.open(folder, "client")
    else:
        with pytest.raises(ConnectionFailed, match=r"SS-3206|SS-3100"):
            KeyFolder.open(folder, "client")


# --- rotation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["root", "intermediate", "ed25519"])
def test_old_and_new_count_side_by_side_and_then_the_new_alone(keys: Path, tmp_path: Path, kind: str) -> None:
    authority = found(keys, kind)
    for name, role in (("gpu", "server"), ("alice", "client"), ("bob", "client")):
        authority.issue(name, role)  # type: ignore[arg-type]
    before = shutil.copytree(keys / "bob", tmp_path / "bob")
    begun = begin_rotation(authority)
    assert len(begun.waiting) == 3
    authority = Authority.open(keys)
    authority.issue("carol", "client")
    # Each side accepts the other, whichever authority issued it.
    for name, role in (("gpu", "server"), ("alice", "client"), ("carol", "client")):
        assert verdict(keys / name, role) == "OK"
        KeyFolder.open(keys / name, role)  # type: ignore[arg-type]
    server = KeyFolder.open(keys / "gpu", "server")
    assert server.verify_peer(KeyFolder.open(keys / "carol", "client").cert_der, "client").name == "carol"
    # Both authorities revoke.
    authority.revoke("bob")
    authority.revoke("carol")
    for name in ("bob", "carol"):
        assert "revoked" in verdict(keys / name, "client")
    assert verdict(keys / "alice", "client") == "OK"
    key = (keys / "alice/key.pem").read_bytes()
    assert [one.issued.uri_san.rsplit("/", 1)[1] for one in renew_all(authority) if one.renewed] == ["alice", "gpu"]
    assert (keys / "alice/key.pem").read_bytes() == key
    finish_rotation(authority)
    authority = Authority.open(keys)
    for name, role in (("gpu", "server"), ("alice", "client")):
        assert verdict(keys / name, role) == "OK"
        KeyFolder.open(keys / name, role)  # type: ignore[arg-type]
    # A certificate of the old authority, revoked or not, means nothing any more.
    leaf = before / "cert.pem"
    said = openssl("verify", "-CAfile", keys / "gpu/ca.pem", "-crl_check", "-CRLfile", keys / "gpu/crl.pem", leaf)
    assert said.returncode != 0
    with pytest.raises(ConnectionFailed, match="SS-3202"):
        KeyFolder.open(keys / "gpu", "server").verify_peer(KeyFolder.open(before, "client").cert_der, "client")
    assert not list((keys / "ca").glob("retired/*/key.pem"))
    # And once more, from the new one.
    authority.revoke("alice")
    assert "revoked" in verdict(keys / "alice", "client")


def test_an_intermediate_is_exchanged_under_its_root(keys: Path) -> None:
    authority = found(keys, "intermediate")
    authority.issue("gpu", "server")
    authority.issue("alice", "client")
    root = open_signer(keys / "ca/root", None)
    begun = begin_rotation(authority, root=root, keep_root=True)
    assert begun.vouched
    authority = Authority.open(keys)
    assert len(authority.trust.roots) == 1
    assert len(authority.trust.authorities) == 3
    renew_all(authority)
    finish_rotation(authority)
    for name, role in (("gpu", "server"), ("alice", "client")):
        assert verdict(keys / name, role) == "OK"


# --- a site of its own, and authorities from outside -------------------------------------------------------------------


def test_a_site_s_key_stays_and_its_chain_is_good(authority: Authority, keys: Path, tmp_path: Path) -> None:
    site = tmp_path / "site/dora"
    made = make_request(
        site, Identity("securesplit.local", "server", "dora"), host_names("server", ["dora.example"], [])
    )
    carried = tmp_path / "dora.csr"
    shutil.copy(made.path, carried)
    said = openssl("req", "-in", carried, "-noout", "-verify", "-text")
    assert "verify OK" in said.stdout + said.stderr
    assert "DNS:dora.example" in said.stdout
    grant = approve(authority, read_request(carried), made.words.upper().replace("-", " "))
    answer = tmp_path / "dora.signed.pem"
    answer.write_bytes(grant.parcel())
    assert b"PRIVATE" not in grant.parcel()
    words = authority_words(authority.trust.roots[0])
    brought = bring_in(site, read_parcel([answer]), confirmed_by(words), datetime.now(UTC))
    assert brought.words == words
    assert verdict(site, "server", "-verify_hostname", "dora.example") == "OK"
    assert KeyFolder.open(site, "server").identity.name == "dora"
    assert not any("dora" in str(path) for path in keys.rglob("*key*"))
    authority.revoke("dora")
    shutil.copy(keys / "ca/crl.pem", site / "crl.pem")
    assert "revoked" in verdict(site, "server")


@pytest.mark.parametrize("kind", ["rsa:2048", "ec"])
def test_an_authority_from_outside_made_by_openssl(tmp_path: Path, kind: str) -> None:
    """A hospital's own authority: a root without our URI, an intermediate, a list of each, all by the openssl program."""
    site = tmp_path / "site/alice"
    made = make_request(site, Identity("hospital.example", "client", "alice"), Hosts())
    ca = outside(tmp_path / "outside", kind, made.path)
    files = [ca / "alice.pem", ca / "sub.pem", ca / "root.pem", ca / "sub.crl", ca / "root.crl"]
    fingerprint = openssl("x509", "-in", ca / "root.pem", "-noout", "-fingerprint", "-sha256").stdout.split("=")[1]
    with pytest.raises(InputError, match="SS-1819"):
        bring_in(site, read_parcel(files), lambda _: False, datetime.now(UTC))
    assert not (site / "cert.pem").exists()
    with pytest.raises(ConnectionFailed, match="SS-3206"):
        bring_in(site, read_parcel(files[:4]), confirmed_by(fingerprint), datetime.now(UTC))
    bring_in(site, read_parcel(files), confirmed_by(fingerprint), datetime.now(UTC))
    assert verdict(site, "client") == "OK"
    folder = KeyFolder.open(site, "client")
    assert folder.identity.uri == "spiffe://hospital.example/securesplit/client/alice"
    with pytest.raises(ConnectionFailed, match="SS-3210"):
        folder.verify_peer(folder.cert_der, "server")
    openssl("ca", "-config", ca / "sub.cnf", "-revoke", ca / "alice.pem")
    openssl("ca", "-config", ca / "sub.cnf", "-gencrl", "-out", ca / "sub.crl", "-crldays", "7")
    (site / "crl.pem").write_bytes((ca / "sub.crl").read_bytes() + (ca / "root.crl").read_bytes())
    assert "revoked" in verdict(site, "client")
    with pytest.raises(ConnectionFailed, match="SS-3205"):
        KeyFolder.open(site, "client")


CONFIG = """
[ca]
default_ca = one
[one]
database = {at}/{name}.index
new_certs_dir = {at}
serial = {at}/{name}.serial
crlnumber = {at}/{name}.number
certificate = {at}/{name}.pem
private_key = {at}/{name}.key
default_md = sha256
default_days = 30
default_crl_days = 7
policy = any
copy_extensions = copy
unique_subject = no
[any]
commonName = supplied
[sub]
basicConstraints = critical,CA:TRUE,pathlen:0
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[party]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


def outside(at: Path, kind: str, csr: Path) -> Path:
    at.mkdir()
    key = ["-newkey", kind] if kind.startswith("rsa") else ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384"]
    for name in ("root", "sub"):
        (at / f"{name}.cnf").write_text(CONFIG.format(at=at, name=name))
        (at / f"{name}.index").write_text("")
        (at / f"{name}.serial").write_text("5A0F33E1C7D2B8A64E91\n")
        (at / f"{name}.number").write_text("01\n")
    done = [
        openssl(
            "req", "-x509", *key, "-nodes", "-keyout", at / "root.key", "-out", at / "root.pem", "-subj", "/CN=Outside root",
            "-days", "900", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        ),
        openssl("req", *key, "-nodes", "-keyout", at / "sub.key", "-out", at / "sub.csr", "-subj", "/CN=Outside issuing"),
        openssl("ca", "-batch", "-config", at / "root.cnf", "-extensions", "sub", "-in", at / "sub.csr", "-out", at / "sub.pem", "-notext"),
        openssl("ca", "-batch", "-config", at / "sub.cnf", "-extensions", "party", "-in", csr, "-out", at / "alice.pem", "-notext"),
        openssl("ca", "-config", at / "root.cnf", "-gencrl", "-out", at / "root.crl"),
        openssl("ca", "-config", at / "sub.cnf", "-gencrl", "-out", at / "sub.crl"),
    ]  # fmt: skip
    for one in done:
        assert one.returncode == 0, one.stderr
    return at
