"""Folders of runs that somebody else made: nothing in them crashes a list, hangs it, or speaks to the terminal."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from securesplit.cli.main import app
from securesplit.cli.runs import sparkline
from securesplit.errors import InputError
from securesplit.runs.losses import HELD_OUT, read_losses

HEX = "a" * 64
ABOUT = {
    "format": 1, "started": "2026-11-22T12:00:00Z", "client": "alice", "job": "{}", "job_digest": HEX, "job_name": "j",
    "policy": "{}", "policy_digest": HEX, "policy_name": "p", "model": HEX, "regime": "open", "options": [],
    "seeds": {"adapters": 7, "batches": 7}, "data": {"digest": HEX, "records": 1, "held_out": 1, "batches": 1}, "tls": "x",
    "versions": dict.fromkeys(("securesplit", "torch", "transformers", "peft", "numpy", "commit"), None) | {"python": "3"},
}  # fmt: skip
RUN = {
    "client": "alice", "policy": "p", "policy_digest": HEX, "job": HEX, "regime": "open", "steps": 4, "loss": 2.0,
    "initial_loss": 3.0, "epsilon": None, "delta": None, "bytes_up": 1, "bytes_down": 1, "seconds": 1.0,
}  # fmt: skip
ROW = {"kind": "step", "step": 1, "round": 0, "loss": 2.0, "seconds": 1.0, "bytes_up": 1, "bytes_down": 1}


def hostile(folder, *, about=None, run=None, row=None):
    folder.mkdir()
    (folder / "about.json").write_text(json.dumps(ABOUT | (about or {})))
    if run is not None:
        (folder / "run.json").write_text(json.dumps(RUN | run))
    if row is not None:
        (folder / "metrics.jsonl").write_text(json.dumps(ROW | row) + "\n")
    return folder


def said(*argv: object):
    return CliRunner().invoke(app, [str(arg) for arg in argv])


@pytest.mark.parametrize(
    "parts",
    [
        {"run": {"curve": [float("nan"), 1.0]}},
        {"run": {"curve": [float("inf"), 1.0], "loss": float("-inf")}},
        {"run": {"curve": [1e308, -1e308, 1e308]}},
        {"run": {"steps": 10**400}},
        {"run": {"bytes_up": -(10**400), "seconds": 1e308}},
        {"row": {"step": 10**400}},
        {"row": {"loss": 1e308}},
        {"about": {"job": "[" * 5000}},
        {"about": {"job": '{"a":' * 400 + "1" + "}" * 400}},
        {"about": {"job": '{"a": NaN}', "policy": "[" * 5000}},
        {"about": {"policy": '{"privacy": {"mechanism": "gaussian", "delta": 1e-5, "unit": "' + "x" * 99 + '"}}'}, "row": {"epsilon": 1.0}},
        {"about": {"policy": '{"privacy": ' * 400 + "1" + "}" * 400}, "row": {"epsilon": 1e308}},
        {"row": {"epsilon": 1.0, "delta": 1e-5, "unit": "sequence"}},
        {"row": {"epsilon": 1.0, "delta": 2.0, "unit": "x\x1b[2J", "relation": ""}},
        {"run": {"epsilon": 1.0}},
        {"run": {"epsilon": -1e308, "delta": 1e308, "unit": "x" * 5000, "relation": "\n"}},
        {"about": {"started": "0001-01-01T00:00:00+14:00"}},
        {"about": {"started": "9999-12-31T23:59:59-14:00"}},
    ],
)  # fmt: skip
def test_numbers_and_depths_that_no_run_writes_crash_nothing(tmp_path, parts):
    folder, other = hostile(tmp_path / "a", **parts), hostile(tmp_path / "b", run={})
    for argv in (("ls", tmp_path), ("show", folder), ("diff", folder, other)):
        for output in ("text", "json"):
            done = said("runs", *argv, "--output", output)
            assert done.exit_code == 0, (argv, done.output, done.exception)
            if output == "json":
                json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "held-out.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
def test_what_is_no_file_is_not_read(tmp_path, name, kind):
    folder = hostile(tmp_path / "a")
    place = folder / name
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/zero" if kind == "device" else place)
    for argv in (("ls", tmp_path), ("show", folder)):
        done = said("runs", *argv)
        assert done.exit_code == 0, (done.output, done.exception)
    if name == HELD_OUT:
        with pytest.raises(InputError):
            read_losses(folder)


def test_names_do_not_speak_to_the_terminal(tmp_path):
    evil = "x\x1b]0;owned\x07\x1b[2J\nforged  line"
    folder = hostile(
        tmp_path / "a\x1b[31m",
        about={"job_name": evil, "policy_name": evil, "client": evil, "regime": evil, "tls": evil, evil: 1,
               "options": [{"name": "o", "value": evil}]},
    )  # fmt: skip
    claimed = {"regime": evil, "epsilon": 1.0, "delta": 1e-5, "unit": evil, "relation": evil}
    other = hostile(tmp_path / "b", run=claimed, about={"job": json.dumps({evil: evil}), "job_name": evil})
    for argv in (("ls", tmp_path), ("show", folder), ("show", other), ("diff", other, other)):
        done = said("runs", *argv)
        assert done.exit_code == 0, (done.output, done.exception)
        assert all(char.isprintable() or char == "\n" for char in done.stdout)
        assert not any(line.startswith("forged") for line in done.stdout.splitlines())


@pytest.mark.parametrize("parts", [{"row": {"epsilon": 123.25}}, {"run": {"epsilon": 123.25}}])
def test_a_figure_whose_meaning_nobody_can_read_is_not_shown(tmp_path, parts):
    folder = hostile(tmp_path / "a", about={"policy": "{"}, **parts)
    other = hostile(tmp_path / "b", run={"epsilon": 1.0, "delta": 1e-5})
    for argv in (("ls", tmp_path), ("show", folder), ("diff", folder, other)):
        text = said("runs", *argv).stdout
        assert "unknown" in text
        assert "123" not in text
    (run,) = (
        run for run in json.loads(said("runs", "ls", tmp_path, "--output", "json").stdout)["runs"] if run["name"] == "a"
    )
    assert (run["epsilon"], run["bound"]) == (None, "unknown")


def test_a_folder_whose_name_is_no_text_is_listed(tmp_path):
    hostile(tmp_path / os.fsdecode(b"\xff\xfe"), run={})
    done = said("runs", "ls", tmp_path)
    assert done.exit_code == 0, done.exception
    assert "finished" in done.stdout


def test_a_sparkline_of_anything_is_drawn():
    assert len(sparkline([float("inf"), -1e308, 1e308, 0.0])) == 4
