"""From a name to a model directory."""

from __future__ import annotations

import mmap
import os

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from securesplit.errors import CheckFailed, ConnectionFailed, InputError
from securesplit.model import pull, resolve
from securesplit.model.manifest import read_manifest
from securesplit.model.memory import resident_bytes
from securesplit.model.plan import CutPlan
from securesplit.model.resolve import cached_model, resolve_model
from securesplit.model.store import load_tokenizer, load_whole
from securesplit.model.writer import write_model

IDS = torch.randint(1, 97, (1, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def pretrained(tiny, tmp_path):
    """A directory as the library itself writes one."""
    home = tmp_path / "pretrained"
    tiny("qwen3", tied=True).save_pretrained(home)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(home)
    return home


def test_a_pretrained_directory(tiny, tmp_path, pretrained):
    found = resolve_model(str(pretrained), tmp_path / "cache", CutPlan(1, 2))
    assert read_manifest(found).plan == CutPlan(1, 2)
    with torch.no_grad():
        assert torch.equal(load_whole(found)(IDS).logits, tiny("qwen3", tied=True)(IDS).logits)
    assert load_tokenizer(found)("a b").input_ids == [0, 1]
    assert resolve_model(str(pretrained), tmp_path / "cache", CutPlan(1, 2)) == found
    assert read_manifest(resolve_model(str(pretrained), tmp_path / "cache")).plan == CutPlan(2, 2)


def test_a_second_cut_is_made_from_the_files_that_are_there(tmp_path, pretrained, monkeypatch):
    first = resolve_model(str(pretrained), tmp_path / "cache", CutPlan(2, 2))
    monkeypatch.setattr(resolve, "_import_pretrained", lambda *_: pytest.fail("loaded the whole model again"))
    said = []
    second = resolve_model(str(pretrained), tmp_path / "cache", CutPlan(0, 1), progress=lambda *step: said.append(step))
    assert second.parent == first.parent
    assert said[-1] == ("write", 1.0)
    assert load_tokenizer(second)("b a").input_ids == [1, 0]
    (first / "middle.safetensors").unlink()
    (second / "front.safetensors").write_bytes(b"altered")
    with pytest.raises(CheckFailed, match="SS-1540"):
        resolve_model(str(pretrained), tmp_path / "cache", CutPlan(1, 1))


def test_a_changed_directory_is_another_model(tiny, tmp_path, pretrained):
    first = resolve_model(str(pretrained), tmp_path / "cache", CutPlan(2, 2))
    tiny("qwen3", tied=True, rms_norm_eps=1e-3).save_pretrained(pretrained)
    os.utime(pretrained / "config.json", (1, 1))
    second = resolve_model(str(pretrained), tmp_path / "cache", CutPlan(2, 2))
    assert read_manifest(first).digest != read_manifest(second).digest


def test_a_model_directory_of_ours(tiny, tmp_path):
    write_model(tiny("llama"), CutPlan(2, 2), tmp_path / "mine")
    assert resolve_model(str(tmp_path / "mine"), tmp_path / "cache") == tmp_path / "mine"
    assert resolve_model(str(tmp_path / "mine"), tmp_path / "cache", CutPlan(2, 2)) == tmp_path / "mine"
    other = resolve_model(str(tmp_path / "mine"), tmp_path / "cache", CutPlan(1, 1))
    assert read_manifest(other).plan == CutPlan(1, 1)
    assert cached_model(str(tmp_path / "mine"), tmp_path / "cache") == tmp_path / "mine"
    assert cached_model(str(tmp_path / "mine"), tmp_path / "cache", CutPlan(1, 1)) == other


def test_an_alias_is_pulled_once(tiny, tmp_path, monkeypatch):
    calls = []

    def fake(alias, plan, target, _progress):
        calls.append(alias.name)
        return write_model(tiny("llama"), plan, target)

    monkeypatch.setattr(resolve, "pull_alias", fake)
    with pytest.raises(InputError, match="SS-1407"):
        cached_model("smollm2-135m", tmp_path)
    first = resolve_model("smollm2-135m", tmp_path, CutPlan(2, 1))
    resolve_model("smollm2-135m", tmp_path, CutPlan(2, 1))
    resolve_model("smollm2-135m", tmp_path, CutPlan(0, 3))
    assert calls == ["smollm2-135m"]
    assert cached_model("smollm2-135m", tmp_path, CutPlan(2, 1)) == first
    assert cached_model("smollm2-135m", tmp_path).parent == first.parent
    assert pull.ALIASES[0].name == "smollm2-135m"


def test_pickled_weights_are_never_read(tiny, tmp_path):
    home = tmp_path / "pickled"
    home.mkdir()
    tiny("llama").config.save_pretrained(home)
    (home / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InputError, match="SS-1406"):
        resolve_model(str(home), tmp_path / "cache")


@pytest.mark.parametrize("name", ["", "no-such-alias", "../up", "a/b/c", "https://example.org/model", "./missing/x/y"])
def test_names_that_are_no_model(tmp_path, name):
    with pytest.raises(InputError, match=r"SS-140[46]"):
        resolve_model(name, tmp_path / "cache")


def test_a_hub_id_that_cannot_be_fetched_is_a_connection_failure(tmp_path):
    """The test run is offline (tests/conftest.py)."""
    with pytest.raises(ConnectionFailed, match="SS-3400"):
        resolve_model("nobody/nothing", tmp_path / "cache")


def test_what_is_refused_is_refused_before_weights_are_loaded(tiny, tmp_path, pretrained, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError, match="SS-1400"):
        resolve_model(str(pretrained), tmp_path / "cache", CutPlan(3, 3))


def test_resident_memory_counts_what_is_touched():
    """A fresh mapping: what the allocator gives may be memory that was touched before and has stayed."""
    before = resident_bytes()
    with mmap.mmap(-1, 64 << 20) as block:
        assert resident_bytes() - before < 32 << 20, "mapped is not touched"
        block.write(b"x" * (64 << 20))
        assert resident_bytes() - before > 32 << 20
