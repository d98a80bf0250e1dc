"""Ward notes: determinism, labels and the shape that the demo's timings were measured with."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from securesplit.data.corpus import read_corpus
from securesplit.data.notes import ward_notes, write_notes
from securesplit.errors import InputError


def test_equal_seeds_give_equal_notes_in_another_process_too():
    here = ward_notes(5, 11)
    code = "from securesplit.data.notes import ward_notes; print(*(n.text for n in ward_notes(5, 11)), sep='\\n')"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.splitlines() == [note.text for note in here]


def test_another_seed_gives_other_notes():
    assert not {n.text for n in ward_notes(50, 1)} & {n.text for n in ward_notes(50, 2)}


def test_a_longer_list_starts_with_the_shorter_one():
    assert ward_notes(40, 3)[:10] == ward_notes(10, 3)


def test_all_notes_differ():
    assert len({n.text for n in ward_notes(500, 4)}) == 500


def test_labels_are_the_only_digits_and_stand_in_the_text():
    kinds = set()
    for note in ward_notes(300, 5):
        assert len(note.pii) == 2
        rest = note.text
        for piece in note.pii:
            assert piece in note.text
            rest = rest.replace(piece, "")
        assert not re.search(r"\d", rest)  # No number escapes its label.
        second = note.pii[1]
        kinds.add(
            "phone"
            if second.startswith("01632 960")
            else "born"
            if "/" in second
            else "record"
            if second.startswith("WN-")
            else "address"
        )
    assert kinds == {"phone", "born", "record", "address"}


def test_the_answer_follows_from_the_complaint():
    answers: dict[str, set[str]] = {}
    for note in ward_notes(600, 6):
        if found := re.search(r"with (.+?)\. .*was given\? Answer: (.+)\.$", note.text):
            answers.setdefault(found[1], set()).add(found[2])
    assert len(answers) >= 8
    assert all(len(given) == 1 for given in answers.values())


def test_a_note_stays_within_its_length():
    # 42 to 57 tokens of SmolLM2's tokenizer were measured over 1000 notes; words and characters stand in for it here.
    for note in ward_notes(300, 7):
        assert 17 <= len(note.text.split()) <= 40
        assert 120 <= len(note.text) <= 250


def test_written_notes_are_read_back(tmp_path):
    notes = ward_notes(20, 8)
    write_notes(tmp_path / "notes.jsonl", notes)
    assert [(r.text, r.pii) for r in read_corpus(tmp_path / "notes.jsonl")] == [(n.text, n.pii) for n in notes]


@pytest.mark.parametrize("count", [0, -1, 1_000_001])
def test_an_impossible_count_is_refused(count):
    with pytest.raises(InputError) as caught:
        ward_notes(count, 1)
    assert caught.value.code == "SS-1210"
