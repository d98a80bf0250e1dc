"""Scores of whole files: by hand for each family of measures; what is missing or unparsable is wrong; bad predictions are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from securesplit.data.tasks.item import Item, Parts
from securesplit.data.tasks.registry import TASKS, read_task, task_named
from securesplit.data.tasks.score import Prediction, read_predictions, score
from securesplit.data.tasks.source import Source
from securesplit.errors import InputError

SHARED = Path(__file__).parents[4] / "shared" / "data"


def items(*answers: tuple[str, ...], question: str = "") -> list[Item]:
    return [Item(str(i), f"g{i // 2}", Parts(), a, question=question or str(i)) for i, a in enumerate(answers)]


def scored(task: str, gold: list[Item], said: dict[str, object]):
    found = score(task_named(task), gold, [Prediction(id=k, prediction=v) for k, v in said.items()], resamples=50)
    return found, {m.name: m.estimate.value for m in found.measures}


def test_classes_count_missing_and_unparsable_answers_as_wrong():
    found, values = scored(
        "boolq", items(("true",), ("false",), ("true",), ("true",)), {"0": "Yes.", "1": False, "2": "know"}
    )
    assert values["accuracy"] == 0.5
    assert (found.examples, found.answered, found.unparsable, found.groups) == (4, 3, 1, 2)
    # true: 1 hit, 2 missed, F1 1/2; false: 1 hit, F1 1.
    assert values["macro_f1"] == pytest.approx(0.75)


def test_classes_of_the_data_s_own():
    _, values = scored("labels", items(("好",), ("坏",)), {"0": "好。", "1": "好"})
    assert values["accuracy"] == 0.5


def test_a_class_may_be_named_by_its_number():
    for task, names in {
        "rte": ("entailment", "not_entailment"),
        "cb": ("entailment", "contradiction", "neutral"),
    }.items():
        gold = items(*((name,) for name in names))
        assert scored(task, gold, {str(i): i for i in range(len(names))})[1] == {"accuracy": 1, "macro_f1": 1}


def test_copa_takes_numbers_letters_and_names():
    _, values = scored("copa", items(("0",), ("1",), ("1",), ("0",)), {"0": 0, "1": "B", "2": "choice2", "3": "B"})
    assert values["accuracy"] == 0.75


def test_multirc_takes_an_unparsable_answer_for_the_wrong_one():
    gold = items(("true",), ("false",), ("false",), question="q")
    _, right = scored("multirc", gold, {"0": "yes", "1": 0, "2": "no"})
    assert right == {"f1a": 1, "f1m": 1, "em": 1, "em1": 1}
    found, values = scored("multirc", gold, {"0": "yes", "1": "perhaps", "2": "no"})
    assert found.unparsable == 1
    assert values == {"f1a": pytest.approx(2 / 3), "f1m": pytest.approx(2 / 3), "em": 0, "em1": 1}
    assert scored("multirc", gold, {})[1] == {"f1a": 0, "f1m": 0, "em": 0, "em1": 0}


def test_spans_turns_and_texts():
    _, values = scored("record", items(("Ada Stone", "Stone"), ("Lima",)), {"0": "stone", "1": "in Lima"})
    assert values == {"f1": pytest.approx((1 + 2 / 3) / 2), "em": 0.5}
    _, values = scored("coqa", items(("red hat", "hat")), {"0": "hat"})
    assert values["f1"] == pytest.approx((1 + 2 / 3) / 2)
    _, values = scored("xsum", items(("an owl slept",), ("a dog ran",)), {"0": "an owl slept"})
    assert values == {"rouge_1": 0.5, "rouge_2": 0.5, "rouge_l": 0.5}, "all samples count, not the last"
    _, values = scored("huatuo", items(("一二三四五",)), {"0": "一二三四六"})
    assert list(values) == ["bleu_4", "rouge_1", "rouge_2", "rouge_l"]
    assert values["bleu_4"] == pytest.approx(0.2**0.25)
    _, values = scored("pairs", items(("The owl", "x")), {"0": "owl"})
    assert (values["em"], values["f1"]) == (1, 1)
    _, values = scored("pairs-zh", items(("休息",)), {"0": "休息"})
    assert values["em"] == values["rouge_l"] == 1


def test_perplexity_when_every_answer_has_its_likelihood():
    gold = items(("a",), ("b",))
    both = [Prediction(id="0", nats=math.log(2), tokens=1), Prediction(id="1", nats=3 * math.log(4), tokens=3)]
    found = score(task_named("text"), gold, both, resamples=50)
    assert [m.name for m in found.measures] == ["perplexity"]
    assert found.measures[0].estimate.value == pytest.approx(2 ** ((1 + 6) / 4))
    with pytest.raises(InputError, match="SS-1245"):
        score(task_named("text"), gold, both[:1])
    with pytest.raises(InputError, match="SS-1245"):
        score(task_named("boolq"), items((), ()), [])


def test_every_task_can_be_scored():
    for task in TASKS:
        name = task.labels[0].name if task.labels else "一二三四" if task.language == "zh" else "an owl slept well"
        said = [Prediction(id=0, prediction=name, nats=1.0, tokens=1)]
        assert score(task, items((name,)), said).measures[0].estimate.value == pytest.approx(
            math.e if task.name == "text" else 1
        )


def test_predictions_are_refused_all_at_once(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = ['{"id": "0", "prediction": "yes"}', '{"id": 1, "prediction": true}', '{"id": "0"}', '{"id": "Wilhelmina"}', '{"id": 1.5}', "x",
            '{"id": "1", "nats": -1}']  # fmt: skip
    path.write_text("\n".join(rows))
    with pytest.raises(InputError, match="SS-1240") as caught:
        read_predictions(path, items(("true",), ("false",)))
    told = [d.removeprefix(f"{path}:") for d in caught.value.details]
    assert [d[0] for d in told] == ["3", "4", "5", "6", "7"]
    assert "Wilhelmina" not in str(caught.value.details)
    path.write_text("\n".join(rows[:2]))
    assert [p.prediction for p in read_predictions(path, items(("true",), ("false",)))] == ["yes", True]


@pytest.mark.skipif(not (SHARED / "multirc").is_dir(), reason="the real MultiRC files are not beside this checkout")
def test_real_multirc_against_the_official_definition_on_the_raw_file():
    """Predictions by a rule, scored from the raw JSON with sets, sharing nothing with the product."""
    path = SHARED / "multirc" / "val.jsonl"
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    said, precisions, recalls, exact, hits, called, right = {}, [], [], [], 0, 0, 0
    for row in raw:
        for question in row["passage"]["questions"]:
            gold = {a["idx"] for a in question["answers"] if a["label"]}
            mine = {a["idx"] for a in question["answers"] if len(a["text"]) % 3}
            said.update({f"{row['idx']}/{question['idx']}/{a['idx']}": a["idx"] in mine for a in question["answers"]})
            precisions.append(len(gold & mine) / len(mine) if mine else 1.0)
            recalls.append(len(gold & mine) / len(gold) if gold else 1.0)
            exact.append(gold == mine)
            hits, called, right = hits + len(gold & mine), called + len(mine), right + len(gold)
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    task = task_named("multirc")
    found = score(
        task, read_task(task, Source(path)), [Prediction(id=k, prediction=v) for k, v in said.items()], resamples=50
    )
    values = {m.name: m.estimate for m in found.measures}
    assert values["f1m"].value == pytest.approx(2 * p * r / (p + r), abs=1e-12)
    assert values["f1a"].value == pytest.approx(2 * hits / (called + right), abs=1e-12)
    assert values["em"].value == pytest.approx(sum(exact) / 953, abs=1e-12)
    assert values["f1a"].groups == 83
    assert values["f1a"].low < values["f1a"].value < values["f1a"].high
