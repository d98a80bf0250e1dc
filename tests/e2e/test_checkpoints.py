"""Several checkpoints of runs in which B learns, each evaluated with its own B by a server that was started again.

The oracle is the unsplit model with PEFT's own adapters: A and C from a client's folder, and B as it was copied out of the server
by the hook that keeps records of sums, which knows nothing of former states.
"""

from __future__ import annotations

import json
import threading
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from securesplit.client.checkpoints import middle_of
from securesplit.client.predict import Asking, Site, require_comparable, split_predictor
from securesplit.client.run import Run, open_client, run_training
from securesplit.client.selection import Plan, matching, select
from securesplit.data.tasks.item import Item, Parts
from securesplit.data.tasks.registry import task_named
from securesplit.data.tasks.templates import prompt_of, template_named
from securesplit.errors import InputError, RemoteProtocolError
from securesplit.kept.folder import Kept
from securesplit.learning import table_of
from securesplit.model.export import collect_adapters, export_adapter, read_part_adapters, save_part_adapters
from securesplit.protocol.job import Job
from securesplit.server.serve import state_facts
from tests.client.test_regimes import STEP, with_releases
from tests.e2e.house import (
    CLIENTS,
    LAB,
    ROUND,
    Loopback,
    Program,
    batches_of,
    build_model,
    build_tokenizer,
    job_text,
    policy_of,
    policy_text,
    start_server,
    train_argv,
)

COUNTS = {"alice": 6, "bob": 7, "carol": 10}
POLICY = policy_of(LAB)
ITEMS = tuple(
    Item(str(i), str(i), Parts(text=text), (gold,))
    for i, (text, gold) in enumerate(
        [("w4 w5 w6", "w7 w8"), ("w9 w12 w40", "w10 w11"), ("w33", "w17"), ("w8 w8", "w20")]
    )
)
TASK = task_named("pairs")
TEMPLATE = template_named("plain", TASK)


def job_of(house, training=None, **schedule) -> Job:
    raw = house.job(rounds=3, epochs=1, blind=False).model_dump(mode="json", exclude_none=True)
    raw["schedule"] |= {"checkpoints": 2, "keep_best": True, **schedule}
    raw["optimiser"] |= {"client_lr": 5e-2, "server_lr": 5e-2}
    return Job.model_validate(raw | ({"training": training} if training else {}))


def kept_at(house, job, policy=POLICY) -> Kept:
    return Kept.open(house.root / "state", state_facts(job, policy, house.digest))


def trained(house, job, policy=POLICY) -> dict[int, object]:
    """All clients' runs to their end, and B's adapters at the end of each sum."""
    middles, errors = {}, []
    with closing(kept_at(house, job, policy)) as state:

        def seen(ended) -> None:
            if ended.result is not None:
                middle = core._engine.middle
                middles[ended.config.round] = collect_adapters(middle, model=house.digest, table=table_of(job))

        core = house.core(job, policy, state=state, records=seen)
        with Loopback(core, house.keys) as loop:

            def one(name: str, seed: int) -> None:
                run = Run(
                    policy=policy, keys=house.keys / name, server=loop.url, out=house.root / name, held_out=2, limit=None,
                    data=house.data(f"{name}.jsonl", COUNTS[name], seed=seed), max_tokens=16, truth=None, alone=False,
                    model=str(house.model), cache=house.root / "cache",
                )  # fmt: skip
                try:
                    run_training(run, lambda *_: None)
                except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
                    errors.append(error)

            threads = [threading.Thread(target=one, args=(n, 50 + i), daemon=True) for i, n in enumerate(CLIENTS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        core.steps.commit()
    assert errors == []
    return middles


def unsplit(house, folder, middle):
    """The whole model by PEFT, of A's and C's files and B's adapters."""
    parts = [read_part_adapters(folder / f"adapter-{role}.safetensors") for role in ("front", "back")]
    export_adapter([parts[0], middle, parts[1]], folder / "whole", "tiny")
    return PeftModel.from_pretrained(build_model(), str(folder / "whole")).eval()


def told(model) -> list[tuple[str, float]]:
    """Greedy answers, and the nats of the gold ones."""
    tokenizer, out = build_tokenizer(), []
    for item in ITEMS:
        front = tokenizer.encode(prompt_of(TEMPLATE, item.parts))
        rest = [*tokenizer.encode(TEMPLATE.lead + item.answers[0]), tokenizer.eos_token_id]
        ids = torch.tensor([front])
        with torch.no_grad():
            whole = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
            )
            said = torch.log_softmax(model(torch.tensor([front + rest])).logits[0].double(), -1)
        nats = -sum(float(said[len(front) + i - 1, token]) for i, token in enumerate(rest))
        out.append((tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).strip(), nats))
    return out


@pytest.mark.parametrize(
    "training",
    [
        None,
        {"mode": "splitfed-v1"},
        pytest.param({"mode": "hierarchical", "every": 1, "groups": [["alice", "bob"]]}, marks=pytest.mark.slow),
        pytest.param({"mode": "sequential"}, marks=pytest.mark.slow),
        pytest.param({"mode": "client-batch"}, marks=pytest.mark.slow),
    ],
    ids=lambda t: "splitfed-v2" if t is None else t["mode"],
)
def test_each_checkpoint_is_the_unsplit_model_of_its_round(house, training, tmp_path):
    job = job_of(house, training)
    middles = trained(house, job)
    folders = matching(str(house.root / "alice" / "*"))
    assert [path.name for path in folders] == ["best", "round-1", "round-2"], "the last two, and no folder of the state"
    require_comparable(POLICY, folders)
    assert middle_of(house.root / "alice") == middle_of(folders[2]) != middle_of(folders[1])
    site = Site(POLICY, house.keys / "alice", "", str(house.model), house.root / "cache")
    with closing(kept_at(house, job)) as state, Loopback(house.core(job, POLICY, state=state), house.keys) as loop:
        predict = split_predictor(
            Site(POLICY, site.keys, loop.url, site.model, site.cache),
            TASK,
            TEMPLATE,
            Asking(4, perplexity=True, batch=3),
        )
        found = {}
        for number, folder in ((1, folders[1]), (2, folders[2]), (2, house.root / "alice")):
            made = list(predict(folder, ITEMS))
            wanted = told(unsplit(house, folder, middles[number]))
            assert [p.prediction for p in made] == [text for text, _ in wanted]
            assert [p.nats for p in made] == pytest.approx([nats for _, nats in wanted], rel=1e-5)
            found[folder.name] = sum(p.nats for p in made)
        assert found["round-1"] != pytest.approx(found["round-2"], rel=1e-4), "the rounds differ, and so do their B's"
        with open_client(
            POLICY, site.keys, loop.url, model=site.model, cache=site.cache, adapters=folders[1]
        ) as client:
            crossed = sum(nats for _, nats in told(unsplit(house, folders[1], middles[2])))
            assert crossed != pytest.approx(found["round-1"], rel=1e-4), "another B would have shown"
            client.remote.learn = True
            with pytest.raises(RemoteProtocolError, match="SS-4096"):
                client.middle(client.gate.release(torch.ones(1, 4, 32), at="cut"))
        settings = Plan(TASK, ITEMS, TEMPLATE, "4", 2)
        best = select(settings, folders, predict, tmp_path / "scores", lambda *_: None)
        assert best.best in folders
    again = select(settings, folders, _never, tmp_path / "scores", lambda *_: None)
    assert again.best == best.best, "what is on disk is not asked for twice"


def _never(_path, _items):
    raise AssertionError


def test_a_state_that_is_kept_no_more_is_refused_and_checkpoints_without_one_are_not_compared(house):
    job = job_of(house, checkpoints=1, keep_best=False)
    trained(house, job)
    run = house.root / "alice"
    (folder,) = matching(str(run / "round-*"))
    assert folder.name == "round-2"
    for file in (house.root / "state" / "former").glob("*.safetensors"):
        file.write_bytes(b"damaged")
    site = {"model": str(house.model), "cache": house.root / "cache"}
    with (
        closing(kept_at(house, job)) as state,
        Loopback(house.core(job, POLICY, state=state), house.keys) as loop,
        pytest.raises(RemoteProtocolError, match="SS-4095") as caught,
        open_client(POLICY, house.keys / "alice", loop.url, adapters=folder, **site),
    ):
        pass
    assert caught.value.hint
    file = run / "adapter-back.safetensors"
    file.write_bytes((house.root / "bob" / "round-2" / "adapter-back.safetensors").read_bytes())
    require_comparable(POLICY, [run, folder])  # The same sum's.
    plain = read_part_adapters(file)
    save_part_adapters(replace(plain, facts=plain.facts.model_copy(update={"middle": ""})), file)
    with pytest.raises(InputError, match="SS-1305"):
        require_comparable(POLICY, [run, folder])
    front = run / "adapter-front.safetensors"
    kept = read_part_adapters(front)
    save_part_adapters(replace(kept, facts=kept.facts.model_copy(update={"middle": ""})), front)
    with pytest.raises(InputError, match="SS-1248") as refused:
        require_comparable(POLICY, [run, folder])
    assert "1 of 2" in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["round", "step"])
def test_under_noise_too_each_checkpoint_names_its_own_b(house, regime):
    """B learns from noised gradients; what of it is kept is past the noise."""
    policy = policy_of(with_releases({"round": ROUND, "step": STEP}[regime], 20, 20, 20))
    raw = job_of(house).model_dump(mode="json", exclude_none=True)
    raw["schedule"].pop("keep_best", None)
    job = Job.model_validate(raw | {"sums": raw["sums"] | {"blind": True}})
    trained(house, job, policy)
    folders = matching(str(house.root / "bob" / "*"))
    require_comparable(policy, folders)
    assert [path.name for path in folders] == ["round-1", "round-2"]
    assert len({middle_of(folder) for folder in folders}) == 2
    site = {"model": str(house.model), "cache": house.root / "cache"}
    with (
        closing(kept_at(house, job, policy)) as state,
        Loopback(house.core(job, policy, state=state), house.keys) as loop,
    ):
        for folder in folders:
            with open_client(policy, house.keys / "bob", loop.url, adapters=folder, **site) as client:
                assert client.loss(batches_of(client, ["w4 w5 w6 w7"])[0]) > 0


@pytest.mark.slow
def test_by_command_with_a_server_that_was_started_again(house, request):
    """serve, train, the end of all; serve again, eval of everything that alice's run left, and eval again for nothing."""
    options = ("--model", house.model, "--cache", house.root / "cache")
    job = job_text(house.model, rounds=2, epochs=1, blind=False).replace(
        "batch = 4", "batch = 4\ncheckpoints = 2\nkeep_best = true"
    )
    policy = house.root / "p.toml"
    policy.write_text(policy_text(LAB))
    server, url = start_server(house, job, policy_text(LAB), "--state", house.root / "gpu-state", *options)
    request.addfinalizer(server.kill)
    clients = []
    for i, name in enumerate(CLIENTS):
        house.data(f"{name}.jsonl", COUNTS[name], seed=50 + i)
        clients.append(Program(house.root, name, *train_argv(house, name, url, policy, *options)))
    assert [client.wait() for client in clients] == [0, 0, 0], clients[0].complaint
    assert server.stop() == 0
    again, url = start_server(
        house, job, policy_text(LAB), "--state", house.root / "gpu-state", *options, label="again"
    )
    request.addfinalizer(again.kill)
    rows = [{"prompt": item.parts.text, "answer": item.answers[0]} for item in ITEMS]
    (house.root / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = (
        "eval", "--task", "pairs", "--data", "gold.jsonl", "--checkpoints", "alice/*", "--subset", 2, "--out", "scores",
        "--policy", policy, "--keys", house.keys / "alice", "--server", url, "--max-new-tokens", 3, "--perplexity",
        "--output", "json", *options,
    )  # fmt: skip
    evaluated = Program(house.root, "eval", *argv)
    assert evaluated.wait() == 0, evaluated.complaint
    assert [row["checkpoint"] for row in evaluated.said["tried"]] == ["alice/best", "alice/round-0", "alice/round-1"]
    assert len({row["metrics"]["perplexity"] for row in evaluated.said["tried"]}) > 1
    assert again.stop() == 0
    repeated = Program(house.root, "eval-again", *argv)
    assert repeated.wait() == 0, repeated.complaint
    assert repeated.said == evaluated.said
