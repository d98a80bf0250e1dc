"""``securesplit model``: JSON on stdout and nothing else, errors as errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from securesplit.cli.model import app, default_cache
from securesplit.errors import CheckFailed, InputError
from securesplit.model.export import collect_adapters, save_part_adapters
from securesplit.model.lora import add_adapters
from securesplit.model.store import load_back, load_front


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    home = tmp_path_factory.mktemp("source")
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)).save_pretrained(home)
    return str(home)


def call(*words, error=None):
    """Run a command; its JSON, or the error that it raised."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if error is not None:
        assert isinstance(done.exception, error), done.output
        return done.exception
    assert done.exception is None, done.exception
    return json.loads(done.stdout)


def test_from_pull_to_export(source, tmp_path):
    cache = tmp_path / "cache"
    pulled = call("pull", source, "--front", 1, "--back", 1, "--cache", cache, "--output", "json")
    assert {"manifest", "sha256", "parts"} <= pulled.keys()
    assert [part["name"] for part in pulled["parts"]] == ["front", "middle", "back"]
    assert all({"file", "sha256", "bytes", "tensors"} <= part.keys() for part in pulled["parts"])
    assert (pulled["front"], pulled["back"], pulled["layers"]) == (1, 1, 5)
    assert call("inspect", source, "--front", 1, "--back", 1, "--cache", cache, "--output", "json") == pulled
    assert call("inspect", source, "--cache", cache, "--output", "json") == pulled
    assert call("inspect", pulled["path"], "--output", "json")["sha256"] == pulled["sha256"]

    verified = call("verify", pulled["path"], "--output", "json")
    assert verified["ok"] is True
    assert {"file": "middle.safetensors", "state": "ok"} in verified["files"]

    again = call("split", pulled["path"], "--front", 2, "--back", 0, "--out", tmp_path / "other", "--output", "json")
    assert (again["front"], again["back"]) == (2, 0)
    assert again["sha256"] != pulled["sha256"]
    cached = call("split", source, "--front", 2, "--back", 0, "--cache", cache, "--output", "json")
    assert cached["sha256"] == again["sha256"]

    files = []
    for part in (load_front(pulled["path"]), load_back(pulled["path"])):
        add_adapters(part, 2, 4.0, seed=0)
        files.append(tmp_path / f"adapter-{part.role}.safetensors")
        save_part_adapters(collect_adapters(part, model=pulled["sha256"]), files[-1])
    done = call("export-adapter", *files, "--base", "org/base", "--out", tmp_path / "peft", "--output", "json")
    assert (done["adapted_layers"], done["untouched_layers"]) == ([0, 4], [1, 2, 3])
    assert (tmp_path / "peft" / "adapter_config.json").is_file()


def test_an_altered_file_fails_the_check(source, tmp_path):
    path = Path(call("pull", source, "--front", 1, "--back", 1, "--cache", tmp_path, "--output", "json")["path"])
    (path / "back.safetensors").write_bytes(b"altered")
    error = call("verify", path, error=CheckFailed)
    assert (error.code, error.exit_code, error.details) == ("SS-1540", 1, ("back.safetensors",))


def test_mistakes(source, tmp_path):
    assert call("pull", source, "--front", 3, "--back", 3, "--cache", tmp_path, error=InputError).code == "SS-1400"
    assert call("pull", "no-such-model", "--cache", tmp_path, error=InputError).code == "SS-1406"
    assert call("inspect", "smollm2-135m", "--cache", tmp_path, error=InputError).code == "SS-1407"
    assert (
        call("export-adapter", tmp_path / "x", "--base", "b", "--out", tmp_path / "o", error=InputError).code
        == "SS-1414"
    )
    assert CliRunner().invoke(app, ["pull", "x", "--front", "-1"]).exit_code == 2
    assert CliRunner().invoke(app, ["pull"]).exit_code == 2


def test_text_for_people(source, tmp_path):
    done = CliRunner().invoke(app, ["pull", source, "--front", "1", "--back", "1", "--cache", str(tmp_path)])
    assert done.exit_code == 0
    assert "llama, 5 layers cut 1/3/1, float32" in done.stdout
    path = next(tmp_path.glob("*/cut-1-1"))
    (path / "middle.safetensors").unlink()
    assert "(not here)" in CliRunner().invoke(app, ["inspect", str(path)]).stdout
    assert "absent  middle.safetensors" in CliRunner().invoke(app, ["verify", str(path)]).stdout


def test_the_cache_follows_the_users_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/securesplit/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "securesplit" / "models"


def test_help_needs_no_torch():
    code = "import sys, securesplit.cli.model; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
