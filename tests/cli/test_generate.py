"""What ``generate`` prints: claims in the policy's unit, and nothing that a terminal obeys."""

from __future__ import annotations

import json
from io import BytesIO, TextIOWrapper
from types import SimpleNamespace

import pytest

from securesplit.cli.generate import _print_as_it_comes
from securesplit.client.generate import Piece
from securesplit.client.sampling import Sampling
from tests.e2e.house import FROZEN, Loopback, build_house, policy_of, policy_text


@pytest.mark.parametrize("unit", ["sequence", "user"])
def test_the_claim_is_in_the_policy_s_unit(tmp_path, command, unit):
    house, privacy = build_house(tmp_path / "house"), FROZEN.replace('unit = "sequence"', f'unit = "{unit}"')
    (house.root / "private.toml").write_text(policy_text(privacy))
    with Loopback(house.core(house.job(), policy_of(privacy)), house.keys) as loop:
        code, out, err = command(
            "generate", "--policy", house.root / "private.toml", "--keys", house.keys / "bob", "--server", loop.url,
            "--prompt", "w4 w5", "--max-new-tokens", 2, "--output", "json",
        )  # fmt: skip
    assert code == 0, err
    said = json.loads(out)
    assert (said["unit"], said["relation"], said["delta"], said["bound"]) == (unit, "replace-one", 1e-5, "stated")
    assert 0 < said["epsilon"] < 8


def test_a_stream_shows_nothing_that_a_terminal_obeys(capsys):
    client = SimpleNamespace(
        stream=lambda *_args, **_options: iter([Piece("w3\x1b[2J", 3, None), Piece("", None, "length")])
    )
    _print_as_it_comes(client, "w4", 1, Sampling())
    assert capsys.readouterr().out == "w3\ufffd[2J\n"


def test_private_prompts_come_from_files_and_stdin(tmp_path, command, monkeypatch):
    house = build_house(tmp_path / "house")
    (house.root / "lab.toml").write_text(policy_text())
    (tmp_path / "one.txt").write_bytes(b"w7 w8\r\n")
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"w9\n")))
    with Loopback(house.core(house.job(), policy_of()), house.keys) as loop:
        common = (
            "generate", "--policy", house.root / "lab.toml", "--keys", house.keys / "bob", "--server", loop.url,
            "--max-new-tokens", 3, "--output", "json",
        )  # fmt: skip
        code, out, err = command(
            *common, "--prompt", "w4 w5", "--prompt-file", tmp_path / "one.txt", "--prompt-file", "-"
        )
        assert code == 0, err
        plain = command(*common, "--prompt", "w4 w5", "--prompt", "w7 w8", "--prompt", "w9")
    assert json.loads(out) == json.loads(plain[1])
    said = json.loads(out)
    assert len(said["completions"]) == 3
    assert [said[key] for key in ("delta", "unit", "relation", "bound")] == [None, None, None, "none"]


def test_a_prompt_that_is_missing_or_no_text_is_refused_before_anything_is_dialled(tmp_path, command):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    argv = ("generate", "--policy", tmp_path / "none.toml", "--keys", tmp_path, "--server", "wss://localhost:1")
    for more, code in (
        ((), "SS-1001"),
        (("--prompt-file", tmp_path / "latin"), "SS-1001"),
        (("--prompt-file", tmp_path / "no"), "SS-1002"),
    ):
        assert command(*argv, *more)[::2][0] == 2
        assert command(*argv, *more)[2].startswith(f"error[{code}]: ")
