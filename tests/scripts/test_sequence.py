"""The sequence study on made-up rows: who reads what, that the split tends to clean sums, and that figures add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.sequence.findings import judge
from scripts.sequence.records import read_corpus
from scripts.sequence.study import Rows, Setting, World, build_world, draw, partition, release, ridge_heads
from securesplit.errors import InputError


@pytest.fixture(scope="module")
def world() -> World:
    """Labels are the sign of a direction that deep rows show and 40-wide shallow rows hide among louder ones."""
    generator = np.random.default_rng(0)

    def rows(count: int) -> Rows:
        hidden = generator.normal(size=(count, 8))
        shallow = np.hstack([hidden, generator.normal(size=(count, 32)) @ generator.normal(size=(32, 32))])
        deep = hidden @ np.linspace(1, 2, 8)[:, None] + 0.1 * generator.normal(size=(count, 40))
        labels = np.where(hidden.sum(1, keepdims=True) > 0, 1.0, -1.0)
        return Rows(*(torch.from_numpy(part).float() for part in (shallow, shallow, deep, labels)))

    return build_world(rows(600), torch.arange(600) // 6, rows(300), rows(400))


def test_clients_have_whole_passages_in_order_and_share_none(world):
    clients = partition(world, Setting(20, 12, 8.0, 1.5), 3)
    assert len(torch.cat(clients).unique()) == 240
    assert all(len(world.passages[client].unique()) == 2 for client in clients)
    assert not torch.equal(clients[0], partition(world, Setting(20, 12, 8.0, 1.5), 4)[0])
    with pytest.raises(ValueError, match="many records"):
        partition(world, Setting(51, 12, 8.0, 1.5), 3)


def test_a_release_has_the_stated_noise():
    drawn = release(torch.zeros(400, 1, 7), 1.5)
    assert float(drawn.var()) == pytest.approx((2 / 1.5) ** 2, rel=0.12)
    assert float((release(torch.full((9, 1, 7), 9.0), 500.0).flatten(1).norm(dim=1)).max()) <= 1.05  # Clipped at 1.


def test_without_noise_the_split_is_the_clean_sum_and_with_all_of_it_it_is_worse(world):
    quiet = {name: float(right.mean()) for name, right in draw(world, Setting(40, 12, 1e4, 500.0), 0).items()}
    assert quiet["split"] == pytest.approx(quiet["secure sum, no noise"], abs=0.02)
    assert quiet["split, without own records"] > 0.8
    loud = [draw(world, Setting(40, 12, 1e-3, 1e-4), seed)["split, without own records"].mean() for seed in range(9)]
    assert sum(loud) / len(loud) < 0.72  # Each is a coin's: a random direction is right as often as it is wrong.


def test_leave_one_out_is_leave_one_out():
    rows, labels = torch.randn(9, 4, dtype=torch.float64), torch.sign(torch.randn(9, 1, dtype=torch.float64))
    heads = ridge_heads(rows, labels)

    def error(ridge: float) -> float:
        total = 0.0
        for i in range(9):
            kept = [j for j in range(9) if j != i]
            z, y = rows[kept].numpy(), labels[kept].numpy()
            head = np.linalg.solve(z.T @ z + ridge * np.eye(4), z.T @ y)
            total += float((rows[i].numpy() @ head - labels[i].numpy()).item() ** 2)
        return total

    best = min((ridge for ridge in heads if ridge != "loo"), key=lambda ridge: error(float(ridge)))
    assert torch.equal(heads["loo"], heads[best])


def test_gains_are_paired_and_the_baseline_is_the_best_in_hindsight():
    always, never = torch.ones(60).double(), torch.zeros(60).double()
    half = torch.tensor([1.0, 0.0] * 30).double()
    draws = [
        {"client-only, x, ridge 1.0": never, "client-only, x, ridge 3.0": half, "client-only, x, ridge loo": never,
         "split": always}
    ] * 3  # fmt: skip
    best, figures = judge(draws, torch.arange(60) // 2)
    assert best == "client-only, x, best ridge in hindsight"
    split = next(figure for figure in figures if figure.method == "split")
    # Every passage has one gain and one draw, so that nothing is left to vary.
    assert (split.accuracy, split.gain, split.gain_seed_error) == (1.0, 0.5, 0.0)
    assert split.gain_error == pytest.approx(0, abs=1e-9)
    assert len(figures) == 3


def test_the_quoted_error_counts_the_tested_passages():
    generator = torch.Generator().manual_seed(1)
    gains = (torch.rand(50, generator=generator) < 0.5).double().repeat_interleave(4)  # One answer per passage.
    draws = [{"client-only, x, ridge loo": torch.zeros(200).double(), "split": gains}] * 4
    split = judge(draws, torch.arange(50).repeat_interleave(4))[1][-1]
    assert split.gain_error == pytest.approx(float(gains.std()) / 50**0.5, rel=0.15)  # 50 passages, not 200 records.


def write(folder: Path, name: str, text: str, labels: tuple[int, int] | None) -> None:
    answers = [{"text": "two words", "label": 0}, {"text": "four words stand here", "label": 1}]
    for answer, label in zip(answers, labels or (None, None), strict=True):
        answer["label"] = label
    passage = {"text": text, "questions": [{"question": f"What is in {name}?", "answers": answers, "idx": 1}]}
    (folder / f"{name}.jsonl").write_text(json.dumps({"passage": passage}) + "\n")


def test_labels_come_from_the_answers_and_a_tested_passage_that_is_private_too_is_left_out(tmp_path):
    long = "one two three four five six seven eight nine ten"
    write(tmp_path, "train", long, (0, 1))
    write(tmp_path, "test", "something else entirely", None)
    write(tmp_path, "val", "a passage of its own that nobody else has got", (1, 1))
    assert read_corpus(tmp_path, "long").private.labels == (1,)
    assert read_corpus(tmp_path, "long").tested.labels == (-1,)
    assert read_corpus(tmp_path, "several").tested.labels == (1,)
    correct = read_corpus(tmp_path, "correct")
    assert (correct.private.texts, correct.private.labels) == (("What is in train? four words stand here",), (1,))
    assert correct.public.labels == ()
    write(tmp_path, "val", f"it says: {long}", (1, 1))
    with pytest.raises(InputError, match="SS-1201"):  # Nothing is left to test on.
        read_corpus(tmp_path, "long")


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(InputError, match="SS-1201"):
        read_corpus(tmp_path, "long")
