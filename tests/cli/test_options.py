"""Options that several commands have: one declaration, one help text, one behaviour."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from securesplit.cli.main import app
from tests.e2e.house import policy_text

ROOT = typer.main.get_command(app)
CLIENTS = ("generate", "chat", "endpoint", "train")
CONNECTION = (
    "policy", "keys", "server", "model", "cache", "code", "evidence", "policy_key", "key_pass_file", "key_pass_fd", "output",
)  # fmt: skip
DECODING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "adapters")


def options(command: str) -> dict[str, tuple[object, ...]]:
    """What each option of a command is, without its default."""
    return {
        p.name: (tuple(p.opts), p.help, p.multiple, p.required, p.is_flag, p.nargs)
        for p in ROOT.commands[command].params
    }


def every_option(command=ROOT, path: str = "securesplit") -> Iterator[tuple[str, str]]:
    yield path, command.help or ""
    for parameter in command.params:
        yield f"{path} {parameter.name}", getattr(parameter, "help", None) or ""
    for name, inner in getattr(command, "commands", {}).items():
        yield from every_option(inner, f"{path} {name}")


@pytest.mark.parametrize(
    ("commands", "names"),
    [
        (CLIENTS, CONNECTION),
        (("generate", "chat", "endpoint"), DECODING),
        (("generate", "chat"), ("seed",)),
        ((*CLIENTS, "serve"), tuple(name for name in CONNECTION if name != "server")),
        (("train", "serve", "baseline"), ("threads",)),
        (("chat", "endpoint"), ("count_each_turn_alone",)),
        # What else `eval` needs for a server is needed with --checkpoints alone, and says so.
        (
            (*CLIENTS, "eval"),
            ("model", "cache", "code", "evidence", "policy_key", "key_pass_file", "key_pass_fd", "output"),
        ),
    ],
)
def test_what_is_called_the_same_is_the_same(commands, names):
    first, *others = (options(command) for command in commands)
    for name in names:
        assert first[name][1], f"{name} has no help"
        for other in others:
            assert other[name] == first[name]


def test_no_help_text_is_taken_for_markup():
    """rich swallows a lower-case word in brackets, and the help then misses it."""
    found = list(every_option())
    assert len(found) > 150
    assert [where for where, text in found if re.search(r"\[[a-z#/@]", text)] == []


@pytest.mark.parametrize("command_name", ["chat", "endpoint", "generate"])
def test_all_that_is_wrong_with_a_choice_of_tokens_is_said_at_once_and_nothing_is_dialled(
    house, command, command_name: str, tmp_path: Path
):
    (tmp_path / "lab.toml").write_text(policy_text())
    argv = ["--policy", tmp_path / "lab.toml", "--keys", house.keys / "bob", "--server", "wss://localhost:1"]
    more = ["--prompt", "w4"] if command_name == "generate" else []
    code, out, err = command(command_name, *argv, *more, "--temperature", -1, "--top-p", 0, "--min-p", 2, "--top-k", 0)
    assert (code, out) == (2, "")
    assert err.startswith("error[SS-1440]: ")
    assert err.count("\n  - ") == 4
    code, _, err = command(command_name, *argv, *more, "--max-new-tokens", 0)
    assert (code, err[:15]) == (2, "error[SS-1001]:")


def test_all_that_is_wrong_with_a_command_line_is_said_at_once(command):
    code, out, err = command(
        "-v", "train", "--policy", "p.toml", "--patience", -1, "--held-out", 0, "--limit", "x", "--output", "yaml"
    )
    assert (code, out) == (2, "")
    head, *details, hint = err.strip().split("\n")
    assert head == "error[SS-1001]: the command line has 8 faults"
    for name in ("--keys", "--server", "--data", "--out", "--patience", "--held-out", "--limit", "--output"):
        assert sum(f"'{name}'" in line for line in details) == 1, name
    assert "Value error" not in err
    assert hint.startswith("hint: See `")
    assert "train --help" in hint


def test_arguments_of_a_command_of_a_group_count_too(command):
    code, out, err = command("runs", "diff", "--output", "xml")
    assert (code, out) == (2, "")
    assert err.count("\n  - ") == 3


@pytest.mark.parametrize("words", [["runs", "show"], ["runs", "ls", "--nonsense"], ["nonsense"], ["--nonsense"]])
def test_a_single_fault_is_no_list(command, words: list[str]):
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 2


@pytest.mark.parametrize("kept", [False, True])
def test_a_command_that_is_interrupted_says_so_and_how_to_go_on(
    house, command, monkeypatch, tmp_path: Path, *, kept: bool
):
    (tmp_path / "lab.toml").write_text(policy_text())

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("securesplit.client.run.run_training", stopped)
    monkeypatch.setattr("securesplit.kept.folder.Kept.finished_at", lambda _: False if kept else None)
    code, out, err = command(
        "train", "--policy", tmp_path / "lab.toml", "--keys", house.keys / "bob", "--server", "wss://localhost:1",
        "--data", tmp_path / "d.jsonl", "--out", tmp_path / "out",
    )  # fmt: skip
    assert (code, out) == (130, "")
    assert err.endswith("interrupted\n")
    assert ("--resume" in err) == kept
