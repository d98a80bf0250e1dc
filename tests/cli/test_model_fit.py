"""``securesplit model fit`` and ``--code``: one object on stdout, a file that loads, and a job that names it."""

from __future__ import annotations

import hashlib
import json

import pytest

from securesplit.model.code import read_code
from tests.e2e.house import build_house, job_text, policy_text, sentences, start_server, train_argv


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    house = build_house(tmp_path_factory.mktemp("fit") / "house")
    text = house.root / "public.txt"
    text.write_text("\n\n".join(sentences(40, seed=9)))
    return house, text


def fit_argv(house, text, out, *options):
    return (
        "model", "fit", "--model", house.model, "--front", 1, "--back", 1, "--text", text, "--width", 6, "--rows", 8, "--threads",
        1, "--progress", "none", "--out", out, *options,
    )  # fmt: skip


def job_with_code(house, code):
    return job_text(house.model) + f'[code]\ndigest = "{code.digest}"\nwidth = {code.width}\n'


def test_fit_prints_one_object_and_writes_what_it_says(command, fitted, tmp_path):
    house, text = fitted
    code, out, err = command(*fit_argv(house, text, tmp_path / "c", "--sentinel", "--whiten", "--output", "json"))
    assert code == 0, err
    said = json.loads(out)
    assert {"path", "digest", "width", "explained", "clips"} <= said.keys()
    held = read_code(tmp_path / "c")
    assert (said["digest"], said["width"], said["path"]) == (held.digest, 6, str(tmp_path / "c"))
    assert said["text"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (said["model"], said["front"], said["back"], said["hidden"]) == (house.digest, 1, 1, 32)
    assert (said["sentinel"], said["whitened"]) == (1, True), "the tokenizer has an end of text and no beginning"
    assert 0 < said["explained"] < 1
    assert len(said["clips"]["sequence"]) == len(said["clips"]["row"]) == 3


def test_for_people_it_prints_the_jobs_table(command, fitted, tmp_path):
    house, text = fitted
    code, out, _ = command(*fit_argv(house, text, tmp_path / "c"))
    assert code == 0
    assert f'[code]\ndigest = "{read_code(tmp_path / "c").digest}"\nwidth = 6' in out


def test_what_cannot_be_fitted_ends_with_exit_2(command, fitted, tmp_path):
    house, text = fitted
    for change, expected in (
        (("--width", 33), "SS-1417"),
        (("--rows", 4000), "SS-1417"),
        (("--text", tmp_path / "no"), "SS-1201"),
    ):
        code, out, err = command(*fit_argv(house, text, tmp_path / "c", *change))
        assert (code, out) == (2, "")
        assert err.startswith(f"error[{expected}]: ")
    assert not (tmp_path / "c").exists()


def test_serve_train_and_generate_with_a_code(command, fitted, tmp_path):
    house, text = fitted
    path = tmp_path / "code.safetensors"
    assert command(*fit_argv(house, text, path, "--sentinel"))[0] == 0
    (house.root / "policy.toml").write_text(policy_text())
    server, url = start_server(
        house, job_with_code(house, read_code(path)), policy_text(), "--code", path, "--record", tmp_path / "recorded"
    )
    try:
        argv = (
            "generate", "--policy", house.root / "policy.toml", "--keys", house.keys / "bob", "--server", url, "--prompt",
            "w4 w5 w6", "--max-new-tokens", 4, "--output", "json",
        )  # fmt: skip
        code, out, err = command(*argv, "--code", path)
        assert code == 0, err
        assert 0 <= json.loads(out)["tokens"] <= 4
        house.data("alice.jsonl", 4, seed=1)
        assert command(*fit_argv(house, text, tmp_path / "other"))[0] == 0
        code, out, err = command(
            *train_argv(house, "alice", url, house.root / "policy.toml"), "--code", tmp_path / "other"
        )
        assert (code, out) == (2, "")
        assert err.startswith("error[SS-1431]: ")
        code, _, err = command(*argv, "--code", text)
        assert code == 2
        assert err.startswith("error[SS-1416]: ")
    finally:
        server.stop()
    assert read_code(tmp_path / "recorded" / "code.safetensors").digest == read_code(path).digest


def test_a_server_without_the_jobs_code_does_not_start(command, fitted, tmp_path):
    house, text = fitted
    path = tmp_path / "code.safetensors"
    assert command(*fit_argv(house, text, path))[0] == 0
    (tmp_path / "job.toml").write_text(job_with_code(house, read_code(path)))
    (tmp_path / "policy.toml").write_text(policy_text())
    argv = (
        "serve", "--job", tmp_path / "job.toml", "--policy", tmp_path / "policy.toml", "--keys", house.keys / "gpu",
        "--listen", "127.0.0.1:0",
    )  # fmt: skip
    code, out, err = command(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error[SS-1431]: ")
