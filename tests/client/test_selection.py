"""Choosing a checkpoint on a part of the data: with a predictor that is a table, so that every expectation is by hand."""

from __future__ import annotations

import json
import os
import stat

import pytest

from securesplit.client.selection import Plan, drawn, matching, select
from securesplit.data.tasks.item import Item, Parts
from securesplit.data.tasks.registry import task_named
from securesplit.data.tasks.score import Prediction
from securesplit.data.tasks.templates import template_named
from securesplit.errors import InputError

TASK = task_named("boolq")
ITEMS = tuple(Item(str(i), f"g{i // 3}", Parts(text=f"t{i}", question="q"), ("true",)) for i in range(12))


class Model:
    """Says yes to the items of which a checkpoint is fond; counts what it is asked; may be killed after some answers."""

    def __init__(self, fond: dict[str, set[int]], dies_after: int | None = None) -> None:
        self.fond, self.left, self.asked = fond, dies_after, []

    def __call__(self, checkpoint, items):
        for item in items:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            self.asked.append((checkpoint.name, item.id))
            yield Prediction(id=item.id, prediction="yes" if int(item.id) in self.fond[checkpoint.name] else "no")


@pytest.fixture
def run(tmp_path):
    for number in (1, 2, 10):
        (tmp_path / f"run/checkpoint-{number}").mkdir(parents=True)
        (tmp_path / f"run/checkpoint-{number}/adapter-back.safetensors").write_bytes(bytes([number]))
    (tmp_path / "run/notes.txt").write_text("")
    return tmp_path


def plan(subset: int | None = None, **options) -> Plan:
    return Plan(TASK, options.get("items", ITEMS), template_named("plain", TASK), options.get("settings", "16"), subset)


def chosen(run, model, *, out="out", **options):
    found = matching(str(run / "run" / "*"))
    return select(plan(**options), found, model, run / out, lambda *_: None)


PART = set(drawn(ITEMS, 4))
FOND = {
    "checkpoint-1": PART,
    "checkpoint-2": set(range(12)) - PART,
    "checkpoint-10": PART | {min(set(range(12)) - PART)},
}


def test_folders_are_found_and_numbers_are_counted_as_numbers(run, monkeypatch):
    names = [p.name for p in matching(str(run / "run" / "checkpoint-*"))]
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-10"]
    monkeypatch.chdir(run)
    assert [p.name for p in matching("run/*")] == names
    for pattern in ("nothing/*", "", "run/notes.txt"):
        with pytest.raises(InputError, match="SS-1248"):
            matching(pattern)


def test_folders_without_a_client_s_adapters_are_no_checkpoints(run):
    """A server's folder, a run that has not ended, and this command's own folder, which a pattern meets the second time."""
    before = matching(str(run / "run/*"))
    for name in ("gpu", "unfinished", "scores"):
        (run / "run" / name).mkdir()
    (run / "run/gpu/adapter-middle.safetensors").touch()
    assert matching(str(run / "run/*")) == before
    first, second = (chosen(run, Model(FOND), out="run/scores", subset=4) for _ in range(2))
    assert first == second
    with pytest.raises(InputError) as caught:
        matching(str(run / "run/[gs]*"))
    assert (caught.value.code, "2 folder(s)" in caught.value.what) == ("SS-1248", True)


def test_a_plan_that_was_not_written_whole_is_none(run, monkeypatch):
    """As after ``kill -9`` between making the file and filling it."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            chosen(run, Model(FOND))
    assert not (run / "out/plan.json").exists()
    assert chosen(run, Model(FOND)).scores.examples == len(ITEMS)


def test_a_part_is_whole_groups_and_the_same_each_time():
    assert len(PART) == 6, "two groups of three"
    assert {ITEMS[i].group for i in PART}.isdisjoint({ITEMS[i].group for i in set(range(12)) - PART})
    assert drawn(ITEMS, 4) == drawn(ITEMS, 6)
    assert drawn(ITEMS, 100) == tuple(range(12))
    with pytest.raises(InputError, match="SS-1248"):
        drawn(ITEMS, 0)


def test_the_best_of_the_part_is_evaluated_on_all(run):
    model = Model(FOND)
    found = chosen(run, model, subset=4)
    assert found.best.name == "checkpoint-1", "of equals the earliest"
    assert [s.measures[0].estimate.value for _, s in found.tried] == [1, 0, 1]
    assert found.scores.measures[0].estimate.value == 0.5, "on all of the data"
    assert found.scores.examples == 12
    assert len(model.asked) == 3 * 6 + 6, "what was predicted for the part is not asked for again"
    for path in (run / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_a_subset_all_of_the_data_chooses(run):
    found = chosen(run, Model(FOND))
    assert found.best.name == "checkpoint-10"
    assert found.scores == found.tried[2][1]


@pytest.mark.parametrize("after", [0, 1, 5, 6, 7, 17, 18, 20])
def test_a_run_that_was_stopped_goes_on_and_asks_nothing_twice(run, after):
    whole = chosen(run, Model(FOND), subset=4, out="whole")
    first = Model(FOND, dies_after=after)
    with pytest.raises(KeyboardInterrupt):
        chosen(run, first, subset=4)
    files = sorted((run / "out").glob("*.jsonl"))
    if files:  # The last line was not written whole.
        with files[-1].open("a") as file:
            file.write('{"id": "1')
    second = Model(FOND)
    assert chosen(run, second, subset=4) == whole
    assert len(first.asked) == after
    assert len(set(first.asked + second.asked)) == len(first.asked) + len(second.asked) == 24
    third = Model(FOND, dies_after=0)
    assert chosen(run, third, subset=4) == whole


def test_a_folder_of_another_evaluation_is_refused(run):
    chosen(run, Model(FOND), subset=4)
    for other in ({"subset": 5}, {"subset": 4, "settings": "32"}, {"subset": 4, "items": ITEMS[:-1]}):
        with pytest.raises(InputError, match="SS-1247"):
            chosen(run, Model(FOND), **other)
    (run / "run/checkpoint-2/adapter-back.safetensors").write_bytes(b"changed")
    with pytest.raises(InputError, match="SS-1247"):
        chosen(run, Model(FOND), subset=4)
    (run / "foreign").mkdir()
    (run / "foreign/0.jsonl").write_text(json.dumps({"id": "0"}))
    with pytest.raises(InputError, match="SS-1247"):
        chosen(run, Model(FOND), out="foreign")
    (run / "file").write_text("")
    with pytest.raises(InputError, match="SS-1247"):
        chosen(run, Model(FOND), out="file")


def test_lower_perplexity_is_better(run):
    text = task_named("text")
    items = tuple(Item(str(i), str(i), Parts(), ("a",)) for i in range(3))

    def predict(checkpoint, asked):
        nats = {"checkpoint-1": 2.0, "checkpoint-2": 1.0, "checkpoint-10": 3.0}[checkpoint.name]
        return (Prediction(id=item.id, nats=nats, tokens=1) for item in asked)

    wanted = Plan(text, items, template_named("plain", text), "", None)
    assert (
        select(wanted, matching(str(run / "run/*")), predict, run / "out", lambda *_: None).best.name == "checkpoint-2"
    )
