"""Reading local text: the accepted shapes, and failures that name a place but never the text."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.data.corpus import Record, read_corpus
from securesplit.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data"
SECRET = "Wilhelmina"


def written(folder: Path, content: str | bytes, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, limit: int | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        read_corpus(path, limit)
    error = caught.value
    assert SECRET not in f"{error}{error.hint}{error.details}"
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None
    return error


def test_the_accepted_shapes(tmp_path):
    lines = [
        {"text": " plain "},
        {"text": "Ann has a cold", "pii": ["Ann"]},
        {
            "passage": {
                "text": "<b>Sent 1: </b>One &amp; two.<br><b>Sent 2: </b>BP < 90 and P > 120.",
                "questions": [1],
            },
            "idx": 3,
        },
        {"question": "Why? ", "answer": " Because."},
        {"title": "Left", "n": 3, "body": "right", "none": None},
        "a bare string",
    ]
    records = read_corpus(written(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n"))
    assert records == (
        Record("plain"),
        Record("Ann has a cold", ("Ann",)),
        Record("One & two. BP < 90 and P > 120."),
        Record("Why?\nBecause."),
        Record("Left\nright"),
        Record("a bare string"),
    )


def test_tags_stay_where_the_file_is_no_multirc(tmp_path):
    assert read_corpus(written(tmp_path, '{"text": "a <b>c</b>"}'))[0].text == "a <b>c</b>"


def test_an_array_over_many_lines(tmp_path):
    content = json.dumps([{"question": "q", "answer": "a"}, {"text": "t"}], indent=4)
    assert [r.text for r in read_corpus(written(tmp_path, " \n" + content, "a.json"))] == ["q\na", "t"]


def test_paragraphs_of_plain_text(tmp_path):
    content = "first line\r\nsecond line\r\n\r\n \r\nnext\n\n\n{not json}"
    assert [r.text for r in read_corpus(written(tmp_path, content, "a.txt"))] == [
        "first line second line",
        "next",
        "{not json}",
    ]


def test_equal_texts_are_all_kept_because_their_number_would_tell_that_they_are_equal(tmp_path):
    path = written(tmp_path, "\n".join(json.dumps({"text": t}) for t in ["a", "a", " a ", "b", "c"]))
    assert [r.text for r in read_corpus(path)] == ["a", "a", "a", "b", "c"]
    assert [r.text for r in read_corpus(path, 2)] == ["a", "a"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read_corpus(written(tmp_path, b"\xef\xbb\xbfhello", "a.txt"))[0].text == "hello"
    assert read_corpus(written(tmp_path, b'\xef\xbb\xbf{"text": "hello"}'))[0].text == "hello"
    assert read_corpus(written(tmp_path, b'\xef\xbb\xbf["hello"]'))[0].text == "hello"


@pytest.mark.parametrize(
    ("content", "name", "code", "place"),
    [
        ('{"text": "ok"}\n{"text": "' + SECRET, "a.jsonl", "SS-1203", "line 2"),
        ('{"text": "ok"}\n' + SECRET, "a.jsonl", "SS-1203", "line 2"),
        ('["ok",\n "' + SECRET + '"', "a.json", "SS-1203", "line 2"),
        ("[" * 100_000, "a.json", "SS-1203", "RecursionError"),
        ('{"text": ' + "9" * 5000 + "}", "a.jsonl", "SS-1203", "line 1"),
        ('{"text": "ok"}\n{"name": 3}', "a.jsonl", "SS-1204", "line 2"),
        ('["ok", {}]', "a.json", "SS-1204", "item 2"),
        ("7", "a.jsonl", "SS-1204", "line 1"),
        ('{"text": "' + SECRET + ' \\ud800"}', "a.jsonl", "SS-1204", "line 1"),
        ('{"text": "x", "pii": ["' + SECRET + '"]}', "a.jsonl", "SS-1204", "line 1"),
        ('{"text": "x", "pii": "x"}', "a.jsonl", "SS-1204", "line 1"),
        ('{"text": "x", "pii": [""]}', "a.jsonl", "SS-1204", "line 1"),
        (b"fine\n" + SECRET.encode() + b"\xff", "a.txt", "SS-1202", "line 2"),
        (b'["' + SECRET.encode() + b'\xff"]', "a.json", "SS-1202", "byte 12"),
        ("x" * ((1 << 22) + 1), "a.txt", "SS-1205", "line 1"),
        ("ok\n\n" + ("x" * 1000 + "\n") * 1100, "a.txt", "SS-1205", "line 3"),
        (json.dumps({"text": "x" * ((1 << 20) + 1)}), "a.jsonl", "SS-1205", "line 1"),
        ("", "a.jsonl", "SS-1206", "a.jsonl"),
        ("\n \n", "a.txt", "SS-1206", "a.txt"),
        ("[]", "a.json", "SS-1206", "a.json"),
    ],
)
def test_failures_name_the_place_and_not_the_text(tmp_path, content, name, code, place):
    error = refused(written(tmp_path, content, name))
    assert error.code == code
    assert place in error.what
    assert error.hint


def test_a_missing_file_and_an_empty_limit(tmp_path):
    assert refused(tmp_path / "absent.txt").code == "SS-1201"
    assert refused(tmp_path).code == "SS-1201"
    assert refused(written(tmp_path, "x", "a.txt"), 0).code == "SS-1207"


@settings(deadline=None, max_examples=150)
@given(
    content=st.one_of(st.binary(max_size=300), st.text(alphabet='[]{}":,\\u d8\n', max_size=60).map(str.encode)),
    name=st.sampled_from(["a.json", "a.jsonl", "a.txt"]),
)
def test_any_bytes_give_records_or_one_of_our_errors(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(content)
    records: tuple[Record, ...] = ()
    with contextlib.suppress(InputError):  # Any other exception fails the test.
        records = read_corpus(path)
        assert records
    assert all(r.text == r.text.strip() != "" for r in records)
    assert len({r.text for r in records}) == len(records)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=8))
def test_json_lines_keep_every_text(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("keep") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert [r.text for r in read_corpus(path)] == [t.strip() for t in texts]


def test_reading_needs_no_torch():
    code = "import sys, securesplit.data.corpus, securesplit.data.notes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared research data sets are not on this machine")
def test_the_real_files_are_read():
    passages = read_corpus(SHARED / "multirc" / "train.jsonl")
    lines = (SHARED / "multirc" / "train.jsonl").read_text().split("\n")
    assert len(passages) == len({json.loads(line)["passage"]["text"] for line in lines if line})
    assert not any("<b>" in r.text or "<br>" in r.text for r in passages)
    answers = read_corpus(SHARED / "huatuo" / "val.json", 50)
    raw = json.loads((SHARED / "huatuo" / "val.json").read_text())
    assert answers[0].text == f"{raw[0]['question'].strip()}\n{raw[0]['answer'].strip()}"
    assert len(answers) == 50


def test_an_object_may_name_whose_text_it_is(tmp_path):
    lines = [
        {"text": "one", "user": "ann"},
        {"question": "Why?", "answer": "So.", "user": "bob"},
        {"body": "x", "user": "c"},
    ]
    found = read_corpus(written(tmp_path, "\n".join(map(json.dumps, lines))))
    assert [(r.text, r.user) for r in found] == [("one", "ann"), ("Why?\nSo.", "bob"), ("x", "c")]
    for bad in (7, "", ["ann"]):
        error = refused(written(tmp_path, json.dumps({"text": SECRET, "user": bad})))
        assert error.code == "SS-1204"


def test_a_label_is_kept_and_is_no_part_of_the_text(tmp_path):
    lines = [
        {"text": "Ann", "label": "yes"},
        {"title": "Ben", "label": "no"},
        {"title": "Cid", "label": 1},
        {"question": "Why?", "answer": "So.", "label": "no"},
        {"text": "Dan"},
        {"text": "Ann", "label": "no"},
    ]
    found = read_corpus(written(tmp_path, "\n".join(map(json.dumps, lines))))
    assert [(r.text, r.label) for r in found] == [
        ("Ann", "yes"), ("Ben", "no"), ("Cid", None), ("Why?\nSo.", "no"), ("Dan", None), ("Ann", "no")
    ]  # fmt: skip
