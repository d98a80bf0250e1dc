"""`securesplit certs`, whole lives through the command line: two machines, encrypted keys, renewal, exchange, status, lint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from securesplit.pki.store import KeyFolder
from tests.pki.forge import forge
from tests.pki.oracle import needs_openssl, openssl, verdict

FIVE = {"path", "serial", "not_after", "uri_san", "fingerprint"}


@pytest.fixture
def certs(command):
    """One command with ``--output json``: its object; the exit code must be the one given."""

    def call(*argv: object, exits: int = 0) -> dict[str, object]:
        code, out, err = command("certs", *argv, "--output", "json")
        assert code == exits, err
        said = json.loads(out)
        assert set(said) >= FIVE
        assert out.count("\n") == 1
        return said

    return call


@pytest.fixture
def refused(command):
    """One command that fails: its code on stderr, its exit status, nothing on stdout."""

    def call(*argv: object) -> tuple[str, int]:
        code, out, err = command("certs", *argv)
        assert out == ""
        assert err.startswith("error[SS-"), err
        assert "\nhint: " in err
        assert "Traceback" not in err
        return err[6:13], code

    return call


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "pass"
    file.write_text("six random words of a passphrase\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def terminal(monkeypatch):
    """A person at a terminal who types these answers, in order."""
    typed: list[str] = []

    def say(*answers: str) -> None:
        typed.extend(answers)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True)
        monkeypatch.setattr("typer.prompt", lambda *_, **more: [typed.pop(0), more][0])
        monkeypatch.setattr("typer.confirm", lambda *_, **__: typed.pop(0) == "yes")

    return say


@needs_openssl
def test_two_machines_and_a_telephone(certs, refused, tmp_path: Path) -> None:
    office, site = tmp_path / "office", tmp_path / "site"
    root = certs("init-ca", "--keys", office, "--domain", "hospital.example", "--intermediate")
    asked = certs("request", "alice", "--role", "client", "--domain", "hospital.example", "--keys", site)
    assert asked["uri_san"] == "spiffe://hospital.example/securesplit/client/alice"
    carried = tmp_path / "alice.csr"
    shutil.copy(str(asked["path"]), carried)
    assert refused("approve", carried, "--keys", office) == ("SS-1818", 2)
    assert refused("approve", carried, "--keys", office, "--words", root["words"]) == ("SS-1818", 2)
    signed = certs("approve", carried, "--keys", office, "--words", asked["words"])
    assert (signed["words"], signed["authority_words"]) == (asked["words"], root["words"])
    assert signed["path"] == str(tmp_path / "alice.signed.pem")
    assert refused("import", "alice", signed["path"], "--keys", site) == ("SS-1819", 2)
    taken = certs("import", "alice", signed["path"], "--keys", site, "--authority", root["words"])
    assert (taken["serial"], taken["new_key"]) == (signed["serial"], True)
    assert verdict(site / "alice", "client") == "OK"
    assert not (office / "alice").exists()
    out = tmp_path / "alice.p12"
    pass_file = tmp_path / "p"
    pass_file.write_text("a passphrase for the file")
    pass_file.chmod(0o600)
    assert certs("export-p12", "alice", out, "--keys", site, "--pass-file", pass_file)["serial"] == signed["serial"]
    assert openssl("pkcs12", "-in", out, "-passin", f"file:{pass_file}", "-noout").returncode == 0
    # A month later, without the site's help and without a telephone call.
    renewed = certs("renew", "alice", "--keys", office, "--force", "--out", tmp_path / "next.pem")
    assert renewed["path"] == str(tmp_path / "next.pem")
    key = (site / "alice/key.pem").read_bytes()
    assert certs("import", "alice", tmp_path / "next.pem", "--keys", site)["new_key"] is False
    assert (site / "alice/key.pem").read_bytes() == key
    assert certs("status", "--keys", site / "alice")["due"] == 0


def test_an_exchange_of_the_authority(certs, refused, command, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    certs("init-ca", "--keys", keys)
    certs("issue", "gpu", "--role", "server", "--keys", keys)
    certs("issue", "alice", "--role", "client", "--keys", keys)
    assert certs("renew", "alice", "--keys", keys)["renewed"] is False
    assert certs("renew", "--all", "--keys", keys)["renewed"] == []
    assert certs("status", "--keys", keys)["due"] == 0
    begun = certs("rotate-ca", "--keys", keys)
    assert len(begun["waiting"]) == 2
    due = certs("status", "--keys", keys, exits=1)
    assert due["due"] == 3
    code, out, err = command("certs", "status", "--keys", keys)
    assert (code, out.count("\n")) == (1, 6)
    assert "certs renew alice" in out
    assert err.startswith("error[SS-1826]: 3 of 6")
    assert refused("rotate-ca", "--keys", keys, "--finish") == ("SS-1824", 1)
    done = certs("renew", "--all", "--keys", keys)
    assert len(done["renewed"]) == 2
    assert all(set(one) >= FIVE for one in done["parties"])
    assert certs("rotate-ca", "--keys", keys, "--finish")["finished"] is True
    assert certs("status", "--keys", keys)["due"] == 0
    KeyFolder.open(keys / "gpu", "server").verify_peer(KeyFolder.open(keys / "alice", "client").cert_der, "client")
    assert refused("rotate-ca", "--keys", keys, "--finish") == ("SS-1823", 2)


def test_encrypted_keys_by_file_by_descriptor_and_by_hand(
    certs, refused, command, terminal, secret, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    certs("init-ca", "--keys", keys, "--ca-pass-file", secret)
    assert b"ENCRYPTED" in (keys / "ca/key.pem").read_bytes()
    assert refused("issue", "alice", "--role", "client", "--keys", keys) == ("SS-3104", 4)
    with secret.open("rb") as file:
        certs(
            "issue", "alice", "--role", "client", "--keys", keys, "--ca-pass-fd", file.fileno(), "--key-type", "ed25519"
        )
        assert os.fstat(file.fileno())
    secret.chmod(0o644)
    assert refused("crl", "--keys", keys, "--ca-pass-file", secret) == ("SS-3101", 4)
    secret.chmod(0o600)
    both = command("certs", "crl", "--keys", keys, "--ca-pass-file", secret, "--ca-pass-fd", "3")
    assert both[0] == 2
    assert refused("init-ca", "--keys", tmp_path / "two", "--encrypt-key") == ("SS-1814", 2)
    terminal("six random words of a passphrase")
    certs("crl", "--keys", keys)
    terminal("short")
    assert refused("init-ca", "--keys", tmp_path / "two", "--encrypt-key") == ("SS-1815", 2)
    terminal("typed by hand at last", "typed by hand at last")
    certs("init-ca", "--keys", tmp_path / "two", "--encrypt-key")
    certs("issue", "bob", "--role", "client", "--keys", tmp_path / "two")
    for argv in (["init-ca", "--help"], ["issue", "--help"], ["export-p12", "--help"]):
        shown = command("certs", *argv)[1]
        assert "--passphrase" not in shown
        assert "--password" not in shown


def test_a_person_confirms_words_or_does_not(certs, command, terminal, tmp_path: Path) -> None:
    office, site = tmp_path / "office", tmp_path / "site"
    certs("init-ca", "--keys", office)
    asked = certs("request", "alice", "--role", "client", "--keys", site)
    terminal("no")
    code, out, err = command("certs", "approve", asked["path"], "--keys", office)
    assert (code, out) == (2, "")
    assert str(asked["words"]) in err
    assert "error[SS-1818]" in err
    terminal("yes")
    signed = certs("approve", asked["path"], "--keys", office, "--out", tmp_path / "a.pem")
    assert signed["path"] == str(tmp_path / "a.pem")


def test_lint_prints_everything_and_fails_on_errors_alone(certs, command, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    certs("init-ca", "--keys", keys)
    certs("issue", "alice", "--role", "client", "--keys", keys)
    clean = certs("lint", keys)
    assert (clean["errors"], clean["warnings"]) == (0, 1)
    forged = forge(keys, "rsa-1024")
    forged.folder.chmod(0o755)
    found = certs("lint", forged.folder, exits=1)
    assert {one["rule"] for one in found["findings"]} >= {"mode", "key-size", "key-type", "verify"}
    code, out, err = command("certs", "lint", forged.folder)
    assert code == 1
    assert "1024 bits" in out
    assert err.startswith("error[SS-1826]")
    assert command("certs", "lint", tmp_path / "none")[0] == 2


def test_options_that_contradict_each_other_are_usage_errors(command, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    for argv in (
        ("init-ca", "--root", tmp_path / "r"),
        ("renew",),
        ("renew", "alice", "--all"),
        ("renew", "--all", "--new-key", "p256"),
        ("init-ca", "--key-type", "rsa"),
    ):
        assert command("certs", *argv, "--keys", keys)[0] == 2
    assert not keys.exists()


def test_what_inspect_says(certs, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    certs("init-ca", "--keys", keys)
    certs("issue", "gpu", "--role", "server", "--dns", "gpu.example", "--key-type", "ed25519", "--keys", keys)
    said = certs("inspect", keys / "gpu")
    assert (said["key_type"], said["hosts"], said["purposes"]) == ("ed25519", ["gpu.example"], ["server"])
    assert str(said["not_before"]) < str(said["renew_from"]) < str(said["not_after"])
    assert certs("inspect", keys / "ca")["words"]


@needs_openssl
def test_a_root_in_a_safe_is_exchanged_by_its_own_word(certs, refused, secret, tmp_path: Path) -> None:
    keys, safe = tmp_path / "keys", tmp_path / "safe"
    certs("init-ca", "--keys", keys, "--intermediate", "--root", safe / "one", "--root-pass-file", secret)
    certs("issue", "alice", "--role", "client", "--keys", keys)
    assert refused("rotate-ca", "--keys", keys, "--keep-root") == ("SS-1821", 2)
    assert refused("rotate-ca", "--keys", keys, "--root", safe / "one") == ("SS-3104", 4)
    root = ("--root", safe / "one", "--root-pass-file", secret)
    begun = certs("rotate-ca", "--keys", keys, *root, "--new-root", safe / "two")
    assert begun["vouched"] is True
    assert b"ENCRYPTED" in (safe / "two/key.pem").read_bytes()
    certs("renew", "--all", "--keys", keys)
    certs("rotate-ca", "--keys", keys, "--finish")
    assert verdict(keys / "alice", "client") == "OK"
    assert refused("crl", "--keys", keys, *root) == ("SS-1821", 2)
    certs("crl", "--keys", keys, "--root", safe / "two", "--root-pass-file", secret)
    begun = certs("rotate-ca", "--keys", keys, "--keep-root", "--root", safe / "two", "--root-pass-file", secret)
    certs("renew", "--all", "--keys", keys)
    certs("rotate-ca", "--keys", keys, "--finish")
    assert verdict(keys / "alice", "client") == "OK"
