"""Baselines against oracles that share no code with them: transformers' own model with torch's own optimiser, the split's own
training over the wire, and plain means of plain training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from securesplit.client import federated as federated_module
from securesplit.client import train as train_module
from securesplit.client.alone import train_alone
from securesplit.client.baseline import Wanted, compare_baselines
from securesplit.client.comparison import Row, compare_rows, require_same_records
from securesplit.client.federated import train_federated
from securesplit.client.joined import Joined
from securesplit.client.noted import held_out_losses
from securesplit.client.pooled import Texts, pooled, train_pooled
from securesplit.client.splitrun import parse_run, split_row
from securesplit.client.train import Trainer
from securesplit.data.tasks.chosen import Chosen, read_tasked
from securesplit.errors import InputError
from securesplit.model.lora import adapter_layout, add_adapters, read_adapters, write_adapters
from securesplit.protocol.training import Training
from securesplit.runs.folder import RUN
from securesplit.runs.losses import RecordLoss, write_losses
from securesplit.runs.spent import NO_BOUND, UNKNOWN
from tests.e2e.house import batches_of, build_house, build_model, build_tokenizer, policy_of, sentences
from tests.e2e.ward import NAMES, with_task
from tests.runs.test_folder import begun, record


def quiet(*_: object) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """One for all tests here: none of them changes its keys or its model."""
    return build_house(tmp_path_factory.mktemp("baseline") / "house")


@dataclass
class _Tokens:
    """Enough of a client for ``batches_of``."""

    policy: object
    tokenizer: object
    ledger: object = None


def texts_of(count: int, seed: int, *, held_out: int = 3) -> Texts:
    stand_in = _Tokens(policy_of(), build_tokenizer())
    found = sentences(count + held_out, seed=seed)
    return Texts(batches_of(stand_in, found[:count]), batches_of(stand_in, found[count:]))


def job_with(house, sharing: str = "alternating", **options):
    job = house.job(blind=False, **options)
    adapters = job.adapters.model_copy(update={"sharing": sharing, "inexact": sharing == "naive"})
    return job.model_copy(update={"adapters": adapters})


def whole_of(job):
    model = build_model()
    add_adapters(model, job.adapters.rank, job.adapters.alpha, job.adapters.targets, seed=job.adapters.seed)
    return model


def oracle_steps(model, job, batches, learns, *, fresh: bool):
    """Losses of transformers' model under torch's AdamW: ends at one rate, layers 1 and 2 at the other.

    ``learns`` says for a round which of A and B learn in the ends; the middle's both always learn.
    """
    named = [(n, p) for n, p in model.named_parameters() if ".lora_" in n]
    middle = [p for n, p in named if ".layers.1." in n or ".layers.2." in n]
    served = torch.optim.AdamW(middle, lr=job.optimiser.server_lr, weight_decay=0.0)
    ends = [(n, p) for n, p in named if ".layers.1." not in n and ".layers.2." not in n]
    mine = torch.optim.AdamW([p for _, p in ends], lr=job.optimiser.client_lr, weight_decay=0.0)
    losses = []
    for number in range(job.schedule.rounds):
        if fresh:
            moving = [p for n, p in ends if any(f".lora_{factor}." in n for factor in learns(number))]
            mine = torch.optim.AdamW(moving, lr=job.optimiser.client_lr, weight_decay=0.0)
        for batch in chain.from_iterable([batches] * job.schedule.epochs):
            model.zero_grad(set_to_none=True)
            loss = model(batch.tokens, labels=batch.labels).loss
            loss.backward()
            served.step()
            mine.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("plain", "learns"), [(False, lambda number: "BA"[number % 2]), (True, lambda number: "AB")], ids=["turns", "plain"]
)
def test_the_unsplit_baseline_is_transformers_own_model_under_adamw(house, plain, learns):
    job, texts = job_with(house, rounds=3), texts_of(7, 1)
    found = train_pooled(Joined.load(house.model, job), job, [texts], quiet, plain=plain)
    expected = oracle_steps(whole_of(job), job, texts.batches, learns, fresh=not plain)
    assert len(found.losses) == len(expected) == 3 * 2 * len(texts.batches)
    assert np.abs(np.array(found.losses) - expected).max() < 1e-5
    assert found.samples == 3 * 2 * 7
    assert found.curve[-1] < found.curve[0] - 0.02 or found.losses[-1] < found.losses[0]


@pytest.fixture
def lonely_sum(monkeypatch):
    """What a secure sum over this client alone would open: its own update, on the grid that sums of three clients have."""

    def alone(link, folder, policy, update, **_):
        mean = np.rint(update.vector * 2.0**21) / 2.0**21
        words = np.zeros(len(mean), dtype=np.uint32)
        opened = SimpleNamespace(mean=mean, survivors=(link.name,), total_weight=1, ring_sum=words)
        return SimpleNamespace(aggregate=opened, heard=b"", contribution=words)

    monkeypatch.setattr(train_module, "secure_sum", alone)
    monkeypatch.setattr(train_module, "require_plausible", lambda *_, **__: None)


@pytest.mark.parametrize("sharing", ["alternating", "frozen-a", "share-a", "core"])
def test_without_noise_the_splits_training_and_the_unsplit_baseline_lose_the_same_at_every_step(
    house, lonely_sum, sharing
):
    job, texts = job_with(house, sharing, rounds=3), texts_of(7, 1)
    client, _, _ = house.joined(job, policy_of())
    client.link.folder = house.folder("alice")
    seen: list[float] = []
    trainer = Trainer(
        client,
        texts.batches,
        texts.held_out,
        answers=None,
        progress=lambda *told: seen.append(told[3]) if told[3] else None,
    )
    split = trainer.run()
    unsplit = train_pooled(Joined.load(house.model, job), job, [texts], quiet)
    assert split.steps == len(unsplit.losses) == len(seen) == 3 * 2 * len(texts.batches)
    assert np.abs(np.array(seen) - unsplit.losses).max() <= 1e-5
    assert np.abs(np.array(split.curve) - unsplit.curve).max() <= 1e-5
    assert abs(seen[0] - seen[-1]) > 0.01, "something was learnt"


def test_held_out_losses_of_the_split_are_those_of_the_unsplit_model_record_by_record(house):
    job, texts = job_with(house), texts_of(5, 2, held_out=5)
    client, _, _ = house.joined(job, policy_of())
    model, found = whole_of(job), held_out_losses(client, texts.held_out)
    assert [loss.source for loss in found] == [0, 1, 2, 3, 4]
    for batch in texts.held_out:
        for row, source in enumerate(batch.sources):
            length = batch.lengths[row]
            with torch.no_grad():
                loss = model(batch.tokens[row : row + 1, :length], labels=batch.tokens[row : row + 1, :length]).loss
            assert found[source].tokens == length - 1
            assert found[source].nats / found[source].tokens == pytest.approx(loss.item(), abs=1e-5)
    total = sum(loss.nats for loss in found) / sum(loss.tokens for loss in found)
    assert total == pytest.approx(client.evaluate(texts.held_out), abs=1e-5)


def local_update(house, job, texts, start, number):
    """One client's round by transformers' model and torch alone."""
    model = whole_of(job)
    layout = adapter_layout(model)
    write_adapters(model, layout, start)
    moving = "BA"[number % 2]
    groups = {"ends": [], "middle": []}
    for name, parameter in model.named_parameters():
        if f".lora_{moving}." in name:
            groups["middle" if ".layers.1." in name or ".layers.2." in name else "ends"].append(parameter)
    optimiser = torch.optim.AdamW(
        [
            {"params": groups["ends"], "lr": job.optimiser.client_lr},
            {"params": groups["middle"], "lr": job.optimiser.server_lr},
        ],
        weight_decay=0.0,
    )
    for batch in chain.from_iterable([texts.batches] * job.schedule.epochs):
        model.zero_grad(set_to_none=True)
        model(batch.tokens, labels=batch.labels).loss.backward()
        optimiser.step()
    return read_adapters(model, layout)


def test_fedavg_is_the_weighted_mean_of_plain_local_training(house):
    job, data = job_with(house, rounds=2), [texts_of(7, 1), texts_of(3, 2), texts_of(4, 3)]
    model, last = Joined.load(house.model, job, alike=True), {}
    found = train_federated(model, job, data, quiet, lambda i: last.update({i: model.read()}))
    start = read_adapters(whole := whole_of(job), adapter_layout(whole)).astype(np.float64)
    for number in range(2):
        moved = [local_update(house, job, texts, start.astype(np.float32), number) - start for texts in data]
        start = start + sum(share * update for share, update in zip((7 / 14, 3 / 14, 4 / 14), moved, strict=True))
    assert last.keys() == {0, 1, 2}
    for state in last.values():
        assert np.abs(state - start).max() < 1e-5
    assert np.count_nonzero(last[0]) > 0.5 * len(last[0])
    size = adapter_layout(whole, "B").size + adapter_layout(whole, "A").size
    assert found.bytes_up == found.bytes_down == 3 * 4 * size
    assert (found.samples, len(found.losses)) == (2 * 2 * 14, 2 * 2 * sum(len(t.batches) for t in data))


def test_fedavg_goes_on_where_its_schedule_stands_also_after_a_move_of_fewer_gradients(house, monkeypatch):
    job = job_with(house, rounds=3, epochs=1)
    job = job.model_copy(update={"optimiser": job.optimiser.model_copy(update={"accumulate": 2})})
    data = [texts_of(10, 1), texts_of(1, 2)]
    made, plain = [], federated_module.descent_of

    def watched(*args, **options):
        made.append((options["moves"], plain(*args, **options)))
        return made[-1][1]

    monkeypatch.setattr(federated_module, "descent_of", watched)
    train_federated(Joined.load(house.model, job, alike=True), job, data, quiet, lambda _: None)
    assert [len(texts.batches) for texts in data] == [3, 1]
    # Of three gradients two make a move, and the third one makes another at the round's end; so does a single one.
    assert [begun for begun, _ in made] == [0, 0, 0, 0, 2, 2, 1, 1, 4, 4, 2, 2]
    assert [descent.moves for _, descent in made[-4:]] == [6, 6, 3, 3]


def test_fedavg_of_one_client_is_its_own_training(house):
    job, texts = job_with(house, rounds=2), texts_of(6, 4)
    found = train_federated(Joined.load(house.model, job, alike=True), job, [texts], quiet, lambda _: None)
    start = read_adapters(whole := whole_of(job), adapter_layout(whole))
    for number in range(2):
        start = local_update(house, job, texts, start, number)
    write_adapters(whole, adapter_layout(whole), start)
    counts = [batch.scored for batch in texts.held_out]
    with torch.no_grad():
        losses = [whole(b.tokens, labels=b.labels).loss.item() for b in texts.held_out]
    assert found.curve[-1] == pytest.approx(np.average(losses, weights=counts), abs=1e-5)


def test_under_share_a_each_client_keeps_a_b_of_its_own(house):
    job, data = job_with(house, "share-a", rounds=2), [texts_of(4, 1), texts_of(4, 2)]
    model, last = Joined.load(house.model, job, alike=True), {}

    def finished(i: int) -> None:
        last[i] = (model.read("A"), model.read("B"))

    train_federated(model, job, data, quiet, finished)
    assert np.array_equal(last[0][0], last[1][0])
    assert not np.array_equal(last[0][1], last[1][1])


def test_the_core_is_what_fedavg_moves_where_cores_are_shared(house):
    job, data = job_with(house, "core", rounds=1), [texts_of(4, 1), texts_of(4, 2)]
    model = Joined.load(house.model, job, alike=True)
    before, size = model.read("both"), len(model.read("core"))
    found = train_federated(model, job, data, quiet, lambda _: None)
    assert np.array_equal(model.read("both"), before)
    assert np.count_nonzero(model.read("core")) > 0
    assert found.bytes_up == 2 * 4 * size


def test_batches_come_in_turns_and_whoever_has_none_is_passed_over():
    data = [texts_of(9, 1), texts_of(2, 2)]
    turns = list(pooled(data, 2))
    assert len(data[0].batches) > len(data[1].batches)
    first = turns[: len(turns) // 2]
    assert first[0] is data[0].batches[0]
    assert first[1] is data[1].batches[0]
    for texts in data:
        assert [b for b in first if any(b is mine for mine in texts.batches)] == list(texts.batches)
    assert turns[len(turns) // 2 :] == first


def test_answers_of_the_joined_parts_are_the_library_s_greedy_ones(house):
    job = job_with(house)
    model, whole = Joined.load(house.model, job), build_model()
    for prompt in ([5, 9, 12], [40, 41], [7]):
        with torch.no_grad():
            expected = whole.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=6,
                do_sample=False, eos_token_id=1, pad_token_id=0,
            )[0, len(prompt) :].tolist()  # fmt: skip
        expected = expected[: expected.index(1)] if 1 in expected else expected
        assert model.answer(prompt, 6, stop=1) == expected
    assert model.answer([5], 0, stop=1) == []


def row_of(name: str, losses, **changes) -> Row:
    values = {
        "name": name, "samples": 4, "steps": 2, "spent": NO_BOUND, "note": "", "losses": tuple(losses),
        "curve": (3.0, 2.0), "measures": (), "seconds": 1.0,
    }  # fmt: skip
    return Row(**{**values, **changes})


def test_differences_are_paired_and_their_interval_is_that_of_pairs():
    chance = np.random.default_rng(3)
    tokens = chance.integers(5, 30, 40)
    hard = chance.gamma(4.0, 1.0, 40)  # Records differ much more than the two models do.
    one = [
        RecordLoss(source=i, nats=float(h * n), tokens=int(n))
        for i, (h, n) in enumerate(zip(hard, tokens, strict=True))
    ]
    gaps = 0.1 + 0.05 * chance.standard_normal(40)
    two = [
        RecordLoss(source=r.source, nats=r.nats + float(g) * r.tokens, tokens=r.tokens)
        for r, g in zip(one, gaps, strict=True)
    ]
    groups = [str(i) for i in range(40)]
    first, second = compare_rows([row_of("a", one), row_of("b", two)], groups, 0)
    assert first.difference is None
    assert first.loss.value == pytest.approx(np.average(hard, weights=tokens))
    assert second.difference.value == pytest.approx(np.average(gaps, weights=tokens))
    assert 0 < second.difference.low < second.difference.value < second.difference.high
    width = second.difference.high - second.difference.low
    assert width == pytest.approx(2 * 1.96 * 0.05 / 40**0.5, rel=0.5)
    assert second.loss.high - second.loss.low > 10 * width, "unpaired, nothing could be told"


def test_a_model_that_diverged_is_named_and_never_taken_for_a_good_one(house):
    job, texts = job_with(house), texts_of(4, 2)
    model = Joined.load(house.model, job)
    model.back.module.lm_head.weight.data.fill_(float("nan"))
    losses = model.record_losses(texts.held_out)
    assert [loss.nats for loss in losses] == [None] * 3
    good = [RecordLoss(source=i, nats=1.0, tokens=2) for i in range(3)]
    with pytest.raises(InputError, match="SS-1284") as caught:
        compare_rows([row_of("good", good), row_of("bad", losses)], ["a", "b", "c"], 0)
    assert caught.value.details == ("bad: 3 record(s)",)


def test_texts_alone_are_asked_nothing(house, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(8, seed=1)))
    found = compare_baselines(
        wanted(house, job_with(house, rounds=1), [path], tasked=Chosen("text"), kinds=("client-only",)), quiet
    )
    assert found.rows[0].row.measures == ()


def test_records_of_another_evaluation_are_refused_client_by_client():
    mine = [[RecordLoss(source=0, nats=0.0, tokens=3)], [RecordLoss(source=0, nats=0.0, tokens=4)]]
    require_same_records("r", [[RecordLoss(source=0, nats=9.0, tokens=3)], mine[1]], mine)
    with pytest.raises(InputError, match="SS-1285") as caught:
        require_same_records("r", [[RecordLoss(source=0, nats=9.0, tokens=5)], [*mine[1], *mine[1]]], mine)
    assert [d.split(":")[0] for d in caught.value.details] == ["client 1", "client 2"]


def wanted(house, job, data, **changes) -> Wanted:
    values = {
        "job": job, "policy": policy_of(), "data": tuple(data), "held_out": 2, "limit": None, "max_tokens": 16, "tasked": None,
        "runs": (), "predictions": (), "kinds": ("unsplit", "client-only", "fedavg"), "max_new_tokens": 4,
        "model": str(house.model), "cache": house.root / "cache",
    }  # fmt: skip
    return Wanted(**{**values, **changes})


def test_the_table_has_every_baseline_on_the_same_records(house):
    job = job_with(house, rounds=1)
    data = [house.data(f"{name}.jsonl", 6, seed=i) for i, name in enumerate(("a", "b"))]
    found = compare_baselines(wanted(house, job, data, kinds=("unsplit", "plain", "client-only", "fedavg")), quiet)
    assert [c.row.name for c in found.rows] == ["unsplit", "plain", "client-only", "fedavg"]
    assert (found.reference, found.records, found.held_out, found.groups) == ("unsplit", 8, 4, 4)
    places = {tuple((r.source, r.tokens) for r in c.row.losses) for c in found.rows}
    assert len(places) == 1
    assert {c.row.samples for c in found.rows} == {2 * 8}
    assert {c.row.steps for c in found.rows} == {len(found.losses[0])}
    for compared in found.rows:
        mean = sum(r.nats for r in compared.row.losses) / sum(r.tokens for r in compared.row.losses)
        assert compared.row.curve[-1] == pytest.approx(mean, abs=1e-5)
        assert compared.loss.low <= compared.loss.value <= compared.loss.high
    assert found.rows[3].row.bytes_up > 0
    assert found.rows[0].row.bytes_up == 0


def test_client_only_is_what_a_client_trains_alone(house):
    job, texts = job_with(house), texts_of(6, 1)
    client, _, _ = house.joined(job, policy_of())
    expected = train_alone(client, texts.batches, texts.held_out, quiet)
    path = house.root / "one.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(9, seed=1)))
    found = compare_baselines(wanted(house, job, [path], held_out=3, kinds=("client-only",)), quiet)
    assert len(found.rows[0].row.curve) == len(expected)
    assert found.rows[0].row.curve[0] == pytest.approx(expected[0], abs=1e-5)


def test_a_task_is_measured_by_its_own_measures_and_a_run_by_its_own_answers(house, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"w{3 + i} w{4 + i}", "answer": f"w{20 + i % 2}"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = job_with(house, rounds=1)
    found = compare_baselines(wanted(house, job, [path, path], tasked=Chosen("pairs"), kinds=("unsplit",)), quiet)
    measures = {m.name: m.estimate for m in found.rows[0].row.measures}
    assert {"em", "f1"} <= measures.keys()
    assert measures["em"].groups == 4, "two files with the same ids are two clients"
    assert (
        compare_baselines(
            wanted(house, job, [path], tasked=Chosen("pairs"), kinds=("unsplit",), max_new_tokens=0), quiet
        )
        .rows[0]
        .row.measures
        == ()
    )


def test_a_runs_own_answers_are_scored_on_the_held_out_examples_alone(house, tmp_path):
    path, run, answers = tmp_path / "pairs.jsonl", tmp_path / "run", tmp_path / "0.jsonl"
    rows = [{"prompt": f"w{3 + i} w{4 + i}", "answer": f"w{20 + i}"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job, chosen = job_with(house, rounds=1), Chosen("pairs")
    first = compare_baselines(wanted(house, job, [path], tasked=chosen, kinds=("unsplit",)), quiet).rows[0].row
    begun(run, job=job)
    write_losses(run, [RecordLoss(source=r.source, nats=r.nats + 1, tokens=r.tokens) for r in first.losses])
    (run / RUN).write_text(record(job=job.digest))
    names = [item.id for item in read_tasked(chosen, path, None).items]
    said = {6: "w26", 7: "w5"}  # Of the two held out one is right; all that were trained on are wrong.
    answers.write_text(
        "".join(json.dumps({"id": name, "prediction": said.get(i, "w4")}) + "\n" for i, name in enumerate(names))
    )
    found = compare_baselines(
        wanted(
            house,
            job,
            [path],
            tasked=chosen,
            kinds=("unsplit",),
            runs=(parse_run(f"mine={run}"),),
            predictions=((answers,),),
        ),
        quiet,
    )
    mine, unsplit = found.rows
    assert {m.name: m.estimate.value for m in mine.row.measures}["em"] == 0.5
    assert found.reference == "mine"
    counts = [r.tokens for r in first.losses]
    assert unsplit.difference.value == pytest.approx(-len(counts) / sum(counts))
    assert (mine.row.spent.epsilon, mine.row.steps, mine.row.samples) == (1.5, 4, 16)
    assert str(mine.row.spent.meaning) == "at delta 1e-05, unit sequence, replace-one"
    assert unsplit.row.spent == NO_BOUND
    assert mine.row.note == "regime frozen", "the same job"


def test_folders_in_another_order_than_the_data_are_refused(house, tmp_path):
    """Where answers are as long as each other's, places and lengths do not tell whose records they are."""
    job, names = job_with(house, rounds=1), ("alice", "bob", "carol")
    losses = [RecordLoss(source=0, nats=1.0, tokens=3)]
    for name in names:
        begun(tmp_path / name, job=job, data=f"/elsewhere/{name}.jsonl")
        write_losses(tmp_path / name, losses)
        (tmp_path / name / RUN).write_text(record(job=job.digest))

    def row(order, data=tuple(Path(f"{name}.jsonl") for name in names)):
        run = parse_run("x=" + ",".join(str(tmp_path / name) for name in order))
        return split_row(run, job, [losses] * 3, (), data)

    assert row(names).name == "x"
    with pytest.raises(InputError, match="SS-1285") as caught:
        row(("alice", "carol", "bob"))
    assert [detail.partition(":")[0] for detail in caught.value.details] == ["client 2", "client 3"]
    # Files that were named otherwise, or all alike, tell nothing.
    assert row(("alice", "carol", "bob"), tuple(Path(f"{i}/notes.jsonl") for i in range(3))).name == "x"
    assert row(("alice", "carol", "bob"), tuple(Path(f"{i}.jsonl") for i in range(3))).name == "x"


def test_a_job_with_classes_is_measured_by_accuracy(house, tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": f"w{5 + i} w{6 + i}", "label": NAMES[i % 2]}) + "\n" for i in range(8)))
    job = with_task(job_with(house, rounds=1))
    found = compare_baselines(wanted(house, job, [path], kinds=("unsplit", "client-only")), quiet)
    for compared in found.rows:
        (measure,) = compared.row.measures
        assert measure.name == "accuracy"
        assert measure.estimate.value in {0.0, 0.5, 1.0}
        assert len(compared.row.losses) == 2
        assert all(loss.tokens == 1 for loss in compared.row.losses)


def test_options_that_do_not_fit_are_refused_all_at_once(house, tmp_path):
    data = house.data("a.jsonl", 6, seed=1)
    run = parse_run("x=one,two")
    assert (run.name, [str(f) for f in run.folders]) == ("x", ["one", "two"])
    assert parse_run("/a/b=c,d").name is None
    with pytest.raises(InputError, match="SS-1286") as caught:
        compare_baselines(
            wanted(house, job_with(house), [data], predictions=((tmp_path, tmp_path), (tmp_path,)), kinds=()), quiet
        )
    assert len(caught.value.details) == 4
    with pytest.raises(InputError, match="SS-1286"):
        split_row(run, job_with(house), [()], ())
    with pytest.raises(InputError, match="SS-1281"):
        split_row(parse_run(str(tmp_path)), job_with(house), [()], ())


def mode_of(job, **training):
    return job.model_copy(update={"training": Training.model_validate(training)})


def test_where_nothing_is_summed_the_unsplit_baseline_is_that_splits_own_training(house):
    job, texts = mode_of(job_with(house, rounds=3), mode="splitfed-v3", every=1000), texts_of(7, 1)
    client, _, _ = house.joined(job, policy_of())
    seen: list[float] = []
    Trainer(
        client, texts.batches, texts.held_out, answers=None,
        progress=lambda *told: seen.append(told[3]) if told[3] else None,
    ).run()  # fmt: skip
    unsplit = train_pooled(Joined.load(house.model, job), job, [texts], quiet)
    assert len(seen) == len(unsplit.losses)
    assert np.abs(np.array(seen) - unsplit.losses).max() <= 1e-5


def test_in_mode_sequential_the_unsplit_baseline_sees_the_splits_samples(house):
    job, data = mode_of(job_with(house, rounds=3), mode="sequential"), [texts_of(4, 1), texts_of(7, 2)]
    found = train_pooled(Joined.load(house.model, job), job, data, quiet)
    epochs = job.schedule.epochs
    assert found.samples == epochs * (4 + 7 + 4)
    model, losses = whole_of(job), []
    named = [(n, p) for n, p in model.named_parameters() if ".lora_" in n]
    middle = [p for n, p in named if ".layers.1." in n or ".layers.2." in n]
    ends = [p for n, p in named if ".layers.1." not in n and ".layers.2." not in n]
    served = torch.optim.AdamW(middle, lr=job.optimiser.server_lr, weight_decay=0.0)
    for turn in (data[0], data[1], data[0]):
        mine = torch.optim.AdamW(ends, lr=job.optimiser.client_lr, weight_decay=0.0)
        for batch in [*turn.batches] * epochs:
            loss = model(batch.tokens, labels=batch.labels).loss
            loss.backward()
            losses.append(float(loss.detach()))
            for optimiser in (mine, served):
                optimiser.step()
                optimiser.zero_grad()
    assert np.abs(np.array(found.losses) - losses).max() < 1e-5


def test_epsilons_of_different_quantities_have_no_largest(house, tmp_path):
    job = job_with(house)
    mine = (RecordLoss(source=0, nats=3.0, tokens=2),)
    stated = [{"epsilon": 1.5}, {"epsilon": 2.5}, {"epsilon": 2.0, "unit": "user"}, {"epsilon": None, "delta": None}]
    for number, values in enumerate(stated):
        begun(tmp_path / str(number), job=job)
        write_losses(tmp_path / str(number), mine)
        (tmp_path / str(number) / RUN).write_text(record(job=job.digest, **values))

    def row(*numbers: int) -> Row:
        folders = ",".join(str(tmp_path / str(number)) for number in numbers)
        return split_row(parse_run(folders), job, [mine] * len(numbers), ())

    assert row(0, 1).spent.epsilon == 2.5
    assert "epsilons" not in row(0, 1).note
    assert row(0, 2).spent == UNKNOWN
    assert "clients' epsilons differ in delta, unit or relation" in row(0, 2).note
    assert row(0, 3).spent == NO_BOUND
