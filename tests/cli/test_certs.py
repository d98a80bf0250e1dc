from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from securesplit.cli.certs import app
from securesplit.errors import ConnectionFailed, InputError, SecureSplitError

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"path", "serial", "not_after", "uri_san", "fingerprint"}


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def as_json(*arguments: object) -> dict[str, object]:
    said = json.loads(run(*arguments, "--output", "json"))
    assert set(said) >= KEYS
    return said  # type: ignore[no-any-return]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_a_life_in_json(keys: Path) -> None:
    root = as_json("init-ca", "--keys", keys, "--domain", "hospital.example")
    assert root["uri_san"] == "spiffe://hospital.example"
    server = as_json("issue", "gpu", "--role", "server", "--dns", "gpu.example", "--ip", "10.0.0.7", "--keys", keys)
    client = as_json("issue", "alice", "--role", "client", "--keys", keys)
    assert server["uri_san"] == "spiffe://hospital.example/securesplit/server/gpu"
    assert client["path"] == str(keys / "alice" / "cert.pem")
    assert as_json("inspect", keys / "alice").items() >= client.items()
    assert as_json("inspect", keys / "gpu" / "cert.pem").items() >= server.items()
    assert {key: as_json("inspect", keys / "ca")[key] for key in (*KEYS, "words")} == {
        key: root[key] for key in (*KEYS, "words")
    }
    revoked = as_json("revoke", "alice", "--keys", keys)
    assert revoked["serial"] == client["serial"]
    assert revoked["path"] == str(keys / "ca" / "crl.pem")
    again = as_json("crl", "--keys", keys)
    assert (again["revoked_now"], again["revoked_total"]) == ([], 1)
    assert again["not_after"] >= revoked["not_after"]  # type: ignore[operator]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl program is the oracle")
def test_the_json_agrees_with_openssl(keys: Path) -> None:
    run("init-ca", "--keys", keys)
    said = as_json("issue", "gpu", "--role", "server", "--keys", keys)
    read = subprocess.run(
        ["openssl", "x509", "-in", str(said["path"]), "-noout", "-serial", "-fingerprint", "-sha256", "-ext", "subjectAltName"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert f"serial={said['serial']}\n" in read
    assert str(said["fingerprint"]) in read.replace(":", "").lower()
    assert f"URI:{said['uri_san']}, DNS:localhost, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1" in read


def test_text_for_people(keys: Path) -> None:
    assert "certificate authority" in run("init-ca", "--keys", keys)
    said = run("issue", "alice", "--role", "client", "--keys", keys)
    assert "spiffe://securesplit.local/securesplit/client/alice" in said
    assert "PRIVATE" not in said
    assert "None" not in run("revoke", "alice", "--keys", keys)


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (("init-ca",), InputError, "SS-1805"),
        (("issue", "Alice", "--role", "client"), InputError, "SS-1801"),
        (("issue", "ca", "--role", "client"), InputError, "SS-1801"),
        (("issue", "alice", "--role", "client"), InputError, "SS-1809"),
        (("issue", "bob", "--role", "client", "--dns", "localhost"), InputError, "SS-1808"),
        (("issue", "bob", "--role", "client", "--days", "0"), InputError, "SS-1806"),
        (("revoke", "bob"), InputError, "SS-1810"),
    ],
)
def test_errors_bubble_up(keys: Path, arguments: tuple[str, ...], kind: type[SecureSplitError], code: str) -> None:
    run("init-ca", "--keys", keys)
    run("issue", "alice", "--role", "client", "--keys", keys)
    with pytest.raises(kind) as caught:
        run(*arguments, "--keys", keys)
    assert caught.value.code == code
    assert caught.value.hint


def test_nothing_to_work_with(tmp_path: Path) -> None:
    for arguments, code in (
        (("issue", "alice", "--role", "client", "--keys", tmp_path), "SS-1807"),
        (("crl", "--keys", tmp_path), "SS-1807"),
        (("inspect", tmp_path / "none.pem"), "SS-1812"),
        (("inspect", tmp_path), "SS-1812"),
    ):
        with pytest.raises(InputError) as caught:
            run(*arguments)
        assert caught.value.code == code


def test_a_missing_or_unknown_role_is_a_usage_error(keys: Path) -> None:
    run("init-ca", "--keys", keys)
    for role in ([], ["--role", "admin"]):
        result = CliRunner().invoke(app, ["issue", "bob", "--keys", str(keys), *role])
        assert result.exit_code == 2
    assert not (keys / "bob").exists()


def test_a_loose_authority_is_refused(keys: Path) -> None:
    run("init-ca", "--keys", keys)
    (keys / "ca" / "key.pem").chmod(0o644)
    with pytest.raises(ConnectionFailed) as caught:
        run("issue", "alice", "--role", "client", "--keys", keys)
    assert caught.value.code == "SS-3101"


def test_start_up_imports_no_cryptography_and_no_torch() -> None:
    script = (
        "import sys, securesplit.cli.certs; print([m for m in ('cryptography', 'torch', 'ssl') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert found.strip() == "[]"


# --- scripts/provision ------------------------------------------------------------------------------------------------


def provision(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "provision"), *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_provision_makes_everything_and_a_second_run_adds_only_what_is_new(keys: Path) -> None:
    first = ("--keys", keys, "--server", "gpu", "--dns", "localhost", "--client", "alice", "--client", "bob")
    done = provision(*first)
    assert done.returncode == 0, done.stderr
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in keys.rglob("*.pem")}
    assert {path.parent.name for path in before} == {"ca", "issued", "gpu", "alice", "bob"}
    again = provision(*first, "--client", "carol")
    assert again.returncode == 0, again.stderr
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert (keys / "carol" / "cert.pem").exists()
    assert again.stdout.count("kept") == 3


def test_provision_does_not_bring_back_who_was_shut_out_nor_change_a_role(keys: Path) -> None:
    provision("--keys", keys, "--server", "gpu", "--client", "alice")
    run("revoke", "alice", "--keys", keys)
    before = (keys / "alice" / "cert.pem").read_bytes()
    assert "kept" in provision("--keys", keys, "--client", "alice").stdout
    assert (keys / "alice" / "cert.pem").read_bytes() == before
    refused = provision("--keys", keys, "--server", "alice")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error[SS-1813]: ")
    assert "\nhint: " in refused.stderr
