"""Predictions through the split are the unsplit model's own greedy answers to prompts that fit."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import securesplit.client.generate as generating
import securesplit.client.predict as module
from securesplit.client.predict import Asking, Site, require_comparable, split_predictor
from securesplit.client.selection import Plan, select
from securesplit.data.tasks.item import Item, Parts
from securesplit.data.tasks.registry import task_named
from securesplit.data.tasks.score import read_predictions, score
from securesplit.data.tasks.templates import prompt_of, template_named
from securesplit.errors import BudgetExhausted, ConnectionFailed, InputError
from securesplit.protocol.messages import Forward
from tests.e2e.house import FROZEN, batches_of, build_model, build_tokenizer, policy_of


def test_answers_are_the_unsplit_model_s(house, monkeypatch):
    policy = policy_of()  # Buckets up to 16.
    client, _, _ = house.joined(house.job(blind=False), policy)
    opened: list[tuple[Path, bytes]] = []

    @contextmanager
    def open_client(*_, adapters, passphrase, **__):
        opened.append((adapters, passphrase()))
        yield client

    monkeypatch.setattr(module, "open_client", open_client)
    task = task_named("pairs")
    prompts = ["w4 w5 w6", " ".join(f"w{i}" for i in range(10, 40))]
    items = [Item(str(i), str(i), Parts(text=text), ("w3",)) for i, text in enumerate(prompts)]
    predict = split_predictor(
        Site(policy, house.keys, "wss://x:1", passphrase=lambda: b"secret"),
        task,
        template_named("plain", task),
        Asking(4),
    )
    found = list(predict(Path("run/checkpoint-1"), items))

    model, tokenizer = build_model(), build_tokenizer()
    for prediction, prompt in zip(found, (prompts[0], " ".join(f"w{i}" for i in range(10, 26))), strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert prediction.prediction == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert [p.id for p in found] == ["0", "1"]
    assert opened == [(Path("run/checkpoint-1"), b"secret")], "one connection for a checkpoint"


def test_likelihoods_of_gold_answers_are_the_unsplit_model_s(house, monkeypatch):
    policy = policy_of()
    client, _, _ = house.joined(house.job(blind=False), policy)

    @contextmanager
    def open_client(*_, **__):
        yield client

    monkeypatch.setattr(module, "open_client", open_client)
    task = task_named("pairs")
    asked = [("w4 w5 w6", "w7 w8"), ("w9", "w10 w11 w12"), ("w13 w14 w15 w16", "w17")]
    items = [Item(str(i), str(i), Parts(text=text), (gold,)) for i, (text, gold) in enumerate(asked)]
    asking = Asking(3, stop=("w4",), perplexity=True, batch=2)
    predict = split_predictor(Site(policy, house.keys, "wss://x:1"), task, template_named("plain", task), asking)
    found = list(predict(Path("run"), items))
    template = template_named("plain", task)
    model, tokenizer = build_model(), build_tokenizer()
    for prediction, item, (_, gold) in zip(found, items, asked, strict=True):
        front = tokenizer.encode(prompt_of(template, item.parts))
        rest = [*tokenizer.encode(template.lead + gold), tokenizer.eos_token_id]
        with torch.no_grad():
            said = torch.log_softmax(model(torch.tensor([front + rest])).logits[0].double(), -1)
        nats = -sum(float(said[len(front) + i - 1, token]) for i, token in enumerate(rest))
        assert prediction.nats == pytest.approx(nats, rel=1e-5)
        assert prediction.tokens == len(rest)
        assert "w4" not in str(prediction.prediction)
    scored = score(task, items, found)
    whole = sum(p.nats for p in found) / sum(p.tokens for p in found)
    assert {m.name: m.estimate.value for m in scored.measures}["perplexity"] == pytest.approx(math.exp(whole))


def test_texts_alone_are_asked_nothing_and_their_likelihood_is_the_unsplit_model_s(house, monkeypatch):
    policy = policy_of()
    client, spy, _ = house.joined(house.job(blind=False), policy)

    @contextmanager
    def open_client(*_, **__):
        yield client

    monkeypatch.setattr(module, "open_client", open_client)
    task, texts = task_named("text"), ("w4 w5 w6", "w9 w10 w11 w12", "w13")
    items = [Item(str(i), str(i), Parts(), (text,)) for i, text in enumerate(texts)]
    predict = split_predictor(Site(policy, house.keys, "wss://x:1"), task, template_named("plain", task), Asking(3))
    found = list(predict(Path("run"), items))
    assert [(p.id, p.prediction) for p in found] == [("0", None), ("1", None), ("2", None)]
    assert len(spy.messages(Forward)) == len(texts), "one release each, and nothing is generated"
    model, tokenizer = build_model(), build_tokenizer()
    for prediction, text in zip(found, texts, strict=True):
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        with torch.no_grad():
            said = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        assert prediction.nats == pytest.approx(-sum(float(said[i, ids[i + 1]]) for i in range(len(ids) - 1)), rel=1e-5)
        assert prediction.tokens == len(ids) - 1
    assert [m.name for m in score(task, items, found).measures] == ["perplexity"]


def test_a_batch_that_the_budget_cannot_pay_is_asked_one_by_one(house, open_ledger):
    client, _, _ = house.joined(house.job(), policy_of(FROZEN), ledger=open_ledger())
    answers = module._answers(client, ["w4 w5", "w6 w7", "w8"], Asking(4))
    assert [next(answers)[1].finish for _ in range(2)]
    with pytest.raises(BudgetExhausted):
        next(answers)
    spent = {e.channel: e.releases for e in client.ledger.summary()}
    assert spent == {"cut": 2, "decode": 6}, "two of the three could be paid"
    assert Asking(4).settings == "4"
    assert Asking(4, ("x",)).settings != Asking(4, ("x",), perplexity=True).settings


@pytest.mark.parametrize("lost", [False, True], ids=["the budget ends", "the connection is lost"])
def test_what_is_answered_is_written_and_paid_once_though_a_later_chunk_fails(
    house, open_ledger, monkeypatch, tmp_path, lost
):
    """Two prompts cross together, and those of the second chunk cannot: a start with more budget asks for these alone."""
    poor = policy_of(FROZEN, max_sequences=2)
    more = FROZEN.replace("epsilon = 8.0", "epsilon = 16.0").replace("releases = 1\n", "releases = 2\n")
    more = policy_of(more, max_sequences=2)
    job = house.job()
    job = job.model_copy(update={"schedule": job.schedule.model_copy(update={"batch": 2})})
    clients = iter(house.joined(job, policy, ledger=open_ledger())[0] for policy in (poor, more))
    opened = []

    @contextmanager
    def open_client(*_, **__):
        opened.append(next(clients))
        if len(opened) == 1 and not lost:  # This prompt has left before, as a record that was trained on has.
            opened[0].loss(batches_of(opened[0], ["w4 w5 w6 w7 w8"])[0])
        yield opened[-1]

    monkeypatch.setattr(module, "open_client", open_client)
    task = task_named("pairs")
    prompts = (
        "w4 w5 w6 w7 w8",
        "w9",
        "w10 w11",
        "w12 w13 w14 w15 w16",
    )  # By length, so the first of them is in the second chunk.
    items = tuple(Item(str(i), str(i), Parts(text=text), ("w3",)) for i, text in enumerate(prompts))
    template = template_named("plain", task)
    plan = Plan(task, items, template, "greedy", None)
    (tmp_path / "run").mkdir()

    def again(policy):
        predict = split_predictor(Site(policy, house.keys, "wss://x:1"), task, template, Asking(3))
        return select(plan, [tmp_path / "run"], predict, tmp_path / "out", lambda *_: None)

    if lost:
        whole = generating.decoded

        def breaks(client, asks, *rest):
            if len(asks[0].ids) == 8:
                raise ConnectionFailed("SS-4001", "gone", hint="Wait.")
            return whole(client, asks, *rest)

        monkeypatch.setattr(generating, "decoded", breaks)
    with pytest.raises(ConnectionFailed if lost else BudgetExhausted):
        again(poor)
    monkeypatch.undo()
    monkeypatch.setattr(module, "open_client", open_client)
    done = [p.id for p in read_predictions(tmp_path / "out" / "0.jsonl", items)]
    assert done == ["1", "2"]
    ledger = opened[0].ledger

    def spent():
        return {e.channel: e.releases for e in ledger.summary()}

    assert spent() == {"cut": 2 + (not lost), "decode": 2 * 2}
    assert again(more).scores.answered == 4
    assert spent() == {"cut": 4 + (not lost), "decode": 4 * 2}, "as a run that nothing interrupted"
    assert sorted(p.id for p in read_predictions(tmp_path / "out" / "0.jsonl", items)) == ["0", "1", "2", "3"]


def test_checkpoints_whose_server_part_differs_are_not_compared():
    two = [Path("a"), Path("b")]
    require_comparable(policy_of(FROZEN), two)
    require_comparable(policy_of(), two[:1])
    with pytest.raises(InputError, match="SS-1248"):
        require_comparable(policy_of(), two)
