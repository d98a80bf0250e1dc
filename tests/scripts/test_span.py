"""The span benchmark: how claims are scored, that a cell runs, and what the page says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from scripts.span.cells import CELLS, Cell, Score, World, measure, paired, score
from scripts.span.table import as_rows, page
from scripts.span.words import WORDS, made_on
from securesplit.model.plan import CutPlan
from securesplit.model.writer import write_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench-span"
ODDS = torch.linspace(5, -5, 50)  # Token 0 is the commonest.


def test_a_bag_counts_every_token_once():
    found = score([[1, 1, 2], [2, 3]], (3, 9, 1, 40), (), ODDS, seconds=1.5)
    assert (found.recall, found.precision, found.claimed, found.total, found.seconds) == (2 / 3, 0.5, 4, 3, 1.5)
    assert found.prior == 1.0, "the four commonest hold all of 1, 2 and 3"
    assert score([[1, 2]], (), (), ODDS, seconds=0).precision == 1.0


def test_a_sequence_is_given_to_one_record_and_a_record_to_one_sequence():
    rows = [[1, 2, 3, 4], [1, 2, 9, 9]]
    assert paired(rows, [(1, 2, 3)]) == 3 / 8
    assert paired(rows, [(1, 2, 3), (1, 2, 3)]) == 5 / 8, "the second one names two positions of the other record"
    assert paired(rows, [(5,), (6,), (1, 2, 3, 4)]) == 0.0, "claims beyond the number of records are noise"
    assert paired(rows, []) == 0.0


def test_cells_are_told_apart_and_survive_the_file():
    assert len(set(CELLS)) == len(CELLS)
    rows = as_rows([(cell, [Score(1.0, 1.0, 0.5, 0.2, 3, 3, 0.1)]) for cell in CELLS])
    assert [Cell(**row["cell"]) for row in json.loads(json.dumps(rows))] == list(CELLS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model; tokens of a record are distinct in private text, so that a rank is enough for them."""
    sizes = {
        "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.3, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    directory = tmp_path_factory.mktemp("span") / "model"
    write_model(model, CutPlan(front=2, back=1), directory)
    order = torch.stack([torch.randperm(119, generator=torch.Generator().manual_seed(i))[:64] + 1 for i in range(12)])
    public = torch.randint(1, 120, (96, 64), generator=torch.Generator().manual_seed(1))
    return World(directory, public, order, lambda _: None, cut=(2, 1))


def test_cells_run(world):
    plain = measure(world, Cell("textbook", "span", 24, 8, how="gradient"), 0)
    assert (plain.recall, plain.precision, plain.positions) == (7 / 8, 1.0, 7 / 8), "all but the last token"
    noised = measure(world, Cell("noise", "span", 24, 8, how="clipped", sigma=3.3), 1)
    assert noised.recall == 0
    together = measure(world, Cell("later", "update-bag", 4, 12, clients=2, number=1, joint=True), 0)
    assert 0 < together.claimed <= 119


def test_the_page_holds_every_table_that_was_measured():
    scores = [Score(0.5, 0.25, 0.1, 0.4, 8, 4, 2.0), Score(1.0, 0.75, 0.3, 0.6, 8, 4, 4.0)]
    text = page([(cell, scores) for cell in CELLS], WORDS, made_on())
    assert (
        text.count("| span | 64 | 1 x 1 x 32 | 1 step of AdamW, weights 1 | **0.75** | 0.50 | 0.20 | 0.50 | 3 |") == 2
    )
    assert "gradients, clipped, sigma = 3.3 C" in text
    assert "6 steps of AdamW" in text
    nothing = page([(CELLS[0], [Score(0.0, 1.0, 0.1, 0.0, 0, 4, 2.0)])], WORDS, made_on())
    assert "nothing claimed" in nothing
    assert nothing.count("\n|---") == 1


def test_a_folder_without_text_is_one_error(tmp_path):
    command = [sys.executable, SCRIPT, "--data", tmp_path, "--model", tmp_path / "none", "--out", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error[SS-14" in done.stderr
    assert not (tmp_path / "out.json").exists()
