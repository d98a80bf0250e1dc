"""A sweep is resumable, skips what is done by its content, and gives the same however it is spread."""

from __future__ import annotations

import json
import shutil
import tomllib

import pytest

from attacks import sweep
from attacks.sweep import Cell, Grid, Recorded, cells_of, read_grid, run_cells
from securesplit.cli.attack_sweep import to_toml
from securesplit.errors import InputError
from securesplit.policy.load import load_policy
from securesplit.policy.schema import Policy
from securesplit.protocol.job import load_job


@pytest.fixture(scope="module")
def files(tmp_path_factory, draw):
    home = tmp_path_factory.mktemp("grid")
    lines = (json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in draw(60, 10, seed=77).tolist())
    (home / "public.jsonl").write_text("\n".join(lines) + "\n")
    (home / "private.jsonl").write_text("\n".join(f'{{"text": "w{i} w2"}}' for i in range(1, 60)) + "\n")
    return home


def grid(**changes):
    stated = {
        "name": "tiny", "model": "tiny", "job": "job.toml", "policies": ["a", "b"], "cuts": [[2, 1]], "seeds": 2,
        "data": "private.jsonl", "aux": "public.jsonl", "attacks": ["ridge", "vocabulary-nn"],
    }  # fmt: skip
    return Grid.model_validate({**stated, **changes})


@pytest.fixture(scope="module")
def cells(files, pytestconfig, model_dirs, unsafe, private):
    job = load_job(pytestconfig.rootpath / "examples" / "job.toml")

    def make(stated: Grid, *, bare: bool = False) -> tuple[Cell, ...]:
        return cells_of(
            stated, [unsafe] if bare else [unsafe, private(8.0, 10.0)], job, lambda cut: model_dirs(cut[0]), files
        )

    return make


@pytest.fixture(scope="module")
def maker(record, draw):
    """A recorder that counts its calls; its recordings have the tiny model's rows."""
    calls = []

    def make(cell: Cell, folder) -> Recorded:
        calls.append(cell.digest)
        record(folder / "transcript", draw(6, 10, seed=1), cell.policy, layers=cell.job.cut.front)
        return Recorded(loss=2.0 + cell.seed, initial=3.0)

    make.calls = calls
    return make


def figures(found):
    return [
        [c.digest, c.seed, c.loss, *((r.name, r.value, r.value_ci95, r.shuffled) for r in c.report.attacks)]
        for c in found.cells
    ]


def test_a_grid_is_its_product_without_cells_that_would_be_alike(cells):
    found = cells(grid(epsilons=[4.0, 16.0], releases=[1, 4], codecs=["f32", "bf16"], cuts=[[1, 1], [2, 1]]))
    assert len({cell.digest for cell in found}) == len(found)
    bare = [c for c in found if c.policy.unsafe]
    noised = [c for c in found if not c.policy.unsafe]
    assert len(bare) == 2 * 2 * 2 * 2, "a budget is nothing to a policy without noise"
    assert len(noised) == 2 * 2 * 2 * 2, "and K nothing to a policy that releases once"
    assert {c.policy.privacy.epsilon for c in noised} == {4.0, 16.0}
    assert {(c.job.cut.front, c.job.codec) for c in found} == {(a, b) for a in (1, 2) for b in ("f32", "bf16")}


def test_finished_cells_are_not_run_again_and_a_grown_grid_keeps_them(cells, maker, tmp_path):
    told = []
    first = run_cells(cells(grid(seeds=1), bare=True), tmp_path, maker, tell=lambda *t: told.append(t))
    assert len(first.cells) == 1 == len(maker.calls)
    assert told[-1][:2] == (1, 1)
    assert first.cells[0].report.worst == 1.0
    assert first.cells[0].loss == 2.0
    again = run_cells(cells(grid(seeds=1), bare=True), tmp_path, maker)
    assert figures(again) == figures(first)
    assert len(maker.calls) == 1
    grown = run_cells(cells(grid(), bare=True), tmp_path, maker)
    assert len(grown.cells) == 2
    assert len(maker.calls) == 2
    texts = (tmp_path / first.cells[0].digest / "cell.json").read_text()
    assert '"examples"' not in texts, "a cell holds figures; the texts lie with the recording's truth"


def test_a_sweep_that_was_stopped_goes_on(cells, maker, tmp_path):
    class Stop(Exception):
        pass

    def dies(cell, folder):
        (folder / "half").write_text("half a recording")
        raise Stop

    before = len(maker.calls)
    with pytest.raises(Stop):
        run_cells(cells(grid(seeds=1), bare=True), tmp_path, dies)
    assert list(tmp_path.iterdir()) == [], "nothing half-made is left"
    whole = run_cells(cells(grid(seeds=1), bare=True), tmp_path, maker)
    (tmp_path / whole.cells[0].digest / "cell.json").unlink()  # Stopped between recording and attack.
    assert figures(run_cells(cells(grid(seeds=1), bare=True), tmp_path, dies)) == figures(whole)
    assert len(maker.calls) == before + 1


def test_other_data_is_another_cell(cells, files):
    before = {c.digest for c in cells(grid())}
    path = files / "private.jsonl"
    text = path.read_text()
    try:
        path.write_text(text + '{"text": "w9"}\n')
        assert not before & {c.digest for c in cells(grid())}
    finally:
        path.write_text(text)
    assert before == {c.digest for c in cells(grid())}


def test_other_content_of_the_model_settings_or_release_is_another_cell(
    cells, files, pytestconfig, model_dirs, unsafe, tmp_path, monkeypatch
):
    job = load_job(pytestconfig.rootpath / "examples" / "job.toml")

    def digests(place):
        return {c.digest for c in cells_of(grid(), [unsafe], job, lambda _: place, files)}

    before = digests(model_dirs(2))
    copy = shutil.copytree(model_dirs(2), tmp_path / "copy")
    assert digests(copy) == before, "the place is nothing"
    for part, key in (("parts", "middle.safetensors"), ("client_files", "tokenizer.json")):
        changed = shutil.copytree(copy, tmp_path / part)
        stated = json.loads((changed / "manifest.json").read_text())
        next(f for f in stated[part] if f["file"] == key)["sha256"] = "0" * 64
        (changed / "manifest.json").write_text(json.dumps(stated))
        assert not digests(changed) & before
    with monkeypatch.context() as patched:
        patched.setattr("attacks.sweep.__version__", "0.0.0")
        assert not digests(copy) & before
    shipped = sweep.config()
    family = next(iter(shipped.families))
    other = shipped.families[family].model_copy(update={"settings": {"steps": 1}})
    with monkeypatch.context() as patched:
        patched.setattr(
            sweep, "config", lambda: shipped.model_copy(update={"families": {**shipped.families, family: other}})
        )
        assert not digests(copy) & before


@pytest.mark.parametrize(("jobs", "pool"), [(2, "local"), (1, "ray")])
def test_processes_give_what_one_process_gives(cells, maker, tmp_path, jobs, pool):
    if pool == "ray":
        pytest.importorskip("ray")
    chosen = cells(grid(seeds=1))
    here = run_cells(chosen, tmp_path / "here", maker)
    for cell in here.cells:
        shutil.copytree(tmp_path / "here" / cell.digest, tmp_path / "there" / cell.digest)
        (tmp_path / "there" / cell.digest / "cell.json").unlink()
    # The recordings are there, so that whatever is given as a recorder is not called; any importable function serves.
    there = run_cells(chosen, tmp_path / "there", shutil.copyfile, jobs=jobs, pool=pool)
    assert figures(there) == figures(here)


@pytest.mark.parametrize("text", ["", "nonsense", 'name = "x"\nseeds = 0', 'name = "A b"'])
def test_a_grid_with_faults_names_them_all(tmp_path, text):
    (tmp_path / "g.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_grid(tmp_path / "g.toml")
    assert caught.value.code == "SS-1713"


def test_the_shipped_grid_is_one(pytestconfig):
    assert read_grid(pytestconfig.rootpath / "examples" / "sweep.toml").seeds == 3


@pytest.mark.parametrize("name", ["lab", "balanced", "strict"])
def test_policies_survive_being_written(pytestconfig, name):
    policy = load_policy(pytestconfig.rootpath / "policies" / f"{name}.toml")
    again = Policy.model_validate(tomllib.loads(to_toml(policy.model_dump(mode="json"))))
    assert again.digest == policy.digest
