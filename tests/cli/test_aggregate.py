"""``aggregate simulate`` as a user and a script see it."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from securesplit.cli.aggregate import app
from securesplit.errors import AggregationAborted, InputError

KEYS = {"exact", "survivors", "cpu_seconds", "bytes_per_param_up", "aborted"}


def run(*arguments: str):
    return CliRunner().invoke(app, ["simulate", *arguments])


@pytest.mark.parametrize(
    "extra",
    [[], ["--blind"], ["--backend", "masks"], ["--drop", "masked:1"], ["--drop", "unmask:1", "--drop", "shares:1"],
     ["--ring", "64"], ["--backend", "bfv", "--drop", "masked:1"], ["--backend", "ckks"], ["--colluders", "1"]],
)  # fmt: skip
def test_one_json_object_with_the_promised_keys(extra):
    result = run("--clients", "6", "--threshold", "4", "--dim", "50", "--output", "json", *extra)
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told.keys() >= KEYS
    assert (told["exact"], told["aborted"]) == (True, None)


def test_text_says_it_in_words():
    result = run("--clients", "5", "--threshold", "3", "--dim", "50", "--blind")
    assert result.exit_code == 0
    assert "exact, bit for bit" in result.stdout
    assert "hidden from the server" in result.stdout


@pytest.mark.parametrize("stage", ["advertise", "shares", "masked", "consistent", "unmask"])
def test_an_aborted_round_prints_its_code_and_exits_5(stage):
    result = run("--clients", "5", "--threshold", "4", "--dim", "50", "--drop", f"{stage}:2", "--output", "json")
    told = json.loads(result.stdout)
    assert (told["exact"], told["survivors"], told["aborted"]) == (False, 0, "SS-6010")
    assert isinstance(result.exception, AggregationAborted)
    assert (result.exception.code, result.exception.exit_code) == ("SS-6010", 5)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--backend", "paillier"], "SS-1602"), (["--ring", "48"], "SS-1602"), (["--backend", "bfv", "--ring", "64"], "SS-1601"), (["--drop", "masked"], "SS-1603"),
        (["--drop", "masked:9"], "SS-1603"), (["--clients", "257", "--threshold", "180"], "SS-1601"),
        (["--clients", "2", "--threshold", "2"], "SS-1601"), (["--threshold", "2"], "SS-1601"), (["--threshold", "6"], "SS-1601"),
        (["--dim", "0"], "SS-1601"), (["--clients", "0"], "SS-1601"), (["--clients", "-3"], "SS-1601"),
    ],
)  # fmt: skip
def test_bad_input_exits_2_and_prints_nothing_on_stdout(arguments, code):
    result = run("--clients", "5", "--threshold", "3", "--dim", "50", "--output", "json", *arguments)
    assert isinstance(result.exception, InputError)
    assert (result.exception.code, result.exception.exit_code) == (code, 2)
    assert result.stdout == ""
    assert result.exception.hint


def test_the_command_loads_neither_torch_nor_cryptography_before_it_runs():
    code = "import sys, securesplit.cli.aggregate; print(sorted(m for m in ('torch', 'numpy', 'cryptography') if m in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
