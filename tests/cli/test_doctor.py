"""``doctor``: each fault is found by its own check, and ``--connect`` says at which step a connection ends."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
from typer.testing import CliRunner

from securesplit.cli.main import app
from securesplit.pki.authority import Authority
from tests.e2e.house import House, Loopback, build_house, policy_of

STEPS = ["tcp", "handshake", "key-exchange", "server", "clocks", "hello"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("template") / "house")


@pytest.fixture
def house(template, tmp_path):
    shutil.copytree(template.keys, tmp_path / "keys")
    return House(tmp_path, tmp_path / "keys", template.model)


def doctor(*argv):
    """Exit code and the checks by name; each is told once, with what to do when something is to be done."""
    done = CliRunner().invoke(app, ["doctor", "--output", "json", *map(str, argv)])
    said = json.loads(done.stdout)
    assert said["ok"] == (done.exit_code == 0)
    assert said["failed"] == sum(check["status"] == "fail" for check in said["checks"])
    for check in said["checks"]:
        assert check["status"] in {"ok", "warn", "fail"}
        assert check["what"]
        assert check["status"] == "ok" or check["hint"], check
    return done.exit_code, {check["name"]: check for check in said["checks"]}


def test_a_machine_without_keys():
    code, found = doctor()
    assert code == 0
    assert set(found) == {"python", "packages", "tls", "post-quantum", "disk"}


def test_a_healthy_party(house):
    for name in ("alice", "gpu"):
        code, found = doctor("--keys", house.keys / name)
        assert code == 0, found
        assert {found[check]["status"] for check in ("keys", "certificate", "crl", "clock")} == {"ok"}
        assert ("ledger" in found) == (name == "alice")
    text = CliRunner().invoke(app, ["doctor", "--keys", str(house.keys / "alice")]).stdout
    assert "spiffe://securesplit.local/securesplit/client/alice" in text


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda folder: (folder / "key.pem").chmod(0o644), "SS-3101"),
        (lambda folder: (folder / "key.pem").write_bytes(b""), "SS-3102"),
        (lambda folder: (folder / "ca.pem").unlink(), "SS-3100"),
        (lambda folder: Authority.open(folder.parent).revoke("alice"), "SS-3205"),
    ],
)
def test_a_fault_has_its_code_and_exit_status_1(house, damage, code):
    damage(house.keys / "alice")
    status, found = doctor("--keys", house.keys / "alice")
    assert status == 1
    assert (found["keys"]["status"], found["keys"]["code"]) == ("fail", code)


def test_a_damaged_ledger(house):
    (house.keys / "alice/ledger").mkdir(mode=0o700)
    (house.keys / "alice/ledger/ledger.sqlite").write_bytes(b"nonsense")
    status, found = doctor("--keys", house.keys / "alice")
    assert status == 1
    assert found["ledger"]["status"] == "fail"
    assert found["ledger"]["code"].startswith("SS-20")


def test_a_walk_to_a_server(house):
    with Loopback(house.core(house.job(), policy_of()), house.keys) as loop:
        code, found = doctor("--keys", house.keys / "alice", "--connect", loop.url)
        assert code == 0, found
        assert [name for name in found if name in STEPS] == [s for s in STEPS if s in found]
        assert set(STEPS) - set(found) <= {"key-exchange"}, "which OpenSSL 3.5 has no reason to mention"
        assert "TLSv1.3, keys exchanged by X25519" in found["handshake"]["what"]
        assert "server/gpu" in found["server"]["what"]
        Authority.open(house.keys).issue("dave", "client")
        code, found = doctor("--keys", house.keys / "dave", "--connect", loop.url)
        assert code == 1
        assert (found["admission"]["status"], found["admission"]["code"]) == ("fail", "SS-3214")
        code, found = doctor("--keys", house.keys / "alice", "--connect", loop.url.replace("localhost", "127.1"))
        assert code == 1
        assert found["admission"]["code"] == "SS-3212"
        assert "hello" not in found


def test_a_walk_to_nobody_and_to_somebody_else(house):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code, found = doctor("--keys", house.keys / "alice", "--connect", f"wss://localhost:{port}")
    assert (code, found["tcp"]["code"]) == (1, "SS-3033")
    assert "handshake" not in found
    done = CliRunner().invoke(app, ["doctor", "--connect", "wss://localhost:1"])
    assert done.exit_code != 0
