"""Officers on the command line: sign, verify, and commands that hold to what was signed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from securesplit.policy.load import load_policy
from tests.e2e.house import FROZEN, Loopback, policy_text


@pytest.fixture
def signed(tmp_path, command) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(policy_text(FROZEN))
    assert command("policy", "keygen", tmp_path / "officer")[0] == 0
    assert command("policy", "sign", path, "--key", tmp_path / "officer", "--output", "json")[0] == 0
    return path


def loosened(path: Path) -> None:
    text = path.read_text()
    assert "epsilon = 8.0" in text
    path.write_text(text.replace("epsilon = 8.0", "epsilon = 80.0"))


def test_a_key_pair_signs_and_verifies(signed, command):
    code, out, err = command("policy", "verify", signed, "--key", f"{signed.parent}/officer.pub", "--output", "json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["valid"] is True
    assert found["digest"] == load_policy(signed).digest
    assert found.keys() == {"valid", "digest", "key", "signed", "expires"}
    code, out, _ = command("policy", "keygen", signed.parent / "other", "--output", "json")
    assert json.loads(out)["fingerprint"] != found["key"]
    code, out, err = command("policy", "verify", signed, "--key", f"{signed.parent}/other.pub")
    assert (code, out) == (3, "")
    assert err.startswith("error[SS-2063]: ")


def test_a_tampered_policy_is_refused_with_exit_3(signed, command):
    loosened(signed)
    code, out, err = command("policy", "verify", signed, "--key", f"{signed.parent}/officer.pub", "--output", "json")
    assert (code, out) == (3, "")
    assert err.startswith("error[SS-2063]: ")
    assert "changed since" in err


def test_a_key_with_a_passphrase(tmp_path, command):
    secret, path = tmp_path / "secret", tmp_path / "site.toml"
    secret.write_text("a long enough passphrase\n")
    secret.chmod(0o600)
    path.write_text(policy_text(FROZEN))
    assert command("policy", "keygen", tmp_path / "o", "--passphrase-file", secret)[0] == 0
    code, _, err = command("policy", "sign", path, "--key", tmp_path / "o")
    assert code == 2
    assert err.startswith("error[SS-1120]: ")
    assert "passphrase\n" not in err
    code, out, _ = command("policy", "sign", path, "--key", tmp_path / "o", "--passphrase-file", secret, "--days", 7)
    assert code == 0
    assert "tiny" in out


@pytest.mark.parametrize("pinned", [False, True])
def test_commands_refuse_an_unsigned_or_a_tampered_policy_before_anything_else(signed, command, house, pinned):
    alice, gpu = house.keys / "alice", house.keys / "gpu"
    officers = signed.parent / "officer.pub"
    option = [] if pinned else ["--policy-key", officers]
    if pinned:
        for keys in (alice, gpu):
            (keys / "officers.pem").write_bytes(officers.read_bytes())
    data = house.data("d.jsonl", 2, seed=1)
    (signed.parent / "pairs.jsonl").write_text(json.dumps({"prompt": "w4", "answer": "w5"}) + "\n")
    (signed.parent / "run").mkdir()
    (signed.parent / "run" / "adapter-back.safetensors").touch()
    evaluated = ("--task", "pairs", "--data", signed.parent / "pairs.jsonl", "--checkpoints", signed.parent / "run")
    calls = (
        ("train", "--keys", alice, "--server", "wss://localhost:1", "--data", data, "--out", signed.parent / "out"),
        ("generate", "--keys", alice, "--server", "wss://localhost:1", "--prompt", "w5"),
        ("eval", *evaluated, "--keys", alice, "--server", "wss://localhost:1", "--out", signed.parent / "answers"),
        ("serve", "--keys", gpu, "--job", Path(__file__).parents[2] / "examples/job.toml", "--listen", "127.0.0.1:0"),
    )
    loosened(signed)
    for name, *rest in calls:
        code, out, err = command(name, "--policy", signed, *option, *rest)
        assert (code, out) == (3, ""), name
        assert "error[SS-2063]: " in err
    signed.with_name("site.toml.sig").unlink()
    for name, *rest in calls:
        code, _, err = command(name, "--policy", signed, *option, *rest)
        assert (code, "error[SS-2062]: " in err) == (3, True), name
    assert not (signed.parent / "out").exists()
    assert not (signed.parent / "answers").exists()


def test_the_folder_above_a_partys_folder_does_not_hide_its_officers_and_each_refusal_is_logged(
    signed, command, house, tmp_path
):
    keys = Path(shutil.copytree(house.keys, tmp_path / "keys"))
    for name in ("gpu", "alice"):
        shutil.rmtree(keys / name / "audit", ignore_errors=True)
        (keys / name / "officers.pem").write_bytes((signed.parent / "officer.pub").read_bytes())
    loosened(signed)
    job = Path(__file__).parents[2] / "examples/job.toml"
    for folder in (keys, keys / "gpu"):
        code, _, err = command("serve", "--policy", signed, "--keys", folder, "--job", job, "--listen", "127.0.0.1:0")
        assert (code, "error[SS-2063]: " in err) == (3, True)
        assert "warning" not in err
    assert command("policy", "keygen", tmp_path / "evil")[0] == 0
    assert command("policy", "sign", signed, "--key", tmp_path / "evil")[0] == 0
    code, _, err = command(
        "generate", "--policy", signed, "--policy-key", tmp_path / "evil.pub", "--keys", keys / "alice",
        "--server", "wss://localhost:1", "--prompt", "w5",
    )  # fmt: skip
    assert (code, "error[SS-2063]: " in err) == (3, True)
    for name, count in (("gpu", 2), ("alice", 1)):
        _, out, _ = command("audit", "tail", keys / name, "-n", 100, "--output", "json")
        rows = [(row["stage"], row["code"]) for row in json.loads(out)["rows"] if row["kind"] == "refused"]
        assert rows == [("policy", "SS-2063")] * count


def test_a_signed_policy_is_used_and_its_officer_named(signed, command, house):
    code, _, err = command(
        "generate", "--policy", signed, "--policy-key", signed.parent / "officer.pub", "--keys", house.keys / "alice",
        "--server", "wss://localhost:1", "--prompt", "w5",
    )  # fmt: skip
    assert code == 4, "nobody listens there"
    assert "is signed by" in err


def test_train_against_a_server_with_a_looser_policy_ends_with_3_and_the_rule(command, house, tmp_path):
    own, loose = tmp_path / "own.toml", tmp_path / "loose.toml"
    own.write_text(policy_text(FROZEN))
    loose.write_text(policy_text(FROZEN).replace("epsilon = 8.0", "epsilon = 80.0"))
    data, out = house.data("d.jsonl", 8, seed=1), tmp_path / "out"
    with Loopback(house.core(house.job(), load_policy(loose)), house.keys) as server:
        code, said, err = command(
            "train", "--policy", own, "--keys", house.keys / "alice", "--server", server.url, "--data", data, "--out", out,
            "--model", house.model, "--progress", "none",
        )  # fmt: skip
    assert (code, said) == (3, "")
    assert err.startswith("error[SS-2060]: ")
    assert "\n  - privacy.epsilon: 8 -> 80, both at delta " in err
    assert not (house.keys / "alice" / "ledger" / "ledger.sqlite").exists()
