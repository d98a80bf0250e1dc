"""A whole site from one file. The oracle of "touches nothing else" is a hash of the whole tree."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError
from securesplit.pki.authority import Authority
from securesplit.pki.roster import load_roster, parse_roster, provision
from securesplit.pki.store import KeyFolder
from tests.pki.oracle import needs_openssl, verdict

ROOT = Path(__file__).resolve().parents[2]
SITE = """
domain = "hospital.example"
[authority]
intermediate = true
permit_dns = ["hospital.example", "localhost"]
[[server]]
name = "gpu"
dns = ["gpu.hospital.example"]
ips = ["10.0.0.7"]
[[client]]
name = "alice"
[[client]]
name = "bob"
key_type = "ed25519"
days = 7
"""
CAROL = '[[client]]\nname = "carol"\n'


def tree(keys: Path) -> dict[str, str]:
    """Every file and folder below, with its content, mode and time of change."""
    found = {}
    for path in sorted(keys.rglob("*")):
        stat = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(keys))] = f"{stat.st_mode:o} {stat.st_mtime_ns if path.is_file() else ''} {content}"
    return found


@needs_openssl
def test_a_site_and_one_client_more(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    done = provision(keys, parse_roster(SITE))
    assert [one.done for one in done] == ["issued"] * 3
    for name, role in (("gpu", "server"), ("alice", "client"), ("bob", "client")):
        assert verdict(keys / name, role) == "OK"
        assert KeyFolder.open(keys / name, role).identity.domain == "hospital.example"  # type: ignore[arg-type]
    before = tree(keys)
    assert [one.done for one in provision(keys, parse_roster(SITE))] == ["kept"] * 3
    assert tree(keys) == before, "run again, it changes nothing at all"
    done = provision(keys, parse_roster(SITE + CAROL))
    assert [one.uri.rsplit("/", 1)[1] for one in done if one.done == "issued"] == ["carol"]
    after = tree(keys)
    assert {name: after[name] for name in before} == before
    new = {name for name in set(after) - set(before) if not name.startswith("ca/issued/")}
    assert new == {"carol", *(f"carol/{file}.pem" for file in ("cert", "key", "chain", "ca", "crl"))}


def test_a_folder_that_was_handed_over_is_not_made_again(tmp_path: Path) -> None:
    import shutil

    keys = tmp_path / "keys"
    provision(keys, parse_roster(SITE))
    shutil.move(keys / "alice", tmp_path / "alice")
    before = tree(keys)
    assert [one.done for one in provision(keys, parse_roster(SITE))] == ["kept"] * 3
    assert tree(keys) == before


def test_who_is_out_stays_out_and_what_differs_is_told(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    provision(keys, parse_roster(SITE))
    Authority.open(keys).revoke("alice")
    before = tree(keys)
    other = SITE.replace("10.0.0.7", "10.0.0.8")
    told = {one.uri.rsplit("/", 1)[1]: (one.done, one.why) for one in provision(keys, parse_roster(other))}
    assert told["alice"] == ("kept", "revoked")
    assert told["gpu"][0] == "differs"
    later = provision(keys, parse_roster(SITE), now=datetime.now(UTC) + timedelta(days=8))
    assert [one.why[:7] for one in later if one.uri.endswith("bob")] == ["expired"]
    for wrong in (
        SITE.replace("hospital.example", "other.example"),
        SITE.replace('name = "bob"', 'name = "gpu2"').replace('"gpu"', '"bob"'),
    ):
        with pytest.raises(InputError, match=r"SS-1825|SS-1813"):
            provision(keys, parse_roster(wrong))
    assert tree(keys) == before


def test_every_fault_of_a_roster_at_once() -> None:
    with pytest.raises(InputError) as caught:
        parse_roster(
            'domain = "Hospital"\nunknown = 1\n[authority]\ndays = 0\nkey_type = "rsa"\n'
            '[[server]]\nname = "Gpu"\ndns = ["*.x"]\n[[client]]\nname = "a"\ndns = ["x"]\n[[client]]\nname = "a"\n[[client]]\n'
        )
    assert caught.value.code == "SS-1825"
    told = "\n".join(caught.value.details)
    for part in ("domain", "unknown: unknown key", "authority.days", "authority.key_type", "server.0.name", "not a host name",
                 "client.0.dns: unknown key", "'a' is named 2 times", "client.2.name"):  # fmt: skip
        assert part in told, part
    assert len(caught.value.details) == 9


@given(st.text(max_size=60))
@settings(max_examples=80, deadline=None)
def test_text_that_is_no_roster(text: str) -> None:
    try:
        parse_roster(text)
    except InputError as error:
        assert error.code == "SS-1825"  # noqa: PT017


def run(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/provision"), *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=60, **more,
    )  # type: ignore[call-overload, no-any-return]  # fmt: skip


def test_the_script_with_a_roster_and_an_encrypted_authority(tmp_path: Path) -> None:
    keys, site, secret = tmp_path / "keys", tmp_path / "site.toml", tmp_path / "pass"
    site.write_text(SITE)
    secret.write_text("six random words of a passphrase\n")
    secret.chmod(0o600)
    done = run(site, "--keys", keys, "--ca-pass-file", secret)
    assert (done.returncode, done.stdout.count("issued")) == (0, 3), done.stderr
    assert b"ENCRYPTED" in (keys / "ca/key.pem").read_bytes()
    before = tree(keys)
    site.write_text(SITE + CAROL)
    refused = run(site, "--keys", keys, stdin=subprocess.DEVNULL)
    assert refused.returncode == 4
    assert "SS-3104" in refused.stderr
    done = run(site, "--keys", keys, "--ca-pass-file", secret)
    assert (done.returncode, done.stdout.count("kept")) == (0, 3), done.stderr
    assert {name: tree(keys)[name] for name in before} == before
    site.write_text(SITE.replace("10.0.0.7", "10.0.0.8"))
    assert run(site, "--keys", keys, "--ca-pass-file", secret).returncode == 1
    site.write_text("x = 1\ny = 2\n")
    faulty = run(site, "--keys", keys)
    assert faulty.returncode == 2
    assert faulty.stderr.count("unknown key") == 2
    assert run(site, "--keys", keys, "--client", "x").returncode == 2


def test_the_help_shows_a_roster_that_loads(tmp_path: Path) -> None:
    shown = run("--help").stdout.split("A whole roster:", 1)[1].split("Add a line", 1)[0]
    (tmp_path / "site.toml").write_text("\n".join(line.removeprefix("    ") for line in shown.splitlines()))
    roster = load_roster(tmp_path / "site.toml")
    assert (roster.domain, roster.server[0].dns) == ("hospital.example", ["gpu.hospital.example"])
