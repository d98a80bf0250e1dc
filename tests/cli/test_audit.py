"""`securesplit audit` on logs with real certificates; openssl is the oracle for a head's signature."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from securesplit.journal.events import Checkpoint, PeerHead, Refused
from securesplit.journal.seal import read_sealed, statement
from securesplit.logged import open_journal
from securesplit.pki.authority import Authority
from securesplit.pki.store import KeyFolder

KNOCK = Refused(stage="tls", code="SS-3205", address="10.0.0.7:51842")
SESSION = "5" * 32


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """An authority, a server and a client, whose logs have seen each other."""
    keys = tmp_path_factory.mktemp("site") / "keys"
    authority = Authority.create(keys)
    authority.issue("gpu", "server", ips=["127.0.0.1"])
    authority.issue("alice", "client")
    server, alice = KeyFolder.open(keys / "gpu", "server"), KeyFolder.open(keys / "alice", "client")
    with open_journal(server) as a, open_journal(alice) as b:
        for _ in range(12):
            a.append(KNOCK)
        for journal, other, folder in ((a, b, alice), (b, a, server)):
            head = other.head()
            journal.append(Checkpoint(session=SESSION, number=0, up="1" * 64, down="2" * 64))
            journal.append(
                PeerHead(
                    session=SESSION, number=0, peer=folder.identity.uri, log=head.log.hex(), rows=head.rows, head=head.hash.hex(),
                    signature=head.signature.hex(), certificate=base64.b64encode(folder.cert_der).decode(),
                )
            )  # fmt: skip
    return keys


@pytest.fixture
def keys(site, tmp_path) -> Path:
    return Path(shutil.copytree(site, tmp_path / "keys"))


def verified(command, *argv: object) -> tuple[int, dict[str, object]]:
    code, out, _ = command("audit", "verify", *argv, "--output", "json")
    return code, json.loads(out)


def test_a_whole_log(command, keys):
    code, found = verified(command, keys / "gpu" / "audit")
    assert (code, found["valid"], found["rows"], found["files"]) == (0, True, 18, 1)
    assert found["party"] == "spiffe://securesplit.local/securesplit/server/gpu"
    code, out, _ = command("audit", "verify", keys / "gpu")
    assert code == 0
    assert "whole; the log of spiffe://securesplit.local/securesplit/server/gpu" in out


def test_two_ends(command, keys):
    code, found = verified(command, keys / "gpu", "--with", keys / "alice")
    assert (code, found["compared"]) == (0, 3)


TAMPER = {
    "one byte changed": lambda lines: [*lines[:4], lines[4].replace(b"51842", b"51843"), *lines[5:]],
    "a line removed": lambda lines: [*lines[:4], *lines[5:]],
    "two lines swapped": lambda lines: [*lines[:4], lines[5], lines[4], *lines[6:]],
    "the tail cut": lambda lines: lines[:-2],
}


@pytest.mark.parametrize("how", TAMPER)
def test_tampering(command, keys, how):
    file = keys / "gpu" / "audit" / "000001.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(TAMPER[how](lines)))
    code, found = verified(command, keys / "gpu" / "audit")
    assert (code, found["valid"]) == (1, False)
    assert found["code"] == ("SS-1581" if how == "the tail cut" else "SS-1580")
    code, _, err = command("audit", "verify", file)
    assert code == 1
    assert f"error[{found['code']}]" in err
    assert "000001.jsonl line" in err


def test_a_whole_file_replaced(command, keys):
    """By the log of another party, by an older log of the same one, and by a log of its own maker's key."""
    shutil.copy(keys / "alice" / "audit" / "000001.jsonl", keys / "gpu" / "audit" / "000001.jsonl")
    assert verified(command, keys / "gpu")[1]["code"] in {"SS-1580", "SS-1582"}
    for name in ("000001.jsonl", "head"):
        shutil.copy(keys / "alice" / "audit" / name, keys / "gpu" / "audit" / name)
    code, found = verified(command, keys / "gpu")
    assert (code, found["code"]) == (1, "SS-1582")
    assert "holds the log of spiffe://securesplit.local/securesplit/client/alice" in str(found["what"])
    # A younger log of the same party, whole in itself: the other end alone has seen another one.
    shutil.rmtree(keys / "gpu" / "audit")
    with open_journal(KeyFolder.open(keys / "gpu", "server")) as journal:
        journal.append(KNOCK)
    assert verified(command, keys / "gpu")[0] == 0
    code, found = verified(command, keys / "gpu", "--with", keys / "alice")
    assert (code, found["code"]) == (1, "SS-1583")


def test_a_log_of_another_authoritys_party_is_not_believed(command, keys, tmp_path):
    Authority.create(tmp_path / "forged").issue("gpu", "server", ips=["127.0.0.1"])
    with open_journal(KeyFolder.open(tmp_path / "forged" / "gpu", "server"), path=tmp_path / "log") as journal:
        journal.append(KNOCK)
    shutil.rmtree(keys / "gpu" / "audit")
    shutil.copytree(tmp_path / "log", keys / "gpu" / "audit")
    code, found = verified(command, keys / "gpu" / "audit")
    assert (code, found["code"]) == (1, "SS-1582")


def test_far_from_the_keys_the_trust_has_to_be_named(command, keys, tmp_path):
    copy = Path(shutil.copytree(keys / "gpu" / "audit", tmp_path / "evidence"))
    code, _, err = command("audit", "verify", copy)
    assert code == 2
    assert "SS-1588" in err
    assert verified(command, copy, "--ca", keys / "ca" / "cert.pem")[0] == 0
    assert verified(command, copy, "--key", keys / "gpu", "--key", keys / "alice" / "cert.pem")[0] == 0
    code, found = verified(command, copy, "--key", keys / "gpu")
    assert (code, found["code"]) == (1, "SS-1582")  # The head that alice showed is signed by alice.
    code, _, err = command("audit", "verify", copy, "--key", keys / "gpu" / "key.pem")
    assert code == 2
    assert "SS-1588" in err


def test_a_renewed_certificate_and_a_revoked_one(command, keys):
    """A log outlives its certificates: what was signed before a revocation stays true."""
    authority = Authority.open(keys)
    authority.revoke("gpu")
    code, _ = verified(
        command, keys / "gpu" / "audit", "--ca", keys / "ca" / "cert.pem", "--crl", keys / "ca" / "crl.pem"
    )
    assert code == 0


def test_no_log(command, tmp_path):
    for verb in ("verify", "tail"):
        code, _, err = command("audit", verb, tmp_path, *(["--ca", tmp_path] if verb == "none" else []))
        assert code == 2
        assert "SS-158" in err


def test_tail(command, keys):
    code, out, _ = command("audit", "tail", keys / "gpu", "-n", 3)
    assert code == 0
    assert [line.split()[2] for line in out.splitlines()] == ["peer-head", "head", "ended"]
    code, out, _ = command("audit", "tail", keys / "gpu" / "audit", "-n", 100, "--output", "json")
    rows = json.loads(out)["rows"]
    assert [row["index"] for row in rows] == list(range(18))
    assert [row["code"] for row in rows if row["kind"] == "refused"] == ["SS-3205"] * 12
    code, out, _ = command("audit", "tail", keys / "gpu", "-n", 100)
    assert "refused     address=10.0.0.7:51842 code=SS-3205 count=1 stage=tls" in out


def test_tail_follows(keys):
    with subprocess.Popen(
        [sys.executable, "-m", "securesplit", "audit", "tail", keys / "alice", "-n", "1", "-f"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert "ended" in process.stdout.readline()
            with open_journal(KeyFolder.open(keys / "alice", "client")) as journal:
                journal.append(KNOCK)
                assert [process.stdout.readline().split()[2] for _ in range(3)] == ["continued", "head", "refused"]
        finally:
            process.kill()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl program is the oracle")
def test_openssl_agrees_about_a_head(keys, tmp_path):
    head = read_sealed(keys / "gpu" / "audit" / "head").latest
    files = {"data": statement(head.log, head.rows, head.hash), "signature": head.signature}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    public = subprocess.run(
        ["openssl", "x509", "-in", keys / "gpu" / "cert.pem", "-pubkey", "-noout"], capture_output=True, check=True
    ).stdout
    (tmp_path / "public.pem").write_bytes(public)
    said = subprocess.run(
        ["openssl", "dgst", "-sha256", "-verify", tmp_path / "public.pem", "-signature", tmp_path / "signature", tmp_path / "data"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    assert said.strip() == "Verified OK"
