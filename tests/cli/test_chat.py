"""`chat` from a script and `endpoint` as a process: exit codes, one object, the token's file, what a terminal is spared."""

from __future__ import annotations

import io
import json
import os
import socket
import time
import urllib.request

import pytest

from securesplit.cli.chat import _Terminal, harmless
from securesplit.errors import InputError
from tests.e2e.house import FROZEN, Loopback, Program, build_house, policy_of, policy_text


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    house = build_house(tmp_path_factory.mktemp("chat") / "house")
    (house.root / "policy.toml").write_text(policy_text())
    with Loopback(house.core(house.job(blind=False), policy_of()), house.keys) as loop:
        yield house, loop.url


def site(house, url, policy="policy.toml") -> list[object]:
    return ["--policy", house.root / policy, "--keys", house.keys / "alice", "--server", url, "--model", house.model]


@pytest.fixture
def typed(monkeypatch):
    def set_lines(*lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return set_lines


def test_a_scripted_conversation_prints_one_object(running, command, typed):
    house, url = running
    typed("w3 w4", "w5", "/reset", "w3 w4")
    code, out, err = command("chat", *site(house, url), "--max-new-tokens", 3, "--output", "json")
    assert (code, err.count("Traceback")) == (0, 0)
    said = json.loads(out)
    assert set(said) == {"turns", "tokens", "epsilon", "delta", "unit", "relation", "bound"}
    first, second, third = said["turns"]
    assert (first["user"], second["user"]) == ("w3 w4", "w5")
    assert first["assistant"] == third["assistant"]
    assert said["tokens"] == sum(turn["tokens"] for turn in said["turns"])
    assert (said["epsilon"], said["delta"]) == (None, None)

    typed("w3 w4")
    code, out, _ = command("chat", *site(house, url), "--max-new-tokens", 3)
    assert code == 0
    assert first["assistant"] in out


def test_sampling_options_reach_the_choice(running, command, typed):
    house, url = running

    def answer(*options: object) -> str:
        typed("w3 w4")
        code, out, err = command("chat", *site(house, url), "--output", "json", "--max-new-tokens", 6, *options)
        assert code == 0, err
        return json.loads(out)["turns"][0]["assistant"]

    greedy = answer()
    stop = greedy.split()[1]
    assert answer("--stop", stop) == greedy[: greedy.index(stop)]
    assert answer("--temperature", 2, "--seed", 5) == answer("--temperature", 2, "--seed", 5)


def test_a_script_ends_at_the_first_refusal(running, command, typed):
    house, url = running
    typed(" ".join(["w3"] * 40), "w5")
    code, out, err = command("chat", *site(house, url), "--output", "json")
    assert (code, out) == (2, "")
    assert "error[SS-1275]" in err


def test_under_a_private_policy_the_second_turn_is_refused_with_exit_6(tmp_path, command, typed):
    house = build_house(tmp_path / "house")
    (house.root / "private.toml").write_text(policy_text(FROZEN))
    with Loopback(house.core(house.job(), policy_of(FROZEN)), house.keys) as loop:
        typed("w3 w4")
        argv = ["chat", *site(house, loop.url, "private.toml"), "--max-new-tokens", 2]
        code, out, err = command(*argv, "--output", "json")
        assert code == 0, err
        said = json.loads(out)
        assert 0 < said["epsilon"] < 8
        assert (said["unit"], said["relation"], said["delta"]) == ("sequence", "replace-one", 1e-5)
        typed("w3 w4", "w5")
        code, _, err = command(*argv)
        assert code == 6
        assert "error[SS-5001]" in err
        assert "generated tokens left" in err, "the price of the first turn was shown"
        typed("w3 w4", "w5")
        code, out, err = command(*argv, "--output", "json")
        assert code == 6
        assert "error[SS-5001]" in err
        assert [turn["user"] for turn in json.loads(out)["turns"]] == ["w3 w4"], "it was paid for"


def test_the_endpoint_as_a_process(running, tmp_path):
    house, url = running
    token = tmp_path / "token"
    argv = ["endpoint", *site(house, url), "--listen", "127.0.0.1:0", "--token-file", token, "--output", "json"]
    program = Program(tmp_path, "endpoint", *argv)
    try:
        deadline = time.monotonic() + 60
        while not program.out.read_text().endswith("\n"):
            assert program.process.poll() is None, program.complaint
            assert time.monotonic() < deadline
            time.sleep(0.05)
        said = program.said
        assert set(said) == {"url", "model", "token_file"}
        assert token.stat().st_mode & 0o777 == 0o600
        secret = token.read_text().strip()
        assert secret not in program.out.read_text() + program.complaint
        body = json.dumps({"model": said["model"], "prompt": "w3 w4", "max_tokens": 2}).encode()
        headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
        asked = urllib.request.Request(f"{said['url']}/completions", body, headers)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] <= 2
        with socket.create_connection(("127.0.0.1", int(said["url"].split(":")[2].split("/")[0]))):
            program.process.terminate()
            assert program.process.wait(20) == 143
        assert "Traceback" not in program.complaint
    finally:
        program.kill()


def test_a_mistaken_address_is_refused_before_the_server_is_dialled(running, command):
    house, _ = running
    argv = ["endpoint", *site(house, "wss://127.0.0.1:1")]
    for listen, expected in (("0.0.0.0:0", "SS-1270"), ("nowhere", "SS-1141")):
        code, out, err = command(*argv, "--listen", listen)
        assert (code, out) == (2, "")
        assert f"error[{expected}]" in err
    assert command(*argv, "--listen", "127.0.0.1:0")[0] == 4


def test_a_terminal_is_spared_what_it_would_obey():
    assert harmless("w3\n\tщ 中文　👩\u200d🔬") == "w3\n\tщ 中文　👩\u200d🔬"
    assert harmless("\x1b[2J\x07\x9b1m\r\u202e\x00") == "\ufffd[2J\ufffd\ufffd1m\ufffd\ufffd\ufffd"
    assert os.linesep not in harmless("\r")


def test_an_answer_is_printed_as_it_is(capsys):
    screen = _Terminal(quiet=False)
    text = ":smile: [b]x[/b]\t1\n\n  two  \n" + "long " * 60
    for cut in range(0, len(text), 3):
        screen.piece(text[cut : cut + 3])
    screen.end()
    assert capsys.readouterr().out == text + "\n"
    _Terminal(quiet=True).piece("x")
    assert capsys.readouterr().out == ""


def test_lines_that_are_no_text_are_bad_input(monkeypatch):
    for stdin in (io.TextIOWrapper(io.BytesIO(b"w3\n\xff\xfe\n"), encoding="utf-8"), io.StringIO("w3\n\udcff\n")):
        monkeypatch.setattr("sys.stdin", stdin)
        with pytest.raises(InputError, match="SS-1001"):
            list(_Terminal(quiet=True).lines())
