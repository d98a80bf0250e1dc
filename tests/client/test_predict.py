"""Predictions through the split are the unsplit model's own greedy answers to prompts that fit."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import securesplit.client.predict as module
from securesplit.client.predict import Site, require_comparable, split_predictor
from securesplit.data.tasks.item import Item, Parts
from securesplit.data.tasks.registry import task_named
from securesplit.data.tasks.templates import template_named
from securesplit.errors import InputError
from tests.e2e.house import FROZEN, build_model, build_tokenizer, policy_of


def test_answers_are_the_unsplit_model_s(house, monkeypatch):
    policy = policy_of()  # Buckets up to 16.
    client, _, _ = house.joined(house.job(blind=False), policy)
    opened: list[Path] = []

    @contextmanager
    def open_client(*_, adapters, **__):
        opened.append(adapters)
        yield client

    monkeypatch.setattr(module, "open_client", open_client)
    task = task_named("pairs")
    prompts = ["w4 w5 w6", " ".join(f"w{i}" for i in range(10, 40))]
    items = [Item(str(i), str(i), Parts(text=text), ("w3",)) for i, text in enumerate(prompts)]
    predict = split_predictor(
        Site(policy, house.keys, "wss://x:1"), task, template_named("plain", task), max_new_tokens=4
    )
    found = list(predict(Path("run/checkpoint-1"), items))

    model, tokenizer = build_model(), build_tokenizer()
    for prediction, prompt in zip(found, (prompts[0], " ".join(f"w{i}" for i in range(10, 26))), strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert prediction.prediction == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert [p.id for p in found] == ["0", "1"]
    assert opened == [Path("run/checkpoint-1")], "one connection for a checkpoint"


def test_checkpoints_whose_server_part_differs_are_not_compared():
    two = [Path("a"), Path("b")]
    require_comparable(policy_of(FROZEN), two)
    require_comparable(policy_of(), two[:1])
    with pytest.raises(InputError, match="SS-1248"):
        require_comparable(policy_of(), two)
