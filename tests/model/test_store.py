"""A model on disk: each party loads its own file and no other, and an altered file is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from securesplit.errors import CheckFailed, InputError
from securesplit.model.architectures import ARCHITECTURES
from securesplit.model.manifest import hash_file, read_manifest
from securesplit.model.plan import ROLES, CutPlan
from securesplit.model.store import load_back, load_front, load_middle, load_whole, verify_model
from securesplit.model.writer import resplit, write_model

FAMILIES = [a.model_type for a in ARCHITECTURES]
IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(2))
LOAD = {"front": load_front, "middle": load_middle, "back": load_back}

# Runs in a process of its own: loads one part with all three files present, and reports every file that was opened,
# by Python (audit hook), by safetensors (spy) and as mapped memory (/proc).
_SPY = """
import json, pathlib, sys
opened = set()
sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)
import safetensors, securesplit.model.store as store
from securesplit.model.memory import resident_bytes
true_open, asked = safetensors.safe_open, []
def spy(path, **options):
    opened.add(str(path))
    handle = true_open(path, **options)
    class Spied:
        def __enter__(self): handle.__enter__(); return self
        def __exit__(self, *a): return handle.__exit__(*a)
        def keys(self): return handle.keys()
        def get_tensor(self, name): asked.append(name); return handle.get_tensor(name)
    return Spied()
store.safe_open = spy
directory, role = pathlib.Path(sys.argv[1]), sys.argv[2]
before = resident_bytes()
part = getattr(store, f"load_{role}")(directory)
for value in part.state_dict().values(): value.float().sum()
maps = pathlib.Path("/proc/self/maps")
if maps.exists(): opened.update(line.split()[-1] for line in maps.read_text().splitlines() if "/" in line)
print(json.dumps({"opened": sorted(p for p in opened if p.startswith(str(directory))), "asked": asked, "rss": resident_bytes() - before}))
"""


def spied(directory, roles):
    """What each role's own process opened; the processes run side by side, since importing torch takes seconds."""
    running = [
        subprocess.Popen([sys.executable, "-c", _SPY, str(directory), role], stdout=subprocess.PIPE, text=True)
        for role in roles
    ]
    answers = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running)
    return dict(zip(roles, map(json.loads, answers), strict=True))


@pytest.fixture
def directory(tiny, tmp_path):
    write_model(tiny("llama", tied=True), CutPlan(2, 2), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_parts_are_the_model(tiny, tmp_path, family, tied):
    model = tiny(family, tied=tied)
    manifest = write_model(model, CutPlan(2, 1), tmp_path / "m")
    assert (manifest.tied, manifest.layers, manifest.dtype) == (tied, 6, "float32")
    parts = [LOAD[role](tmp_path / "m") for role in ROLES]
    with torch.no_grad():
        assert torch.equal(parts[2](parts[1](parts[0](IDS))), model(IDS).logits)
        whole = load_whole(tmp_path / "m")
        assert torch.equal(whole(IDS).logits, model(IDS).logits)
    assert (whole.get_output_embeddings().weight is whole.get_input_embeddings().weight) == tied
    caches = [part.new_cache() for part in parts]
    assert [len(part.span) for part in parts] == [2, 3, 1]
    assert all(cache.past is not None for cache in caches)


@pytest.mark.parametrize(("tied", "roles"), [(True, ROLES), (False, ("middle",))], ids=["tied", "untied"])
def test_no_party_opens_what_is_not_its_own(tiny, tmp_path, tied, roles):
    home = tmp_path / "model"
    manifest = write_model(tiny("llama", tied=tied), CutPlan(2, 2), home)
    ends = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    for role, seen in spied(home, roles).items():
        assert {p for p in seen["opened"] if p.endswith(".safetensors")} == {str(home / f"{role}.safetensors")}
        assert not [p for p in seen["opened"] if "token" in p], "no part needs the tokenizer"
        assert set(seen["asked"]) == set(manifest.part(role).tensors)
        own = {"front": {"model.embed_tokens.weight"}, "middle": set(), "back": ends - {"model.embed_tokens.weight"}}[
            role
        ]
        assert set(seen["asked"]) & ends == own
        layers = {int(n.split(".")[2]) for n in seen["asked"] if ".layers." in n}
        assert layers == {"front": {0, 1}, "middle": {2, 3}, "back": {4, 5}}[role]


def test_each_party_works_without_the_others_files(directory, tmp_path):
    needs = {"front": ("front",), "middle": ("middle",), "back": ("back",)}
    for role, kept in needs.items():
        own = tmp_path / role
        own.mkdir()
        for file in ("config.json", "manifest.json", *(f"{k}.safetensors" for k in kept)):
            shutil.copy(directory / file, own / file)
        LOAD[role](own)
        states = {state.file: state.state for state in verify_model(own)}
        assert states[f"{role}.safetensors"] == "ok"
        assert [s for f, s in states.items() if f.endswith("safetensors") and f != f"{role}.safetensors"] == [
            "absent"
        ] * 2
        for other in set(ROLES) - {role}:
            with pytest.raises(InputError, match="SS-1405"):
                LOAD[other](own)
        with pytest.raises(InputError, match="SS-1405"):
            load_whole(own)


def test_weights_appear_where_the_cut_says(directory):
    names = {role: set(load_file(directory / f"{role}.safetensors")) for role in ROLES}
    assert not names["front"] & names["middle"]
    assert not names["middle"] & names["back"]
    assert not [n for n in names["middle"] if "embed" in n or "lm_head" in n or n == "model.norm.weight"]
    assert "lm_head.weight" in names["back"], "a tied head is stored again, so that the back needs no other file"


@pytest.mark.parametrize("plan", [CutPlan(0, 0), CutPlan(1, 4), CutPlan(2, 2)])
def test_cutting_again_gives_the_bytes_of_cutting_afresh(tiny, directory, tmp_path, plan):
    again = resplit(directory, plan, tmp_path / "again")
    fresh = write_model(tiny("llama", tied=True), plan, tmp_path / "fresh")
    assert again == fresh
    assert again.digest == read_manifest(tmp_path / "again").digest
    for file in ("config.json", *(f"{role}.safetensors" for role in ROLES)):
        assert hash_file(tmp_path / "again" / file) == hash_file(tmp_path / "fresh" / file)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".writing")]


def test_the_digest_changes_with_the_weights_the_cut_and_the_configuration(tiny, tmp_path):
    digests = {
        write_model(tiny("llama"), CutPlan(2, 2), tmp_path / "a").digest,
        write_model(tiny("llama"), CutPlan(1, 2), tmp_path / "b").digest,
        write_model(tiny("llama", rms_norm_eps=1e-3), CutPlan(2, 2), tmp_path / "c").digest,
        write_model(tiny("llama").to(torch.bfloat16), CutPlan(2, 2), tmp_path / "d").digest,
    }
    assert len(digests) == 4
    text = (tmp_path / "a" / "manifest.json").read_text() + (tmp_path / "a" / "config.json").read_text()
    assert str(tmp_path) not in text
    assert "transformers_version" not in text


@pytest.mark.parametrize("file", ["front.safetensors", "middle.safetensors", "back.safetensors", "config.json"])
def test_an_altered_file_is_refused(directory, file):
    path = directory / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckFailed, match="SS-1540") as caught:
        verify_model(directory)
    assert file in caught.value.details
    for role in ROLES if file == "config.json" else (file.split(".")[0],):
        with pytest.raises(CheckFailed, match="SS-1540"):
            LOAD[role](directory)
    with pytest.raises(CheckFailed, match="SS-1540"):
        resplit(directory, CutPlan(1, 1), directory.parent / "other")
    assert not (directory.parent / "other").exists()


def rewritten(directory, **changes):
    path = directory / "manifest.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"format": 2},
        {"front": -1},
        {"front": 5},
        {"layers": "6"},
        {"dtype": "int8"},
        {"parts": []},
        {"config": {"file": "../config.json", "sha256": "0" * 64, "bytes": 1}},
        {"client_files": [{"file": "/etc/passwd", "sha256": "0" * 64, "bytes": 1}]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_manifest_that_breaks_the_schema_is_refused(directory, change):
    rewritten(directory, **change)
    with pytest.raises(InputError, match="SS-1404"):
        load_middle(directory)


def test_a_part_cannot_point_to_another_parts_file(directory):
    parts = json.loads((directory / "manifest.json").read_text())["parts"]
    parts[1]["file"] = "front.safetensors"
    rewritten(directory, parts=parts)
    with pytest.raises(InputError, match="SS-1404"):
        load_middle(directory)


def test_tensors_that_do_not_fit_are_named(directory):
    path = directory / "middle.safetensors"
    tensors = load_file(path)
    gone, bent = sorted(tensors)[0], sorted(tensors)[1]
    tensors[bent] = tensors[bent][:1].contiguous()
    del tensors[gone]
    save_file(tensors, path)
    parts = json.loads((directory / "manifest.json").read_text())["parts"]
    parts[1].update(sha256=hash_file(path), bytes=path.stat().st_size)
    rewritten(directory, parts=parts)
    with pytest.raises(InputError, match="SS-1403") as caught:
        load_middle(directory)
    assert f"{gone}: missing" in caught.value.details
    assert any(bent in detail and "shape" in detail for detail in caught.value.details)


def test_a_manifest_of_another_model_is_refused(tiny, tmp_path, directory):
    rewritten(directory, layers=7)
    with pytest.raises(InputError, match="SS-1404"):
        load_front(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "\x00"])
def test_garbage_for_a_manifest_is_refused(directory, text):
    (directory / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="SS-1404"):
        verify_model(directory)


def test_a_directory_in_the_way_is_left_alone(tiny, tmp_path, directory):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    for target in (tmp_path / "full", directory):
        before = sorted(p.name for p in target.iterdir())
        with pytest.raises(InputError, match="SS-1408"):
            write_model(tiny("llama", tied=True), CutPlan(1, 1), target)
        assert sorted(p.name for p in target.iterdir()) == before
    # The very same content, written by another process meanwhile, is no error.
    write_model(tiny("llama", tied=True), CutPlan(2, 2), directory)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".writing")]


def test_mixed_and_unknown_types_are_refused(tiny, tmp_path):
    model = tiny("llama")
    model.model.norm.to(torch.bfloat16)
    with pytest.raises(InputError, match="SS-1402"):
        write_model(model, CutPlan(1, 1), tmp_path / "mixed")
    with pytest.raises(InputError, match="SS-1402"):
        write_model(tiny("llama").double(), CutPlan(1, 1), tmp_path / "double")
    assert not list(tmp_path.iterdir())


def test_the_files_are_plain_safetensors_under_the_models_own_names(tiny, directory):
    """The oracle is the stock loader of tensors: name by name, bit for bit."""
    state = tiny("llama", tied=True).state_dict()
    seen = set()
    for role in ROLES:
        with safe_open(directory / f"{role}.safetensors", framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - not a dict
                assert torch.equal(stream.get_tensor(name), state[name])
                seen.add(name)
    assert seen == set(state)
