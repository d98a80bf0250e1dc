"""What is wrong with a file is said all at once, with file and line, and never with a word of what stands there."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.data.tasks import located
from securesplit.data.tasks.registry import TASKS, read_task, task_named
from securesplit.data.tasks.source import Source
from securesplit.errors import InputError
from tests.data.tasks.test_readers import COQA, MULTIRC, RECORD, XSUM

SECRET = "Wilhelmina"


def refused(task: str, path: Path, code: str = "SS-1240", **options: object) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        read_task(task_named(task), Source(path, **options))
    error = caught.value
    assert (error.code, error.exit_code) == (code, 2)
    assert SECRET not in f"{error}{error.hint}{error.details}"
    assert error.__cause__ is None
    return error.details


def raw(folder: Path, *texts: str | bytes, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(t if isinstance(t, bytes) else t.encode() for t in texts))
    return path


def test_all_faults_of_all_lines(tmp_path):
    good = {"question": "is it", "passage": "It is.", "idx": 0, "label": True}
    rows = [
        json.dumps(good),
        json.dumps({**good, "idx": 1, "label": "true"}),
        "",
        f'{{"question": "{SECRET}", ',
        json.dumps({**good, "idx": 2, SECRET: SECRET, "passage": "  "}),
        b'{"question": "\xff"}',
        json.dumps({**good, "idx": -1}),
        '{"idx": 3, "idx": 4}',
        json.dumps([SECRET]),
        json.dumps({**good, "idx": True}),
        '{"idx": NaN}',
        '{"question": "\\ud800", "passage": "x", "idx": 8}',
        "[" * 100_000,
        json.dumps(good),
    ]
    path = raw(tmp_path, *rows)
    details = refused("boolq", path)
    told = [d.removeprefix(f"{path}:").split(": ", 1) for d in details]
    assert {int(line) for line, _ in told} == {2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}
    said = {}
    for line, what in told:
        said.setdefault(int(line), []).append(what)
    assert said[2] == ["label: Input should be a valid boolean"]
    assert said[5] == ["passage: holds no text", "this entry: has a key that the format does not know"]
    assert said[6] == ["is not UTF-8 at byte 15"]
    assert said[8] == ["holds a key twice in one object"]
    assert said[9] == ["this entry: must be a JSON object"]
    assert said[13] == ["is nested too deeply"]
    assert said[14] == ["has an id that stood there before"]


def changed(base: dict, *path: object, to: object) -> dict:
    row = copy.deepcopy(base)
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return row


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("multirc", changed(MULTIRC, "passage", "questions", 1, "answers", 0, "label", to=2), "passage.questions.1.answers.0.label: "),
        ("multirc", changed(MULTIRC, "passage", "questions", 1, "answers", to=[]), "passage.questions.1: has no answers to judge"),
        ("multirc", changed(MULTIRC, "passage", "questions", 1, "idx", to=20), "passage: has two questions with one idx"),
        ("multirc", changed(MULTIRC, "passage", "questions", 0, "answers", 1, "idx", to=0), "passage.questions.0: has two answers with one idx"),
        ("multirc", changed(MULTIRC, "passage", "questions", 0, "answers", 1, to={"text": "x", "idx": 1}), "passage.questions.0: has a label for some"),
        ("record", changed(RECORD, "qas", 0, "answers", 0, "end", to=999), "this entry: an entity or answer does not lie in the passage"),
        ("record", changed(RECORD, "qas", 0, "query", to=SECRET), "qas.0: has no @placeholder"),
        ("record", changed(RECORD, "passage", "entities", 0, "start", to="0"), "passage.entities.0.start: "),
        ("copa", {"premise": "a", "choice1": "b", "choice2": "c", "question": SECRET, "idx": 0}, "question: Input should be 'cause' or 'effect'"),
        ("wic", {"word": "a", "sentence1": "a", "sentence2": "a", "start1": 0, "end1": 2, "start2": 0, "end2": 1, "idx": 0}, "this entry: start and end"),
        ("wsc", {"text": "a b", "target": {"span1_index": 2, "span1_text": "a", "span2_index": 0, "span2_text": "b"}, "idx": 0}, "this entry: an index"),
        ("huatuo", {"question": "a"} | {"answer": ""}, "answer: "),
        ("pairs", {"prompt": "a", "input": "b"}, "this entry: needs exactly one of"),
        ("pairs", {"prompt": "a", "answer": "b", "answers": ["c"]}, "this entry: has more than one of"),
        ("labels", {"text": "a", "label": 3}, "label: Input should be a valid string"),
        ("text", {"text": SECRET * (1 << 17)}, "text: String should have at most"),
    ],
)  # fmt: skip
def test_faults_of_content_name_their_place(tmp_path, task, row, said):
    path = raw(tmp_path, json.dumps(row))
    (detail,) = refused(task, path)
    assert detail.startswith(f"{path}:1: {said}"), detail


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (("data", 0, "questions", 1, "turn_id", 5), 1, "questions: turn_id must run"),
        ((*("data", 0, "answers", [])[:3], []), 1, "answers: each question needs its answer"),
        (("data", 0, "additional_answers", {SECRET: []}), 1, "additional_answers: each list needs"),
        (("data", 0, "additional_answers", {SECRET: [{"x": SECRET}]}), 1, "additional_answers.0.input_text: "),
    ],
)  # fmt: skip
def test_faults_of_coqa(tmp_path, change, line, said):
    path = raw(tmp_path, json.dumps(changed(COQA, *change[:-1], to=change[-1])), name="c.json")
    details = refused("coqa", path)
    assert any(said in d and d.startswith(f"{path}:{line}: ") for d in details), details


@pytest.mark.parametrize(
    "text", ["", "{}", '{"data": 3}', '{"data": [', '{"data": [{}, ]}', "[]", '{"data"', SECRET, '{"data": [1 2]}']
)
def test_broken_coqa_files_are_refused_and_not_crashed_on(tmp_path, text):
    refused("coqa", raw(tmp_path, text, name="c.json"))


def test_a_broken_array_is_told_by_the_line_where_reading_stopped(tmp_path):
    text = '[\n {"question": "a", "answer": "b"},\n {"question": 1,\n  "answer": "b"},\n {"question": oops}\n]'
    path = raw(tmp_path, text, name="a.json")
    details = refused("huatuo", path)
    assert [d.removeprefix(f"{path}:").split(":")[0] for d in details] == ["3", "5"]


def test_faults_of_csv_and_files(tmp_path):
    path = raw(tmp_path, "input,target", "a,b,c", 'a,"b', name="a.csv")
    assert [d.removeprefix(f"{path}:")[0] for d in refused("pairs", path)] == ["2", "3"]
    (detail,) = refused("pairs", raw(tmp_path, "input,input", "a,b", name="a.csv"))
    assert "is no header" in detail
    (detail,) = refused("pairs", raw(tmp_path, "words", name="a.txt"))
    assert "plain text has no fields" in detail
    refused("boolq", tmp_path / "absent.jsonl", "SS-1201")
    (detail,) = refused("boolq", raw(tmp_path, ""))
    assert "holds no example" in detail
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "dataset_dict.json").write_text("{}")
    (detail,) = refused("text", tmp_path / "several")
    assert "several splits" in detail
    (detail,) = refused("text", tmp_path)
    assert "state.json" in detail


def test_faults_of_xsum(tmp_path):
    folder, ids = tmp_path / "texts", tmp_path / "ids.json"
    folder.mkdir()
    (folder / "1.summary").write_text(XSUM)
    (folder / "2.summary").write_text(XSUM.split("[SN]RESTBODY")[0] + SECRET)
    (folder / "3.summary").write_bytes(b"[SN]RESTBODY[SN]\n\n\xff")
    ids.write_text('{"train": [],\n "test": ["1",\n "2", "3", "4",\n "../1", 5, "1"]}')
    details = refused("xsum", folder, ids=ids, split="test")
    assert [d.removeprefix(str(tmp_path)).split(": ")[0] for d in details] == [
        "/texts/2.summary", "/texts/3.summary:3", "/texts/4.summary", "/ids.json:4", "/ids.json:4", "/ids.json:4",
    ]  # fmt: skip
    assert refused("xsum", folder) == (
        f"{folder}: is a folder of documents: name the file of ids and the split as well",
    )
    refused("xsum", folder, ids=ids, split="validation")


def test_sizes_are_capped_before_parsing(tmp_path, monkeypatch):
    monkeypatch.setattr(located, "MAX_LINE_BYTES", 64)
    path = raw(tmp_path, json.dumps({"text": "a"}), json.dumps({"text": "b" * 100}))
    (detail,) = refused("text", path)
    assert detail.startswith(f"{path}:2: is over 64 bytes")
    path = raw(
        tmp_path,
        json.dumps({"text": "b" * 63}),
        json.dumps({"text": "b" * 500}),
        json.dumps({"text": 1}),
        "c" * 64,
        "c" * 65,
    )
    details = refused("text", path)
    assert [d.removeprefix(f"{path}:").partition(":")[0] for d in details] == ["1", "2", "3", "4", "5"], (
        "what follows is read"
    )
    if Path("/dev/zero").exists():
        monkeypatch.setattr(located, "MAX_LINES_BYTES", 1000)
        refused("multirc", Path("/dev/zero"), "SS-1205")
    monkeypatch.setattr(located, "MAX_FILE_BYTES", 64)
    refused("huatuo", raw(tmp_path, json.dumps([{"question": "a" * 100}]), name="a.json"), "SS-1205")
    monkeypatch.setattr(located, "MAX_LINES_BYTES", 100)
    refused("text", raw(tmp_path, *[json.dumps({"text": "a"})] * 20), "SS-1205")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["idx", "text", "passage", "question", "questions", "answers", "label", "data", "qas", "zz"]), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    task=st.sampled_from([t.name for t in TASKS]),
    value=JSON | st.binary(max_size=40),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv"]),
)
def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path_factory, task, value, name):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    with contextlib.suppress(InputError):  # Anything else that is raised is a defect.
        assert read_task(task_named(task), Source(path))


def test_all_faults_of_a_table_each_where_its_row_begins(tmp_path):
    path = raw(
        tmp_path,
        "prompt,answer",
        '"x"y,z',
        "a,b,c",
        '"two',
        'lines",b',
        "d,",
        '"never',
        "closed,b",
        "e,f",
        name="a.csv",
    )
    told = [detail.removeprefix(f"{path}:").partition(":")[0] for detail in refused("pairs", path)]
    assert told == ["2", "3", "7"], "a row without an answer is a test set's"
    bound = csv.field_size_limit()
    path.write_text("text\n" + "a" * 200_000 + "\n" + "b" * (1 << 21) + "\n")
    (detail,) = refused("text", path)
    assert detail.startswith(f"{path}:3: text: "), "as long as in any other format"
    assert csv.field_size_limit() == bound


def test_a_place_is_told_once_though_its_value_may_be_of_several_types(tmp_path):
    path = raw(
        tmp_path,
        '{"prompt": "x", "id": true}',
        '{"prompt": "x", "answers": "y"}',
        '{"prompt": "x", "one": 1, "two": 2}',
    )
    told = [detail.removeprefix(f"{path}:") for detail in refused("pairs", path)]
    assert told == [
        "1: id: Input should be a valid string, or Input should be a valid integer", "2: answers: must be a list",
        "3: this entry: has a key that the format does not know",
    ]  # fmt: skip
