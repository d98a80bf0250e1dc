"""Every official format on fixtures written by hand from its documentation; no line of a data set is copied here."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from securesplit.data.tasks.item import Parts, Turn
from securesplit.data.tasks.registry import TASKS, read_task, task_named
from securesplit.data.tasks.source import Source
from securesplit.errors import InputError

SHARED = Path(__file__).parents[4] / "shared" / "data"


def lines(folder: Path, *rows: object, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(task: str, path: Path, **options):
    return read_task(task_named(task), Source(path, **options))


MULTIRC = {
    "idx": 7,
    "version": 1.1,
    "passage": {
        "text": "<b>Sent 1: </b>Ada fed the owl.<br><b>Sent 2: </b>The owl slept.<br>",
        "questions": [
            {
                "question": "Who was fed?",
                "answers": [{"text": "An owl", "idx": 0, "label": 1}, {"text": "", "idx": 1, "label": 0}],
                "idx": 20,
            },
            {"question": "Who slept?", "answers": [{"text": "Ada", "idx": 2, "label": 0}], "idx": 21},
        ],
    },
}
RECORD = {
    "source": "Daily mail",
    "passage": {
        "text": "Ada Stone went to Lima.\n@highlight\nStone is a diver",
        "entities": [{"start": 0, "end": 8}, {"start": 18, "end": 21}],
    },
    "qas": [
        {
            "query": "@placeholder likes the sea",
            "answers": [{"start": 0, "end": 8, "text": "Ada Stone"}, {"start": 35, "end": 39, "text": "Stone"}],
            "idx": 3,
        }
    ],
    "idx": 1,
}
COQA = {
    "version": "1.0",
    "data": [
        {
            "source": "wikipedia",
            "id": "s1",
            "filename": "Owl.txt",
            "story": "Ada fed the owl at noon.",
            "questions": [{"input_text": "Who?", "turn_id": 1}, {"input_text": "When?", "turn_id": 2}],
            "answers": [
                {"span_start": 0, "span_end": 3, "span_text": "Ada", "input_text": "Ada", "turn_id": 1},
                {
                    "span_start": -1,
                    "span_end": -1,
                    "span_text": "",
                    "input_text": "noon",
                    "turn_id": 2,
                    "bad_turn": "true",
                },
            ],
            "additional_answers": {
                "0": [
                    {"span_start": 0, "span_end": 3, "span_text": "Ada", "input_text": "Ada did", "turn_id": 1},
                    {"span_start": 19, "span_end": 23, "span_text": "noon", "input_text": "at noon", "turn_id": 2},
                ]
            },
            "name": "Owl.txt",
        }
    ],
}


@pytest.mark.parametrize(
    ("task", "row", "id_", "parts", "answers"),
    [
        (
            "boolq", {"question": "is it so", "passage": "Title -- It is.", "idx": 4, "label": True}, "4",
            Parts(text="Title -- It is.", question="is it so"), ("true",),
        ),
        (
            "cb", {"premise": "He thinks so.", "hypothesis": "It is so.", "label": "neutral", "idx": 0}, "0",
            Parts(premise="He thinks so.", hypothesis="It is so."), ("neutral",),
        ),
        (
            "copa", {"premise": "It fell.", "choice1": "I let go.", "choice2": "I ate.", "question": "cause", "label": 0, "idx": 2}, "2",
            Parts(premise="It fell.", first="I let go.", second="I ate.", relation="cause"), ("0",),
        ),
        (
            "rte", {"premise": "Ada swims.", "hypothesis": "Ada moves.", "label": "entailment", "idx": 9}, "9",
            Parts(premise="Ada swims.", hypothesis="Ada moves."), ("entailment",),
        ),
        (
            "wic",
            {"word": "bank", "sentence1": "A bank lends.", "sentence2": "The bank of a river.", "idx": 5, "label": False,
             "start1": 2, "start2": 4, "end1": 6, "end2": 8, "version": 1.1},
            "5", Parts(word="bank", first="A bank lends.", second="The bank of a river."), ("false",),
        ),
        (
            "wsc",
            {"text": "Ada saw Bo because she looked.", "idx": 6, "label": True,
             "target": {"span1_index": 0, "span1_text": "Ada", "span2_index": 4, "span2_text": "she"}},
            "6", Parts(text="Ada saw Bo because she looked.", noun="Ada", pronoun="she"), ("true",),
        ),
    ],
)  # fmt: skip
def test_one_line_tasks_of_superglue(tmp_path, task, row, id_, parts, answers):
    (item,) = read(task, lines(tmp_path, row))
    assert (item.id, item.parts, item.answers, item.line) == (id_, parts, answers, 1)
    (bare,) = read(task, lines(tmp_path, {k: v for k, v in row.items() if k != "label"}))
    assert bare.answers == (), "test files have no labels"


def test_multirc_has_an_example_for_each_candidate(tmp_path):
    items = read("multirc", lines(tmp_path, MULTIRC))
    assert [(i.id, i.group, i.question, i.answers) for i in items] == [
        ("7/20/0", "7", "7/20", ("true",)), ("7/20/1", "7", "7/20", ("false",)), ("7/21/2", "7", "7/21", ("false",)),
    ]  # fmt: skip
    assert items[0].parts.text.split() == ["Ada", "fed", "the", "owl.", "The", "owl", "slept."]
    assert items[1].parts.candidate == "", "the published files hold empty candidates"
    assert len({i.user for i in items}) == 1


def test_record_has_an_example_for_each_query(tmp_path):
    (item,) = read("record", lines(tmp_path, RECORD))
    assert (item.id, item.group, item.answers) == ("1/3", "1", ("Ada Stone", "Stone"))
    assert "@highlight" not in item.parts.text


def test_coqa_has_an_example_for_each_turn_and_all_peoples_answers(tmp_path):
    path = tmp_path / "coqa.json"
    path.write_text(json.dumps(COQA, indent=1))
    first, second = read("coqa", path)
    assert (first.id, first.answers, first.parts.turns) == ("s1/1", ("Ada", "Ada did"), ())
    assert (second.id, second.answers, second.parts.turns) == ("s1/2", ("noon", "at noon"), (Turn("Who?", "Ada"),))
    assert first.line == 4, "the story begins there"


XSUM = (
    "[SN]URL[SN]\nhttp://example.test/1\n\n[SN]TITLE[SN]\nAn owl\n\n[SN]FIRST-SENTENCE[SN]\nAn owl was fed.\n\n"
    "[SN]RESTBODY[SN]\nAda fed it.\nShare this with\nIt slept.\n"
)


def test_xsum_joins_ids_and_documents(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "11.summary").write_text(XSUM)
    (folder / "12.data").write_text(XSUM.replace("SN]", "XSUM]").replace("FIRST-SENTENCE", "INTRODUCTION"))
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({"test": ["99"], "validation": ["11", "12"]}))
    items = read("xsum", folder, ids=ids, split="validation")
    assert [(i.id, i.answers, i.parts.text) for i in items] == [
        (name, ("An owl was fed.",), "Ada fed it.\nIt slept.") for name in ("11", "12")
    ]
    (line,) = read("xsum", lines(tmp_path, {"id": "5", "document": "Ada fed it.", "summary": "Fed."}))
    assert line.answers == ("Fed.",)


def test_huatuo_is_an_array_or_lines(tmp_path):
    rows = [{"answer": "多喝热水。", "question": "感冒怎么办？"}, {"question": "头疼？", "answer": "休息。"}]
    array = tmp_path / "a.json"
    array.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    assert [(i.parts.question, i.answers) for i in read("huatuo", array)] == [
        (r["question"], (r["answer"],)) for r in rows
    ]
    assert [i.answers for i in read("huatuo", lines(tmp_path, *rows))] == [(r["answer"],) for r in rows]


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="no names for open files here")
def test_a_pipe_is_read_from_its_beginning(array):
    """As in ``--data <(zcat notes.json.gz)``: what was looked at is not lost for what is read."""
    rows = [{"question": f"{i} 问", "answer": "答" * 50} for i in range(200)]
    text = json.dumps(rows) if array else "\n".join(map(json.dumps, rows))
    assert 4096 < len(text) < 1 << 17
    end, begin = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(begin, text.encode()), os.close(begin)))
    writer.start()
    try:
        assert [item.parts.question for item in read("huatuo", Path(f"/dev/fd/{end}"))] == [r["question"] for r in rows]
    finally:
        os.close(end)
        writer.join(10)


def test_free_formats(tmp_path):
    path = lines(
        tmp_path,
        {"prompt": "2+2?", "answer": "4", "id": "sum", "group": 1, "user": "ada"},
        {"input": "hi", "target": "hello"},
        {"prompt": "colour?", "answers": ["red", "blue"]},
        {"prompt": "unanswered"},
    )
    assert [(i.id, i.group, i.parts.text, i.answers, i.user) for i in read("pairs", path)] == [
        ("sum", "group:1", "2+2?", ("4",), "ada"), ("1", "1", "hi", ("hello",), None),
        ("2", "2", "colour?", ("red", "blue"), None), ("3", "3", "unanswered", (), None),
    ]  # fmt: skip
    table = tmp_path / "a.csv"
    table.write_text('﻿input,target,user\n"a, ""b""\nc",x,\n你好,世界,bo\n'.replace("﻿", "\ufeff"), encoding="utf-8")
    assert [(i.parts.text, i.answers, i.user, i.line) for i in read("pairs", table)] == [
        ('a, "b"\nc', ("x",), None, 2), ("你好", ("世界",), "bo", 4),
    ]  # fmt: skip
    assert [i.answers for i in read("labels", lines(tmp_path, {"text": "good", "label": "pos"}))] == [("pos",)]
    plain = tmp_path / "a.txt"
    plain.write_text("one\ntwo\n\n\nthree")
    assert [(i.answers, i.line) for i in read("text", plain)] == [(("one\ntwo",), 1), (("three",), 5)]
    assert [i.answers for i in read("text", lines(tmp_path, {"text": "one"}))] == [("one",)]


def told(task, path):
    with pytest.raises(InputError) as caught:
        read(task, path)
    assert caught.value.code == "SS-1240"
    return [detail.removeprefix(f"{path}:") for detail in caught.value.details]


@pytest.mark.parametrize("rest", ['[{"question": "c", "answer": "d"}]', "and so on", "]", '{"question": "c"}'])
def test_what_stands_behind_an_array_is_not_left_out_in_silence(tmp_path, rest):
    path = tmp_path / "two.json"
    path.write_text(f'[{{"question": "a", "answer": "b"}}]\n{rest}\n')
    assert told("huatuo", path) == ["2: stands behind the end of the JSON value that the file is"]


@pytest.mark.parametrize(
    ("head", "tail", "line"),
    [
        ('{"version": "1.0", ', "", 2),  # No end at all.
        ('{"version": "1.0", ', "\n oops}", 3),
        ('{"version": "1.0", ', "}\n{}", 3),
        ('{"version": "1.0", ', ',\n "data": []}', 3),
        ('{"version": "1.0", "version": "2.0", ', "}", 1),
        ('{"version": "1.0", ', ', "version": "1.0"}', 2),
        ('{[1]: "1.0", ', "}", 1),
        ('{"version": "1.0", ', ', {"a": 1}: 1}', 2),
    ],
)
def test_the_object_around_an_array_is_read_to_its_end(tmp_path, head, tail, line):
    path = tmp_path / "coqa.json"
    path.write_text(head + '"data":\n' + json.dumps(COQA["data"]) + tail)
    assert [detail.partition(":")[0] for detail in told("coqa", path)] == [str(line)]


def test_keys_behind_the_array_are_fine(tmp_path):
    path = tmp_path / "coqa.json"
    path.write_text(json.dumps({"data": COQA["data"], "version": "1.0", "more": {"a": [1]}}) + "\r\n")
    assert len(read("coqa", path)) == 2


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_row_of_csv_ends_at_no_other_mark_than_a_line_break(tmp_path, mark):
    path = tmp_path / "a.csv"
    path.write_text(f'prompt,answer\r\none{mark}two,"three{mark}\r\nfour"\r\nfive,six,seven\r\n', newline="")
    assert [detail.partition(":")[0] for detail in told("pairs", path)] == ["4"]
    path.write_text(f"text\none{mark}two\nthree\n", newline="")
    found = read("text", path)
    assert [item.answers[0] for item in found] == [f"one{mark}two", "three"]
    assert [item.line for item in found] == [2, 3]


def test_a_passage_or_a_story_stands_for_a_user(tmp_path):
    assert {i.user for i in read("multirc", lines(tmp_path, MULTIRC))} == {"passage:7"}
    assert {i.user for i in read("record", lines(tmp_path, RECORD))} == {"passage:1"}
    assert {i.user for i in read("coqa", lines(tmp_path, COQA, name="a.json"))} == {"story:s1"}


def test_a_saved_data_set_needs_its_package(tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="SS-1243"):
        read("pairs", folder)


def test_a_saved_data_set(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the optional extra 'datasets' is not installed")
    table = arrow.table({"input": ["a", "b", "c"], "target": ["x", None, "z"]})
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 2), table.slice(2)), strict=True):
        with (tmp_path / name).open("wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part)
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": n} for n in names], "_fingerprint": "0", "_split": None}))
    want = [("a", ("x",), 1), ("b", (), 2), ("c", ("z",), 3)]
    assert [(i.parts.text, i.answers, i.line) for i in read("pairs", tmp_path)] == want
    (tmp_path / names[1]).write_bytes((tmp_path / names[0]).read_bytes()[:-200])
    with pytest.raises(InputError, match="SS-1240") as caught:
        read("pairs", tmp_path)
    assert caught.value.details[0].startswith(f"{tmp_path / names[1]}: cannot be read as Arrow")


@pytest.mark.parametrize(
    "state", ["", "[]", "{}", '{"_data_files": []}', '{"_data_files": [{"filename": "../a.arrow"}]}']
)
def test_a_state_that_names_no_files_of_its_folder_is_refused(tmp_path, state):
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(InputError, match="SS-1240") as caught:
        read("pairs", tmp_path)
    assert caught.value.details == (f"{tmp_path / 'state.json'}: does not name the Arrow files of a data set",)


def test_a_split_of_what_has_none_is_refused_not_passed_over(tmp_path):
    path = lines(tmp_path, MULTIRC)
    for options in ({"ids": path}, {"split": "train"}):
        with pytest.raises(InputError, match="SS-1240"):
            read("multirc", path, **options)
    article = lines(tmp_path, {"id": "1", "document": "d", "summary": "s"}, name="x.jsonl")
    with pytest.raises(InputError, match="SS-1240"):
        read("xsum", article, split="train")


def test_names_and_limits(tmp_path):
    with pytest.raises(InputError, match="SS-1241"):
        task_named("nothing")
    path = lines(tmp_path, {"text": "a"}, {"text": "b"})
    assert len(read_task(task_named("text"), Source(path), 1)) == 1
    with pytest.raises(InputError, match="SS-1207"):
        read_task(task_named("text"), Source(path), 0)
    assert len({task.name for task in TASKS}) == len(TASKS)


@pytest.mark.skipif(not (SHARED / "multirc").is_dir(), reason="the real MultiRC files are not beside this checkout")
@pytest.mark.parametrize(("name", "groups", "examples", "right"), [("val", 83, 4848, 2075), ("test", 166, 9693, 0)])
def test_real_multirc(name, groups, examples, right):
    items = read("multirc", SHARED / "multirc" / f"{name}.jsonl")
    assert len(items) == examples
    assert len({i.group for i in items}) == groups
    assert sum(i.answers == ("true",) for i in items) == right
    if name == "val":
        gold = json.loads((SHARED / "multirc" / "fit_official_val.jsonl").read_text())
        ours: dict[str, list[int]] = {}
        for item in items:
            ours.setdefault(item.question, []).append(int(item.answers == ("true",)))
        assert ours == {f"{row['pid']}/{row['qid']}": row["scores"] for row in gold}


@pytest.mark.skipif(not (SHARED / "huatuo").is_dir(), reason="the real Huatuo files are not beside this checkout")
@pytest.mark.parametrize(("name", "count"), [("train", 3000), ("val", 300), ("test", 1)])
def test_real_huatuo(name, count):
    items = read("huatuo", SHARED / "huatuo" / f"{name}.json")
    assert len(items) == count
    raw = json.loads((SHARED / "huatuo" / f"{name}.json").read_text(encoding="utf-8"))
    assert [(i.parts.question, i.answers[0]) for i in items] == [(row["question"], row["answer"]) for row in raw]


@pytest.mark.skipif(not (SHARED / "xsum").is_dir(), reason="the real XSum ids are not beside this checkout")
def test_real_xsum_ids_name_the_documents_that_are_missing(tmp_path):
    (ids,) = (SHARED / "xsum").glob("*.json")
    with pytest.raises(InputError) as caught:
        read("xsum", tmp_path, ids=ids, split="validation")
    assert "11332 fault(s)" in caught.value.what
    assert len(caught.value.details) == 1001
