"""The truth is read strictly, and its faults never show what stands in it."""

from __future__ import annotations

import json

import pytest

from attacks.evaluate import choose
from attacks.truth import Truth, read_truth, require_fitting
from attacks.view import Key
from securesplit.errors import InputError

LINE = {"peer": "p", "step": 0, "row": 0, "tokens": [1, 2], "text": "secret words", "pii": []}


def write(tmp_path, *lines):
    path = tmp_path / "truth.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def truth(step, tokens=(1, 2), peer="p", text="short"):
    return Truth(peer=peer, step=step, row=0, tokens=tokens, text=text)


def test_it_is_read_in_order_and_repetitions_are_dropped(tmp_path):
    found = read_truth(write(tmp_path, LINE, "", {**LINE, "step": 3}, LINE))
    assert [t.key for t in found] == [Key("p", 0, 0), Key("p", 3, 0)]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", {**LINE, "tokens": []}, {**LINE, "tokens": [-1]}, {**LINE, "step": "0"}, {**LINE, "secret": 1}, {**LINE, "pii": "a"}],
)  # fmt: skip
def test_every_fault_is_named_by_its_line_alone(tmp_path, line):
    with pytest.raises(InputError) as caught:
        read_truth(write(tmp_path, LINE, line, line))
    assert caught.value.code == "SS-1701"
    assert [d.split(":")[0] for d in caught.value.details] == ["line 2", "line 3"]
    assert "secret words" not in str(caught.value) + "".join(caught.value.details)


def test_contradictions_absence_and_emptiness_are_refused(tmp_path):
    for path in (write(tmp_path, LINE, {**LINE, "tokens": [9]}), tmp_path / "none.jsonl"):
        with pytest.raises(InputError) as caught:
            read_truth(path)
        assert caught.value.code == "SS-1701"
    with pytest.raises(InputError):
        read_truth(write(tmp_path, "", ""))


def test_the_first_sighting_of_each_record_is_attacked_senders_in_turn():
    truths = [
        truth(5, (1, 2)), truth(1, (1, 2)), truth(2, (3, 4)), truth(0, (1, 2), peer="q"), truth(9, (7, 8)),
    ]  # fmt: skip
    seen = [t.key for t in truths[:4]]
    chosen = choose(truths, seen, 0)
    assert [(t.peer, t.step) for t in chosen] == [("q", 0), ("p", 1), ("p", 2)]
    assert choose(truths, seen, 1) == chosen[:1]
    with pytest.raises(InputError) as caught:
        choose(truths, [Key("z", 0, 0)], 0)
    assert caught.value.code == "SS-1702"


@pytest.mark.parametrize(
    ("tokens", "length", "fault"),
    [((1, 9), 4, None), ((1, 10), 4, "a token outside of the vocabulary"), ((1,) * 5, 4, "more tokens than rows")],
)
def test_truth_that_does_not_fit_the_recording_is_refused(tokens, length, fault):
    told = [truth(0, tokens), truth(7, (99,) * 99)]  # The second is of a sequence that the recording lacks.
    lengths = {Key("p", 0, 0): length}
    if fault is None:
        require_fitting(told, lengths, 10)
        return
    with pytest.raises(InputError) as caught:
        require_fitting(told, lengths, 10)
    assert (caught.value.code, caught.value.exit_code) == ("SS-1701", 2)
    assert caught.value.details == (f"step 0, row 0: {fault}",)
