"""In-run evaluation, early stopping and the best adapters: against a plain loop over the same client's own steps."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

import securesplit.client.train as train_module
from securesplit.admit import breaches
from securesplit.aggregate.fixedpoint import Aggregate, quantise
from securesplit.client.pace import Pace, require_affordable
from securesplit.client.rounds import Opened
from securesplit.client.train import Trainer
from securesplit.errors import InputError
from securesplit.model.export import read_part_adapters
from securesplit.model.lora import adapter_parameters
from securesplit.protocol.job import Job
from securesplit.protocol.messages import Forward
from tests.e2e.house import FROZEN, LAB, ROUND, batches_of, policy_of, sentences

STEP = ROUND.replace('"round"', '"step"')


def job_of(house, **tables):
    raw = house.job(rounds=tables.pop("rounds", 2), epochs=tables.pop("epochs", 2)).model_dump(
        mode="json", exclude_none=True
    )
    for table, said in tables.items():
        raw[table] = {**raw.get(table, {}), **said}
    return Job.model_validate(raw)


@pytest.fixture
def alone(monkeypatch):
    """A sum of one; keeps what was given."""
    given = []

    def one(link, folder, policy, update, **_):
        given.append(update.vector.copy())
        scale = 1 << 40
        words, _ = quantise(update.vector, 1, scale=scale, clip=64.0, w_max=1, bits=64)
        return Opened(Aggregate(words, (link.name,), scale, 64.0), b"", words)

    monkeypatch.setattr(train_module, "secure_sum", one)
    return given


def trainer_of(house, job, privacy=LAB, ledger=None):
    client, spy, core = house.joined(job, policy_of(privacy), ledger=ledger)
    client.link.folder = house.folder("alice")
    texts = sentences(10, seed=5)
    trainer = Trainer(
        client, batches_of(client, texts[:7]), batches_of(client, texts[7:]), answers=None, progress=lambda *_: None
    )
    return trainer, client, spy, core


def test_the_whole_recipe_is_the_unsplit_models_on_both_ends(house, alone, monkeypatch):
    """Warm-up, cosine, accumulation, clipping and decay: A, B and C end where transformers and torch take them."""
    said = {
        "schedule": "cosine", "client_steps": 6, "server_steps": 6, "warmup": 0.3, "accumulate": 2, "max_grad_norm": 0.5,
        "weight_decay": 0.1, "betas": [0.8, 0.99],
    }  # fmt: skip
    job = job_of(house, rounds=1, epochs=4, optimiser=said)
    trainer, client, _, core = trainer_of(house, job)
    middle = core._engine.middle
    parts = (client.front, middle, client.back)
    client.train("B")
    sides = ([p for x in (client.front, client.back) for p in adapter_parameters(x)], list(adapter_parameters(middle)))
    start = [[p.detach().clone() for p in side] for side in sides]
    trainer._round(0)
    client.train("B")
    ended = [[p.detach().clone() for p in side] for side in sides]
    with torch.no_grad():
        for side, values in zip(sides, start, strict=True):
            for parameter, value in zip(side, values, strict=True):
                parameter.copy_(value)
    optimisers = [
        torch.optim.AdamW(side, lr=rate, weight_decay=0.1, betas=(0.8, 0.99))
        for side, rate in zip(sides, (1e-2, 5e-3), strict=True)
    ]
    schedules = [transformers.get_scheduler("cosine", o, num_warmup_steps=2, num_training_steps=6) for o in optimisers]
    passes = [batch for _ in range(4) for batch in trainer._batches]
    for number, batch in enumerate(passes):
        left = 1 if number == len(passes) - 1 and number % 2 == 0 else 2
        (parts[2](parts[1](parts[0](batch.tokens)), batch.labels) / left).backward()
        if number % 2 == 1 or number == len(passes) - 1:
            for side, optimiser, schedule in zip(sides, optimisers, schedules, strict=True):
                torch.nn.utils.clip_grad_norm_(side, 0.5)
                optimiser.step()
                schedule.step()
                optimiser.zero_grad()
    assert len(passes) % 2 == 0, "or B would wait for another gradient"
    for side, values, before in zip(sides, ended, start, strict=True):
        assert any(not torch.equal(v, b) for v, b in zip(values, before, strict=True))
        for parameter, value in zip(side, values, strict=True):
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-4, atol=1e-6)


def test_the_rate_goes_on_over_the_rounds(house, alone):
    job = job_of(house, optimiser={"schedule": "linear", "client_steps": 8, "server_steps": 9})
    trainer, *_ = trainer_of(house, job)
    trainer._round(0)
    assert trainer._at.rate == 1e-2
    trainer._round(1)
    assert trainer._at.rate == pytest.approx(1e-2 * (1 - trainer._at.moves / 2 / 8))
    trainer._round(0)  # The rate is 0 by now: nothing moves, and that is no fault of the server's.
    assert np.abs(alone[-1]).max() == 0


def test_the_held_out_loss_is_measured_as_often_as_said(house, alone):
    job = job_of(house, schedule={"evaluate_every": 3, "keep_best": True})
    trainer, client, *_ = trainer_of(house, job)
    seen, values = [], {}
    measure = trainer._pace._measure

    def spy():
        seen.append(measure())
        values[seen[-1]] = client.snapshot()
        return seen[-1]

    trainer._pace._measure = spy
    saw = trainer._pace.saw
    trainer._pace.saw = lambda moves, loss: (values.setdefault(loss, client.snapshot()), saw(moves, loss))
    done = trainer.run()
    steps = 2 * 2 * len(trainer._batches)
    assert [m.moves for m in done.measured] == list(range(3, steps + 1, 3))
    assert [m.loss for m in done.measured] == seen
    assert len(set(seen)) > 1
    everything = [*done.curve, *seen]
    assert done.best.loss == min(everything)
    for mine, theirs in zip(done.best.values, values[min(everything)], strict=True):
        assert np.array_equal(mine, theirs)
    assert not done.stopped


def test_measuring_changes_nothing_that_is_learnt(house, alone):
    ended = []
    for every in (None, 1):
        schedule = {} if every is None else {"evaluate_every": every}
        trainer, client, _, core = trainer_of(house, job_of(house, schedule=schedule, adapters={"dropout": 0.2}))
        trainer.run()
        ended.append([*client.snapshot(), *(p.detach().numpy() for p in adapter_parameters(core._engine.middle))])
    assert all(np.array_equal(a, b) for a, b in zip(*ended, strict=True))


def test_patience_ends_local_steps_and_not_the_sums(house, alone):
    """The rate is so high that the loss gets worse; the client then gives zeros to the sums."""
    job = job_of(house, rounds=4, epochs=3, schedule={"evaluate_every": 1, "patience": 2}, optimiser={"client_lr": 1.0})
    trainer, _, spy, _ = trainer_of(house, job)
    done = trainer.run()
    assert done.stopped
    assert len(done.rounds) == len(alone) == 4, "it stays in every sum"
    assert np.abs(alone[0]).max() > 0
    assert np.abs(alone[-1]).max() == 0
    assert done.rounds[-1].losses == ()
    last = [m.loss for m in done.measured]
    assert len(last) < 12 * len(trainer._batches) // 3
    assert min(last[-2:]) >= min([done.curve[0], *last[:-2]])
    assert [f for f in spy.messages(Forward) if f.learn].__len__() == done.steps


def test_in_regime_frozen_measuring_is_free(house, open_ledger, alone):
    counts = []
    for every in (None, 1):
        job = job_of(house, schedule={} if every is None else {"evaluate_every": every, "patience": 50})
        ledger = open_ledger()
        trainer, *_ = trainer_of(house, job, FROZEN, ledger)
        done = trainer.run()
        counts.append({s.channel: s.releases for s in ledger.summary()})
        ledger.close()
    assert len(done.measured) == done.steps
    assert counts[1] == counts[0]


def test_what_the_policy_cannot_pay_is_refused_before_anything_is_sent(house, open_ledger, alone):
    trainer, _, spy, _ = trainer_of(house, job_of(house, schedule={"evaluate_every": 1}), STEP, open_ledger())
    with pytest.raises(InputError, match="held-out record") as caught:
        trainer.run()
    assert caught.value.code == "SS-1252"
    assert not spy.messages(Forward)
    # Four measurements of each; a person who pays for all three pays twelve times.
    job = job_of(house, rounds=1, epochs=1, schedule={"evaluate_every": 1})
    trainer, *_ = trainer_of(house, job, STEP.replace("releases = 3", "releases = 9", 1), open_ledger())
    person = tuple(replace(batch, records=("ann",) * len(batch.records)) for batch in trainer._held_out)
    require_affordable(trainer._client, 2, trainer._held_out)
    with pytest.raises(InputError, match="12 times, and the policy allows 9"):
        require_affordable(trainer._client, 2, person)
    trainer, *_ = trainer_of(house, job_of(house, schedule={"patience": 1}))
    trainer._held_out = ()
    with pytest.raises(InputError, match="nothing is held out"):
        trainer.run()


REFUSED = {
    "accumulate": {"optimiser": {"accumulate": 2}},
    "patience": {"schedule": {"patience": 1}},
    "keep_best": {"schedule": {"keep_best": True}},
    "precision": {"precision": {"front": "f16"}},
    "checkpointing": {"memory": {"checkpointing": ["back"]}},
    "embedding": {"adapters": {"embedding": True}},
    "prefix": {"adapters": {"method": "prefix", "prefix_length": 3, "targets": []}},
}


@pytest.mark.parametrize("rule", list(REFUSED))
def test_what_a_regime_cannot_protect_is_refused_by_name(house, rule):
    job = job_of(house, **REFUSED[rule])
    for privacy in (ROUND, STEP):
        found = breaches(policy_of(privacy), job)
        assert [line.split(":")[0] for line in found] == [f"privacy.regime.{rule}"]
    assert breaches(policy_of(), job) == ()
    assert (breaches(policy_of(FROZEN), job) != ()) == (rule == "embedding")


def test_regime_round_measures_between_rounds_alone(house):
    job = job_of(house, schedule={"evaluate_every": 3})
    assert "evaluate_every" in breaches(policy_of(ROUND), job)[0]
    assert breaches(policy_of(STEP), job) == ()


def test_ties_are_no_progress(house):
    trainer, *_ = trainer_of(house, job_of(house, schedule={"patience": 2}))
    pace = Pace(trainer._client, lambda: 0.0)
    for loss, stopped in ((2.0, False), (2.0, False), (1.0, False), (1.5, False), (float("nan"), True)):
        pace.saw(1, loss)
        assert pace.stopped == stopped


def test_where_nothing_is_summed_a_round_s_end_is_no_second_measurement(house):
    """It measures the very same adapters once more; that they have not improved meanwhile is no reason to stop."""
    job = job_of(house, rounds=3, epochs=1, schedule={"evaluate_every": 2, "patience": 1})
    raw = job.model_dump(mode="json", exclude_none=True)
    raw |= {"training": {"mode": "splitfed-v3", "every": 1}, "sums": {"roster": ["alice"]}}
    raw["optimiser"] |= {"client_lr": 1e-3, "server_lr": 1e-3}
    client, *_ = house.joined(Job.model_validate(raw), policy_of())
    learnt = batches_of(client, sentences(6, seed=5), size=3)
    while len(learnt) % 2:
        learnt = learnt[1:]
    trained = Trainer(client, learnt, learnt, answers=None, progress=lambda *_: None).run()
    losses = [m.loss for m in trained.measured]
    assert losses == sorted(losses, reverse=True)
    assert not trained.stopped
    assert trained.steps == 3 * len(learnt)


@pytest.mark.parametrize("accumulate", [2, 5])
def test_the_move_at_a_round_s_end_is_measured_as_any_other(house, alone, accumulate):
    job = job_of(house, epochs=1, schedule={"evaluate_every": 1}, optimiser={"accumulate": accumulate})
    trainer, *_ = trainer_of(house, job)
    batches = len(trainer._batches)
    assert batches % accumulate
    trained = trainer.run()
    assert [m.moves for m in trained.measured] == [*range(1, 2 * -(-batches // accumulate) + 1)]


def test_a_run_leaves_its_best_beside_its_last(house, monkeypatch, tmp_path):
    from tests.e2e.test_modes import train_all

    job = job_of(house, schedule={"keep_best": True, "evaluate_every": 1})
    seen = train_all(house, job, LAB, monkeypatch)
    assert seen.errors == {}
    said = json.loads((house.root / "alice" / "run.json").read_text())
    assert said["best"][1] == min([*said["curve"], *(loss for _, loss in said["measured"])])
    for part in ("front", "back"):
        best = read_part_adapters(house.root / "alice" / "best" / f"adapter-{part}.safetensors")
        last = read_part_adapters(house.root / "alice" / f"adapter-{part}.safetensors")
        assert best.facts.model_copy(update={"middle": ""}) == last.facts
        assert len(best.facts.middle) == 64, "the best names the B that made it the best"


def test_an_embedding_drifts_at_its_client_alone(house, alone):
    """It learns, it shapes what is released, and no sum and no write of the mean touches it."""
    trainer, client, *_ = trainer_of(house, job_of(house, adapters={"embedding": True}))
    before, state = client.snapshot(), client._state()
    size = client.read("B").size
    trainer.run()
    assert not np.array_equal(before[2], client.snapshot()[2])
    assert [update.size for update in alone] == [size, client.read("A").size]
    assert client._state() != state
    held = client.snapshot()[2]
    client.write(np.zeros_like(client.read()))
    assert np.array_equal(client.snapshot()[2], held)
    client.reset()
    assert np.array_equal(client.snapshot()[2], before[2])


def test_measurements_are_kept_and_go_on(house):
    job = job_of(house, schedule={"patience": 3, "keep_best": True})
    straight, first = (Pace(trainer_of(house, job)[1], lambda: 0.0) for _ in range(2))
    losses = [3.0, 2.0, 2.5, 2.6, 1.0, 1.5, 1.6, 1.7]
    for number, loss in enumerate(losses):
        straight.saw(number, loss)
        if number < 4:
            first.saw(number, loss)
    second = Pace(first._client, lambda: 0.0)
    second.restore(first.state())
    assert second.best.loss == 2.0
    for number, loss in enumerate(losses[4:], 4):
        assert not second.stopped
        second.saw(number, loss)
    assert second.stopped
    assert straight.stopped
    for one, two in zip(straight.state(), second.state(), strict=True):
        assert one.name == two.name
        assert torch.equal(one.value, two.value)
    with pytest.raises(InputError, match="no measurements"):
        second.restore(straight.state()[1:])
