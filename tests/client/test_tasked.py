"""A task's examples through the real client: the loss is of the answers alone, as the unsplit model has it."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from securesplit.client import noted
from securesplit.client.records import job_batches
from securesplit.client.run import Run
from securesplit.client.tasked import tasked_batches
from securesplit.data.batches import IGNORED
from securesplit.data.tasks.chosen import Chosen, read_tasked
from securesplit.errors import InputError
from tests.e2e.house import WORDS, build_model, build_tokenizer, policy_of
from tests.e2e.ward import NAMES, with_task

END = 1


def identify(text: bytes) -> str:
    return hmac.new(b"k" * 32, text, hashlib.sha256).hexdigest()


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"w{3 + i} w{4 + i} w{5 + i}", "answer": f"w{20 + i} w{21 + i}"} for i in range(6)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, path


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def made(house, chosen, path, *, policy=None, **options):
    tokenizer = build_tokenizer()
    return tasked_batches(
        read_tasked(chosen, path, None), policy or policy_of(), options.pop("job", None) or house.job(blind=False), tokenizer, identify,
        model="m", held_out=2, max_tokens=options.pop("max_tokens", None),
    )  # fmt: skip


def test_batches_hold_prompt_and_answer_and_learn_the_answer(house, pairs):
    rows, path = pairs
    training, held_out = made(house, Chosen("pairs"), path)
    assert sorted(s for batch in training for s in batch.sources) == [0, 1, 2, 3]
    assert sorted(s for batch in held_out for s in batch.sources) == [4, 5]
    for batch in (*training, *held_out):
        for row, source in enumerate(batch.sources):
            prompt, answer = ids(rows[source]["prompt"]), [*ids(rows[source]["answer"]), END]
            assert batch.tokens[row, : batch.lengths[row]].tolist() == prompt + answer
            assert batch.labels[row].tolist() == [IGNORED] * len(prompt) + answer + [IGNORED] * (
                batch.bucket - batch.lengths[row]
            )


def test_the_loss_through_the_split_is_that_of_the_answers(house, pairs):
    _, path = pairs
    policy = policy_of()
    training, _ = made(house, Chosen("pairs"), path, policy=policy)
    client, _, _ = house.joined(house.job(blind=False), policy)
    model = build_model()
    batch = training[0]
    total, count = 0.0, 0
    with torch.no_grad():
        logits = model(batch.tokens).logits  # Right padding: what comes before it does not see it.
        for row in range(len(batch.sources)):
            for place in range(1, batch.lengths[row]):
                if batch.labels[row, place] != IGNORED:
                    total += float(functional.cross_entropy(logits[row, place - 1], batch.tokens[row, place]))
                    count += 1
    assert client.evaluate((batch,)) == pytest.approx(total / count, abs=1e-5)


def test_a_passage_is_held_out_whole_or_not_at_all(house, tmp_path, caplog):
    """Two examples are asked for; the last passage has three. None of its answers may be learnt."""
    path = tmp_path / "val.jsonl"

    def passage(number: int, answers: int) -> dict[str, object]:
        said = [{"text": f"w{20 + i}", "idx": i, "label": i % 2} for i in range(answers)]
        questions = [{"question": f"w{3 + number}", "idx": 0, "answers": said}]
        return {"idx": number, "passage": {"text": f"w{10 + number}", "questions": questions}}

    path.write_text("".join(json.dumps(passage(n, count)) + "\n" for n, count in enumerate((2, 1, 3))))
    training, held_out = made(house, Chosen("multirc"), path, policy=policy_of(buckets=[64]))
    assert sorted(s for batch in training for s in batch.sources) == [0, 1, 2]
    assert sorted(s for batch in held_out for s in batch.sources) == [3, 4, 5]
    path.write_text(json.dumps(passage(0, 4)) + "\n")
    assert not caplog.records
    training, held_out = made(house, Chosen("multirc"), path, policy=policy_of(buckets=[64]))
    assert [len(batch.sources) for batch in (*training, *held_out)] == [2, 2], "as asked, for want of another passage"
    assert "one passage" in caplog.text


def test_long_prompts_are_cut_and_answers_never(house, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": " ".join(["w9"] * 40), "answer": "w20 w21"}) + "\n" + json.dumps({"prompt": "w9", "answer": "w22"}) + "\n"
                    + json.dumps({"prompt": "w9", "answer": "w23"}))  # fmt: skip
    training, _ = made(house, Chosen("pairs"), path, policy=policy_of(buckets=[4, 8]))
    assert training[0].tokens.tolist() == [[*[WORDS.index("w9")] * 5, *ids("w20 w21"), END]]
    with pytest.raises(InputError, match="SS-1244"):
        made(house, Chosen("pairs"), path, policy=policy_of(buckets=[3]))


def test_tokens_are_kept_and_found_again(house, pairs, tmp_path):
    _, path = pairs
    first = made(house, Chosen("pairs", kept=tmp_path / "kept"), path)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    again = made(house, Chosen("pairs", kept=tmp_path / "kept"), path)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    for one, two in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.labels, two.labels)
        assert (one.records, one.contents) == (two.records, two.contents)
    made(house, Chosen("pairs", kept=tmp_path / "kept"), path, max_tokens=12)
    assert len(list((tmp_path / "kept").iterdir())) == 2, "another cut is another content"


def test_a_classification_job_asks_at_its_one_place(house, tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{5 + i} w{6 + i}", "label": NAMES[i % 2]}) + "\n" for i in range(4)))
    job = with_task(house.job(blind=False))
    training, _ = made(house, Chosen("labels"), path, job=job)
    assert sorted(training[0].classes.tolist()) == [0, 1]
    tasked = read_tasked(Chosen("labels"), path, None)
    prompts = [replace(record, text=f"{record.text.split(chr(10))[0]}\n\nLabel:") for record in tasked.records]
    (by_hand,), _ = job_batches(prompts, policy_of(), job, build_tokenizer(), identify, held_out=2, max_tokens=None)
    assert torch.equal(by_hand.tokens, training[0].tokens)


def test_under_unit_user_a_passage_stands_for_one(house, tmp_path):
    path = tmp_path / "m.jsonl"
    answers = [{"text": "w5", "idx": i, "label": i % 2} for i in range(4)]
    path.write_text(
        json.dumps(
            {"idx": 3, "passage": {"text": "w4", "questions": [{"question": "w6", "idx": 0, "answers": answers}]}}
        )
    )
    assert {record.user for record in read_tasked(Chosen("multirc"), path, None).records} == {"passage:3"}


def test_what_was_chosen_stands_in_the_record_of_a_run(tmp_path):
    run = Run(
        policy=policy_of(), keys=tmp_path, server="wss://localhost:1", data=tmp_path / "docs", out=tmp_path / "out", held_out=2, limit=None, max_tokens=None, truth=None, alone=False, model=None, cache=None,
        tasked=Chosen("xsum", "plain", tmp_path / "ids.json", "train"),
    )  # fmt: skip
    said = {option.name: option.value for option in noted._options(run)}
    expected = {"task": "xsum", "template": "plain", "ids": str(tmp_path / "ids.json"), "split": "train"}
    assert said.items() >= expected.items()
    assert "kept" not in said
