"""Files in the official formats, through reader and measures, against the published definitions written out again here.

The oracles share no code with the product: they read the files' own structure, and follow the papers' evaluation step by step,
question by question. Where an official script leaves a missing answer out of the mean, the product counts it as wrong; so do the
oracles.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest

from securesplit.data.tasks.registry import read_task, task_named
from securesplit.data.tasks.score import read_predictions, score
from securesplit.data.tasks.source import Source

VOCABULARY = [
    "the",
    "a",
    "an",
    "A",
    "The",
    "owl",
    "Owl.",
    "red-hat",
    "U.S.",
    "o'clock",
    "3",
    "three",
    "\u4f60\u597d",
    "",
    " ",
    "caf\u00e9",
    "x\u00a0y",
]
SEEDS = range(12)


def measured(folder: Path, task: str, data: str, said: dict[str, object]) -> dict[str, float]:
    path, answers = folder / f"{task}.json", folder / "said.jsonl"
    path.write_text(data, encoding="utf-8")
    answers.write_text("".join(json.dumps({"id": k, "prediction": v}) + "\n" for k, v in said.items()))
    items = read_task(task_named(task), Source(path))
    found = score(task_named(task), items, read_predictions(answers, items), resamples=2)
    return {m.name: m.estimate.value for m in found.measures}


def phrase(draw: random.Random, least: int = 0) -> str:
    return " ".join(draw.choices(VOCABULARY, k=draw.randint(least, 4)))


def bare(text: str) -> list[str]:
    """SQuAD's normalisation as its paper says it: no case, no punctuation, no articles, white space as one."""
    letters = [c for c in text.lower() if c not in string.punctuation]
    return [word for word in "".join(letters).split() if word not in {"a", "an", "the"}]


def agree(gold: str, said: str) -> tuple[float, float]:
    """Exact match, and F1 over words, each as often as both have it."""
    wanted, got = bare(gold), bare(said)
    if not wanted or not got:
        return float(wanted == got), float(wanted == got)
    left, hits = list(wanted), 0
    for word in got:
        if word in left:
            left.remove(word)
            hits += 1
    precision, recall = hits / len(got), hits / len(wanted)
    return float(wanted == got), 0.0 if not hits else 2 * precision * recall / (precision + recall)


def best(golds: list[str], said: str) -> tuple[float, float]:
    pairs = [agree(gold, said) for gold in golds]
    return max(p[0] for p in pairs), max(p[1] for p in pairs)


def mean(pairs: list[tuple[float, float]]) -> dict[str, float]:
    return {"em": sum(p[0] for p in pairs) / len(pairs), "f1": sum(p[1] for p in pairs) / len(pairs)}


@pytest.mark.parametrize("seed", SEEDS)
def test_multirc(tmp_path, seed):
    draw = random.Random(seed)
    lines, said, questions = [], {}, []
    for passage in range(draw.randint(1, 4)):
        asked = []
        for question in range(draw.randint(1, 3)):
            answers, judged = [], []
            for answer in range(draw.randint(1, 5)):
                label = draw.randint(0, 1)
                spoken = draw.choice(["yes", "no", "Yes, it is", "0", "1", "perhaps", "", None, "missing"])
                if spoken != "missing":
                    said[f"{passage}/{question}/{answer}"] = spoken
                named = {"yes": 1, "Yes, it is": 1, "1": 1, "no": 0, "0": 0}.get(spoken, 1 - label)
                answers.append({"text": "t", "idx": answer, "label": label})
                judged.append((label, named))
            asked.append({"question": "q", "idx": question, "answers": answers})
            questions.append(judged)
        lines.append(json.dumps({"idx": passage, "passage": {"text": "p", "questions": asked}}))
    precisions, recalls, hits, called, right, exact = [], [], 0, 0, 0, 0
    for judged in questions:
        both = sum(gold * named for gold, named in judged)
        positive, true = sum(named for _, named in judged), sum(gold for gold, _ in judged)
        precisions.append(both / positive if positive else 1.0)
        recalls.append(both / true if true else 1.0)
        hits, called, right = hits + both, called + positive, right + true
        exact += all(gold == named for gold, named in judged)

    def harmonic(p: float, r: float) -> float:
        return 2 * p * r / (p + r) if p + r else 0.0

    expected = {
        "f1m": harmonic(sum(precisions) / len(questions), sum(recalls) / len(questions)),
        "f1a": harmonic(hits / called if called else 1.0, hits / right if right else 1.0), "em": exact / len(questions),
    }  # fmt: skip
    found = measured(tmp_path, "multirc", "\n".join(lines), said)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_record(tmp_path, seed):
    draw = random.Random(seed)
    lines, said, pairs = [], {}, []
    for passage in range(draw.randint(1, 4)):
        queries = []
        for query in range(draw.randint(1, 3)):
            golds = [draw.choice(["The Who", "the", "A", "Ada Stone", "U.S.", "us"]) for _ in range(draw.randint(1, 3))]
            answers = [{"start": 0, "end": 1, "text": gold} for gold in golds]
            queries.append({"query": "@placeholder sang", "idx": query, "answers": answers})
            spoken = draw.choice([phrase(draw), draw.choice(golds), "who", "", None, "missing"])
            if spoken == "missing" or spoken is None:
                pairs.append((0.0, 0.0))
            else:
                pairs.append(best(golds, spoken))
            if spoken != "missing":
                said[f"{passage}/{query}"] = spoken
        lines.append(
            json.dumps({"idx": passage, "source": "cnn", "passage": {"text": "xyz", "entities": []}, "qas": queries})
        )
    assert measured(tmp_path, "record", "\n".join(lines), said) == pytest.approx(mean(pairs), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_coqa(tmp_path, seed):
    draw = random.Random(seed)
    stories, said, pairs = [], {}, []
    for number in range(draw.randint(1, 4)):
        turns = draw.randint(1, 4)
        people = draw.choice([0, 0, 1, 3])
        golds = [
            [draw.choice(["A", "the owl", "owl", "red hat", "yes", "no"]) for _ in range(1 + people)]
            for _ in range(turns)
        ]

        def replies(who: int, golds: list[list[str]] = golds) -> list[dict[str, object]]:
            return [
                {"input_text": gold[who], "turn_id": i + 1, "span_start": -1, "span_end": -1, "span_text": ""}
                for i, gold in enumerate(golds)
            ]

        stories.append({
            "source": "race", "id": f"s{number}", "story": "p", "answers": replies(0),
            "questions": [{"input_text": "q", "turn_id": i + 1} for i in range(turns)],
            **({"additional_answers": {str(i): replies(i + 1) for i in range(people)}} if people else {}),
        })  # fmt: skip
        for i, gold in enumerate(golds):
            spoken = draw.choice([phrase(draw), draw.choice(gold), "owl", "", None, "missing"])
            if spoken != "missing":
                said[f"s{number}/{i + 1}"] = spoken
            if spoken in {"missing", None}:
                pairs.append((0.0, 0.0))
            elif len(gold) == 1:
                pairs.append(best(gold, spoken))
            else:
                each = [best([g for j, g in enumerate(gold) if j != left], spoken) for left in range(len(gold))]
                pairs.append((sum(e[0] for e in each) / len(each), sum(e[1] for e in each) / len(each)))
    data = json.dumps({"version": "1.0", "data": stories})
    assert measured(tmp_path, "coqa", data, said) == pytest.approx(mean(pairs), abs=1e-12)


def test_a_missing_answer_is_wrong_also_where_nothing_is_left_of_the_gold_one(tmp_path):
    """An empty answer agrees with "A" by the official scripts; no answer at all does not."""
    data = json.dumps({"prompt": "Which letter?", "answer": "A", "id": "0"})
    for said, value in (({"0": ""}, 1.0), ({"0": None}, 0.0), ({}, 0.0)):
        found = measured(tmp_path, "pairs", data, said)
        assert (found["em"], found["f1"]) == (value, value)
