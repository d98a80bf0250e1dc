"""`serve`, `train` and `generate` as processes: who is let in, who is not and why, and what the exit code says."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from securesplit.client.dial import dial
from securesplit.errors import ConnectionFailed
from securesplit.pki.authority import Authority
from tests.e2e.house import (
    FROZEN,
    Program,
    batches_of,
    build_house,
    job_text,
    policy_of,
    policy_text,
    sentences,
    start_server,
    train_argv,
)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One server process for the whole module: whatever a test does to it, the next one still finds it at work."""
    house = build_house(tmp_path_factory.mktemp("serve") / "house", "mallory")
    house.data("alice.jsonl", 6, seed=1)
    (house.root / "policy.toml").write_text(policy_text())
    (house.root / "limits.toml").write_text('guests = ["mallory"]\n')
    server, url = start_server(house, job_text(house.model, blind=False), policy_text(), "--limits", "limits.toml")
    yield house, url
    assert server.process.poll() is None, server.complaint
    assert server.stop() == 0, server.complaint
    assert "Traceback" not in server.complaint


def good_step(house, url, name="bob") -> float:
    with dial(url, keys=house.keys / name, policy=policy_of(), patience=30) as link:
        client = house.client(link, policy_of())
        client.train("B")
        return client.step(batches_of(client, sentences(2, seed=1))[0])


def two_lines(stderr: str, *codes: str) -> None:
    """`error[SS-....]: what` and `hint: what to do`, each with words in it, and nothing else."""
    lines = stderr.splitlines()
    assert len(lines) == 2, stderr
    assert any(lines[0].startswith(f"error[{code}]: ") for code in codes), stderr
    assert len(lines[0].split()) > 4
    assert lines[1].startswith("hint: ")
    assert len(lines[1].split()) > 3


def test_who_is_not_let_in_gets_exit_4_and_a_cause(running, command, tmp_path):
    """Without a certificate, with another authority's (a process of its own), with a server's."""
    house, url = running
    (tmp_path / "keys" / "alice").mkdir(parents=True, mode=0o700)
    Authority.create(tmp_path / "other").issue("alice", "client")

    def with_keys(keys: Path) -> list[object]:
        words = list(train_argv(house, "alice", url, house.root / "policy.toml"))
        words[words.index("--keys") + 1] = keys
        return words

    other = Program(tmp_path, "other-ca", *with_keys(tmp_path / "other" / "alice"))
    for keys, expected in ((tmp_path / "keys" / "alice", "SS-3100"), (house.keys / "gpu", "SS-3210")):
        code, out, complaint = command(*with_keys(keys))
        assert (code, out) == (4, "")
        two_lines(complaint, expected)
    assert other.wait() == 4, other.complaint
    assert other.out.read_text() == ""
    two_lines(other.complaint, "SS-3202")
    assert good_step(house, url) > 0


def test_a_server_refuses_what_only_a_server_can_refuse(running, tmp_path):
    """A certificate that looks right on the client's side: another authority's, with this authority pinned beside it."""
    house, url = running
    stranger = Authority.create(tmp_path / "other")
    stranger.issue("alice", "client")
    for file in ("ca.pem", "crl.pem"):
        shutil.copy(house.keys / "alice" / file, tmp_path / "other" / "alice" / file)
    with pytest.raises(ConnectionFailed) as caught:
        dial(url, keys=tmp_path / "other" / "alice", policy=policy_of())
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert good_step(house, url) > 0


def test_a_revoked_client_is_put_out_of_a_live_session_within_five_seconds(running, command):
    house, url = running
    with dial(url, keys=house.keys / "mallory", policy=policy_of(), patience=30) as link:
        ended: list[tuple[float, BaseException]] = []

        def watch() -> None:
            try:
                link.next()
            except ConnectionFailed as error:
                ended.append((time.monotonic(), error))

        watcher = threading.Thread(target=watch)
        watcher.start()
        revoke = Program(house.root, "revoke", "certs", "revoke", "mallory", "--keys", house.keys, "--output", "json")
        assert revoke.wait() == 0, revoke.complaint
        revoked = time.monotonic()
        watcher.join(10)
        assert ended, "the session went on"
        when, error = ended[0]
        assert when - revoked < 5
        assert error.code == "SS-3205"
    shutil.copy(house.root / "alice.jsonl", house.root / "mallory.jsonl")
    code, _, complaint = command(*train_argv(house, "mallory", url, house.root / "policy.toml"))
    assert code == 4
    two_lines(complaint, "SS-3205")
    assert good_step(house, url) > 0


def test_a_policy_that_forbids_the_job_ends_with_exit_3_and_every_breach(running, command, tmp_path):
    house, url = running
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text(FROZEN, min_front=2))
    code, _, complaint = command(*train_argv(house, "alice", url, policy))
    assert code == 3
    lines = complaint.splitlines()
    assert lines[0].startswith("error[SS-2001]: ")
    assert [line[:4] for line in lines[1:-1]] == ["  - "] * 2
    assert lines[-1].startswith("hint: ")
    assert good_step(house, url) > 0


def test_generate_prints_one_object(running, command):
    house, url = running
    argv = (
        "generate", "--policy", house.root / "policy.toml", "--keys", house.keys / "bob", "--server", url, "--prompt",
        "w4 w5 w6", "--max-new-tokens", 5, "--output", "json",
    )  # fmt: skip
    code, out, complaint = command(*argv)
    assert code == 0, complaint
    said = json.loads(out)
    assert said.keys() == {"text", "tokens", "epsilon", "delta", "unit", "relation", "bound", "finish", "prompt_tokens"}
    assert said["epsilon"] is None
    assert 0 < said["tokens"] <= 5
    assert (said["finish"] == "length") == (said["tokens"] == 5)
    assert said["prompt_tokens"] == 3


def test_generate_continues_several_prompts_and_streams_one(running, command):
    house, url = running
    site = (
        "--policy",
        house.root / "policy.toml",
        "--keys",
        house.keys / "bob",
        "--server",
        url,
        "--max-new-tokens",
        5,
    )
    asked = ("generate", *site, "--prompt", "w4 w5 w6", "--prompt", "w7 w8", "--output", "json")
    code, out, complaint = command(
        *asked, "--temperature", 1.2, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, "--seed", 3
    )
    assert code == 0, complaint
    said = json.loads(out)
    assert [c["prompt_tokens"] for c in said["completions"]] == [3, 2]
    assert said["completions"][0] == {k: said[k] for k in said["completions"][0]}
    code, out, complaint = command("generate", *site, "--prompt", "w4 w5 w6", "--stream")
    assert code == 0, complaint
    code, whole, complaint = command("generate", *site, "--prompt", "w4 w5 w6")
    assert (code, out) == (0, whole), complaint
    code, cut, complaint = command("generate", *site, "--prompt", "w4 w5 w6", "--stop", whole.split()[1], "--stream")
    assert (code, cut.strip()) == (0, whole.split()[0]), complaint
    code, _, complaint = command("generate", *site, "--prompt", "w4", "--top-p", 0, "--min-p", 2)
    assert code == 2
    assert "SS-1440" in complaint
    assert complaint.count("\n  - ") == 2
    assert command("generate", *site, "--prompt", "w4", "--prompt", "w5", "--stream")[0] == 2


def serve_argv(folder: Path, policy: str, listen: str, keys: Path | None = None) -> tuple[object, ...]:
    (folder / "job.toml").write_text(job_text(folder / "nowhere"))
    (folder / "policy.toml").write_text(policy)
    return (
        "serve", "--job", folder / "job.toml", "--policy", folder / "policy.toml", "--keys", keys or folder / "keys",
        "--listen", listen,
    )  # fmt: skip


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "192.0.2.1:8443", "gpu.example:8443", "[::]:8443"])
def test_an_unsafe_policy_is_served_on_loopback_only(command, tmp_path, listen):
    code, out, err = command(*serve_argv(tmp_path, policy_text(), listen))
    assert (code, out) == (3, "")
    two_lines(err, "SS-2003")


@pytest.mark.parametrize("listen", ["8443", "localhost", ":8443", "localhost:http", "localhost:70000", "localhost:²"])
def test_an_address_that_is_none_is_refused(command, tmp_path, listen):
    code, out, err = command(*serve_argv(tmp_path, policy_text(), listen))
    assert (code, out) == (2, "")
    two_lines(err, "SS-1141")


def test_a_port_that_is_taken_ends_with_exit_4(command, house, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        argv = serve_argv(tmp_path, policy_text(), f"127.0.0.1:{taken.getsockname()[1]}", house.keys / "gpu")
        code, out, err = command(*argv, "--model", house.model)
    assert (code, out) == (4, "")
    two_lines(err, "SS-3041")


def test_a_recording_never_overwrites_one(command, house, tmp_path):
    (tmp_path / "old").mkdir()
    argv = serve_argv(tmp_path, policy_text(), "127.0.0.1:0", house.keys / "gpu")
    code, _, err = command(*argv, "--model", house.model, "--record", tmp_path / "old")
    assert code == 2
    two_lines(err, "SS-1303")


@pytest.mark.parametrize(
    ("url", "code", "exit_code"),
    [
        ("ws://localhost:1", "SS-1140", 2),
        ("http://localhost:1", "SS-1140", 2),
        ("wss://localhost:99999", "SS-1140", 2),
        ("wss://[::1", "SS-1140", 2),
        ("wss://gpu.example:8443", "SS-2003", 3),
        ("wss://localhost:1", "SS-3033", 4),
    ],
)
def test_train_checks_the_address(command, house, url, code, exit_code):
    house.data("alice.jsonl", 3, seed=1)
    (house.root / "policy.toml").write_text(policy_text())
    got, out, err = command(*train_argv(house, "alice", url, house.root / "policy.toml"))
    assert (got, out) == (exit_code, "")
    two_lines(err, code)


def test_faulty_files_end_with_exit_2_before_anything_is_dialled(command, house, tmp_path):
    house.data("alice.jsonl", 3, seed=1)
    policy = house.root / "policy.toml"
    policy.write_text(policy_text().replace("min_clients = 3", "min_clients = 1"))
    assert command(*train_argv(house, "alice", "wss://localhost:1", policy))[0] == 2
    policy.write_text(policy_text())
    (house.root / "alice.jsonl").write_text("{broken\n")
    assert command(*train_argv(house, "alice", "wss://localhost:1", policy))[0] == 2
    argv = serve_argv(tmp_path, policy_text(), "127.0.0.1:0")
    (tmp_path / "job.toml").write_text(job_text(house.model).replace("rounds = 2", "rounds = 0\nextra = 1"))
    code, _, err = command(*argv)
    assert code == 2
    assert err.startswith("error[SS-1111]: ")
    assert len([line for line in err.splitlines() if line.startswith("  - ")]) == 2
