from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from securesplit.errors import ConnectionFailed
from securesplit.pki.authority import Authority
from securesplit.pki.certificate import verify_signature
from securesplit.pki.store import KeyFolder


def refused(path: Path, role: str = "client", **more: object) -> ConnectionFailed:
    with pytest.raises(ConnectionFailed) as caught:
        KeyFolder.open(path, role, **more)  # type: ignore[arg-type]
    assert caught.value.exit_code == 4
    assert caught.value.hint
    return caught.value


def test_a_party_folder_opens_and_signs(authority: Authority, keys: Path, tmp_path: Path) -> None:
    folder = KeyFolder.open(keys / "alice", "client")
    assert folder.identity.uri == "spiffe://securesplit.local/securesplit/client/alice"
    assert (folder.key_path, folder.chain_path) == (keys / "alice/key.pem", keys / "alice/chain.pem")
    signature = folder.sign(b"statement")
    verify_signature(folder.cert_der, signature, b"statement")
    if shutil.which("openssl"):
        (tmp_path / "sig").write_bytes(signature)
        (tmp_path / "data").write_bytes(b"statement")
        public = subprocess.run(
            ["openssl", "x509", "-in", keys / "alice/cert.pem", "-noout", "-pubkey"], capture_output=True, check=True
        ).stdout
        (tmp_path / "public.pem").write_bytes(public)
        subprocess.run(
            ["openssl", "dgst", "-sha256", "-verify", tmp_path / "public.pem", "-signature", tmp_path / "sig", tmp_path / "data"],
            check=True, capture_output=True,
        )  # fmt: skip
    assert "PRIVATE" not in repr(folder)


def test_the_top_folder_stands_for_its_only_party_of_a_role(authority: Authority, keys: Path) -> None:
    assert KeyFolder.open(keys, "client").identity.name == "alice"
    assert KeyFolder.open(str(keys), "server").path == keys / "gpu"
    authority.issue("bob", "client")
    error = refused(keys)
    assert error.code == "SS-3103"
    assert "alice, bob" in error.what
    assert KeyFolder.open(keys, "server").identity.name == "gpu"


def test_a_folder_stands_alone_on_another_machine(authority: Authority, keys: Path, tmp_path: Path) -> None:
    shutil.copytree(keys / "alice", tmp_path / "elsewhere")
    assert KeyFolder.open(tmp_path / "elsewhere", "client").identity.name == "alice"


def test_nothing_there(authority: Authority, keys: Path, tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").code == "SS-3100"
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").code == "SS-3100"
    assert "authority" in refused(keys / "ca").what
    shutil.rmtree(keys / "alice")
    error = refused(keys)
    assert error.code == "SS-3100"
    assert "gpu (server)" in error.what
    for missing in ("key.pem", "ca.pem", "crl.pem"):
        folder = shutil.copytree(keys / "gpu", tmp_path / missing)
        (folder / missing).unlink()
        assert refused(folder, "server").code == "SS-3100"


def test_loose_modes(authority: Authority, keys: Path) -> None:
    (keys / "alice/key.pem").chmod(0o644)
    assert refused(keys / "alice").code == "SS-3101"
    (keys / "alice/key.pem").chmod(0o600)
    (keys / "alice").chmod(0o711)
    assert refused(keys / "alice").code == "SS-3101"
    (keys / "alice").chmod(0o700)
    KeyFolder.open(keys / "alice", "client")


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", None])
def test_a_key_that_is_none_or_another_party_s(authority: Authority, keys: Path, content: bytes | None) -> None:
    (keys / "alice/key.pem").write_bytes((keys / "gpu/key.pem").read_bytes() if content is None else content)
    assert refused(keys / "alice").code == "SS-3102"


def test_the_other_role(authority: Authority, keys: Path) -> None:
    assert refused(keys / "gpu", "client").code == "SS-3210"
    assert refused(keys / "alice", "server").code == "SS-3210"


def test_dates_to_the_second(authority: Authority, keys: Path) -> None:
    issued = KeyFolder.open(keys / "alice", "client")
    authority.write_crl(now=issued.not_after)
    KeyFolder.open(keys / "alice", "client", now=issued.not_after)
    assert refused(keys / "alice", now=issued.not_after + timedelta(seconds=1)).code == "SS-3203"
    assert refused(keys / "alice", now=datetime.now(UTC) - timedelta(minutes=11)).code == "SS-3204"


def test_another_authority(authority: Authority, keys: Path, tmp_path: Path) -> None:
    Authority.create(tmp_path / "other")
    shutil.copy(tmp_path / "other/ca/cert.pem", keys / "alice/ca.pem")
    assert refused(keys / "alice").code == "SS-3202"
    (keys / "alice/ca.pem").write_bytes(b"nothing")
    assert refused(keys / "alice").code == "SS-3209"


def test_revoked_and_lists_that_prove_nothing(authority: Authority, keys: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(keys / "alice", tmp_path / "alone")
    assert refused(alone, now=datetime.now(UTC) + timedelta(days=8)).code == "SS-3206"
    Authority.create(tmp_path / "other")
    shutil.copy(tmp_path / "other/ca/crl.pem", alone / "crl.pem")
    assert refused(alone).code == "SS-3206"
    (alone / "crl.pem").write_bytes(b"garbage")
    assert refused(alone).code == "SS-3206"
    authority.revoke("alice")
    shutil.copy(keys / "ca/crl.pem", alone / "crl.pem")
    assert refused(alone).code == "SS-3205"


def test_the_authority_s_list_is_preferred_when_it_is_newer_and_genuine(
    authority: Authority, keys: Path, tmp_path: Path
) -> None:
    before = KeyFolder.open(keys / "alice", "client")
    assert before.crl_path == keys / "alice/crl.pem"
    stamps = before.stamps()
    old = (keys / "alice/crl.pem").read_bytes()
    authority.revoke("gpu")
    (keys / "alice/crl.pem").write_bytes(old)
    after = KeyFolder.open(keys / "alice", "client")
    assert after.crl_path == keys / "ca/crl.pem"
    assert stamps != after.stamps()
    with pytest.raises(ConnectionFailed, match="revoked"):
        after.verify_peer(KeyFolder.open(tmp_copy(keys, tmp_path, old), "server").cert_der, "server")
    Authority.create(tmp_path / "other").write_crl()
    shutil.copy(tmp_path / "other/ca/crl.pem", keys / "ca/crl.pem")
    assert KeyFolder.open(keys / "alice", "client").crl_path == keys / "alice/crl.pem"


def tmp_copy(keys: Path, tmp_path: Path, crl: bytes) -> Path:
    """The server on a machine that has not heard of its revocation."""
    folder = shutil.copytree(keys / "gpu", tmp_path / "unaware")
    (folder / "crl.pem").write_bytes(crl)
    return folder


def test_stamps_change_with_every_file_that_is_read(authority: Authority, keys: Path) -> None:
    folder = KeyFolder.open(keys / "gpu", "server")
    seen = {folder.stamps()}
    for file in ("gpu/cert.pem", "gpu/key.pem", "gpu/chain.pem", "gpu/ca.pem", "gpu/crl.pem", "ca/crl.pem"):
        aside = keys / "aside"
        shutil.copy(keys / file, aside)
        aside.replace(keys / file)
        seen.add(folder.stamps())
    assert len(seen) == 7
