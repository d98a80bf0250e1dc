"""Keys of both kinds, encrypted and not; passphrases from files and descriptors. Oracle: openssl, and a TLS handshake."""

from __future__ import annotations

import os
import shutil
import ssl
from pathlib import Path

import pytest

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.authority import Authority
from securesplit.pki.certificate import verify_signature
from securesplit.pki.export import export_p12
from securesplit.pki.founding import Plan
from securesplit.pki.passphrase import from_descriptor, from_file, require_strong
from securesplit.pki.profile import Scope
from securesplit.pki.renew import renew
from securesplit.pki.store import KeyFolder
from tests.pki.oracle import needs_openssl, openssl, verdict

SECRET = b"six random words of a passphrase"


def never() -> bytes:
    pytest.fail("a key in the clear needs no passphrase")


def meet(server: KeyFolder, client: KeyFolder) -> str | None:
    """A handshake in memory, by the standard library alone."""
    sides = []
    for folder, protocol in ((server, ssl.PROTOCOL_TLS_SERVER), (client, ssl.PROTOCOL_TLS_CLIENT)):
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_CHAIN
        context.load_cert_chain(folder.chain_path, folder.key_path, password=folder.password)
        context.load_verify_locations(cadata=folder.ca_pem.decode())
        context.load_verify_locations(cafile=folder.crl_path)
        sides.append(context)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    first = sides[0].wrap_bio(to_server, to_client, server_side=True)
    second = sides[1].wrap_bio(to_client, to_server)
    for side in (second, first, second, first):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return second.version() if first.getpeercert() and second.getpeercert() else None


@needs_openssl
@pytest.mark.parametrize("kind", ["p256", "ed25519"])
def test_an_encrypted_key_serves_signs_and_handshakes_and_openssl_opens_it(
    authority: Authority, keys: Path, tmp_path: Path, kind: str
) -> None:
    authority.issue("safe", "server", key_type=kind, passphrase=SECRET)  # type: ignore[arg-type]
    text = (keys / "safe/key.pem").read_bytes()
    assert text.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    folder = KeyFolder.open(keys / "safe", "server", passphrase=lambda: SECRET)
    verify_signature(folder.cert_der, folder.sign(b"data"), b"data")
    assert folder.reopen().identity == folder.identity
    assert meet(folder, KeyFolder.open(keys / "alice", "client")) == "TLSv1.3"
    assert SECRET.decode() not in repr(folder)
    file = tmp_path / "pass"
    file.write_bytes(SECRET)
    public = openssl("pkey", "-in", keys / "safe/key.pem", "-passin", f"file:{file}", "-pubout").stdout
    assert public == openssl("x509", "-in", keys / "safe/cert.pem", "-noout", "-pubkey").stdout
    assert openssl("pkey", "-in", keys / "safe/key.pem", "-passin", "pass:wrong", "-noout").returncode != 0


def test_an_encrypted_key_without_its_passphrase(authority: Authority, keys: Path) -> None:
    authority.issue("safe", "client", passphrase=SECRET)
    for passphrase, code in ((None, "SS-3104"), (lambda: b"another passphrase", "SS-3105"), (lambda: b"", "SS-3105")):
        with pytest.raises(ConnectionFailed) as caught:
            KeyFolder.open(keys / "safe", "client", passphrase=passphrase)
        assert caught.value.code == code
        assert "another" not in str(caught.value)
    KeyFolder.open(keys / "alice", "client", passphrase=never)
    # A password callback is always handed to OpenSSL; for a key in the clear it is not asked.
    assert KeyFolder.open(keys / "alice", "client").password() == b""


def test_an_encrypted_authority_works_with_its_passphrase_alone(keys: Path) -> None:
    Authority.create(keys, plan=Plan(Scope("securesplit.local"), passphrase=SECRET))
    for passphrase, code in ((None, "SS-3104"), (lambda: b"wrong", "SS-3105")):
        with pytest.raises(ConnectionFailed) as caught:
            Authority.open(keys, passphrase=passphrase)
        assert caught.value.code == code
    Authority.open(keys, passphrase=lambda: SECRET).issue("alice", "client")
    assert b"ENCRYPTED" in (keys / "ca/key.pem").read_bytes()
    assert verdict(keys / "alice", "client") == "OK"


def test_a_renewal_keeps_an_encrypted_key_and_never_weakens_one(authority: Authority, keys: Path) -> None:
    authority.issue("safe", "client", passphrase=SECRET)
    before = (keys / "safe/key.pem").read_bytes()
    assert renew(authority, "safe", force=True).renewed
    assert (keys / "safe/key.pem").read_bytes() == before
    with pytest.raises(ConnectionFailed, match="SS-3104"):
        renew(authority, "safe", force=True, new_key="p256")
    assert (keys / "safe/key.pem").read_bytes() == before
    assert renew(authority, "safe", force=True, new_key="ed25519", secret=SECRET).new_key
    assert b"ENCRYPTED" in (keys / "safe/key.pem").read_bytes()
    KeyFolder.open(keys / "safe", "client", passphrase=lambda: SECRET)


# --- passphrases ------------------------------------------------------------------------------------------------------


def test_a_passphrase_file_is_private_and_one_line(tmp_path: Path) -> None:
    file = tmp_path / "pass"
    file.touch(mode=0o600)
    for content, wanted in (
        (b"secret words\n", b"secret words"),
        (b"secret words\r\n", b"secret words"),
        (b" x ", b" x "),
    ):
        file.write_bytes(content)
        assert from_file(file) == wanted
    for content in (b"", b"\n", b"one\ntwo\n", b"x" * 1001, b"nul\0"):
        file.write_bytes(content)
        with pytest.raises(InputError, match="SS-1814"):
            from_file(file)
    file.write_bytes(b"secret words")
    for mode in (0o644, 0o640, 0o604):
        file.chmod(mode)
        with pytest.raises(ConnectionFailed, match="SS-3101"):
            from_file(file)
    with pytest.raises(InputError, match="SS-1814"):
        from_file(tmp_path / "none")


def test_a_descriptor_is_read_to_its_end_and_stays_the_caller_s() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"secret words\n")
    os.close(writing)
    assert from_descriptor(reading) == b"secret words"
    os.close(reading)
    with pytest.raises(InputError, match="SS-1814"):
        from_descriptor(reading)


def test_short_passphrases_protect_nothing() -> None:
    require_strong(b"twelve chars")
    require_strong("zwölf Zeichen".encode())
    for short in (b"eleven char", b""):
        with pytest.raises(InputError, match=r"SS-181[45]"):
            require_strong(short)


# --- PKCS #12 ---------------------------------------------------------------------------------------------------------


@needs_openssl
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_p12_opens_with_openssl_and_holds_the_key_and_the_chain(
    authority: Authority, keys: Path, tmp_path: Path, encrypted: bool
) -> None:
    authority.issue("bob", "client", passphrase=SECRET if encrypted else None)
    out = tmp_path / "bob.p12"
    export_p12(keys / "bob", out, b"another passphrase", passphrase=lambda: SECRET)
    assert out.stat().st_mode & 0o777 == 0o600
    (tmp_path / "pass").write_bytes(b"another passphrase")
    (tmp_path / "key-pass").write_bytes(SECRET)
    opened = openssl("pkcs12", "-in", out, "-passin", f"file:{tmp_path / 'pass'}", "-nodes")
    assert opened.returncode == 0, opened.stderr
    assert opened.stdout.count("BEGIN CERTIFICATE") == 2
    (tmp_path / "key.pem").write_text(opened.stdout)
    public = openssl("pkey", "-in", tmp_path / "key.pem", "-pubout").stdout
    assert public == openssl("x509", "-in", keys / "bob/cert.pem", "-noout", "-pubkey").stdout
    info = openssl("pkcs12", "-in", out, "-passin", f"file:{tmp_path / 'pass'}", "-info", "-noout").stderr
    assert "AES-256-CBC" in info
    assert "600000" in info
    assert openssl("pkcs12", "-in", out, "-passin", "pass:wrong", "-noout").returncode != 0
    with pytest.raises(InputError, match="SS-1804"):
        export_p12(keys / "bob", out, b"another passphrase", passphrase=lambda: SECRET)
    with pytest.raises(InputError, match="SS-1815"):
        export_p12(keys / "bob", tmp_path / "short.p12", b"short")


def test_a_loose_folder_exports_nothing(authority: Authority, keys: Path, tmp_path: Path) -> None:
    (keys / "alice").chmod(0o755)
    with pytest.raises(ConnectionFailed, match="SS-3101"):
        export_p12(keys / "alice", tmp_path / "a.p12", b"another passphrase")
    shutil.rmtree(keys / "alice")
    with pytest.raises(ConnectionFailed, match="SS-3100"):
        export_p12(keys / "alice", tmp_path / "a.p12", b"another passphrase")
