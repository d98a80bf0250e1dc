"""What `privacy plan` promises against what a run then costs: the ledger's own entries are the oracle."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import securesplit.client.train as training
from securesplit.aggregate.answered import AnswerLog
from securesplit.client.forecast import forecast
from securesplit.client.train import Trainer
from securesplit.errors import BudgetExhausted, InputError
from securesplit.privacy.calibrate import epsilon_for
from securesplit.privacy.ledger import ALL
from securesplit.protocol.job import Job, Task
from tests.e2e.house import FROZEN, ROUND, SILENT, batches_of, job_text, policy_of, sentences
from tests.e2e.ward import batches as labelled
from tests.e2e.ward import labels_policy, records, with_task

UPDATES = "[privacy.updates]\nclip = 0.05\nshare = 0.3\nreleases = {}\n"
NOISED = SILENT.replace("share = 0.6", "share = 0.5") + UPDATES.format(3)
STEP = ROUND.replace('"round"', '"step"').replace("= 3\n", "= 5\n").replace("= 2\n", "= 4\n")
USERS = STEP.replace('unit = "sequence"', 'unit = "user"').replace("= 5\n", "= 12\n").replace("= 4\n", "= 12\n")

ANSWERED = tuple(labels_policy(regime, activations=5, updates=4) for regime in ("round", "step"))


def job_of(**options):
    """A job that nobody runs; its model need not exist."""
    return Job.model_validate(tomllib.loads(job_text(Path("model"), **options)))


@pytest.fixture
def run(house, open_ledger, tmp_path, monkeypatch):
    """Trains one client as `train` does, with sums of its own update alone; returns the ledger and the batches."""

    def alone(*arguments, weight, **_):
        update = arguments[3]
        none = np.zeros(1, dtype=np.uint32)
        # Half of it, as if another had given zeros: a sum never leaves a client where its own steps took it.
        opened = SimpleNamespace(mean=update.vector / 2, survivors=(), total_weight=weight, ring_sum=none)
        return SimpleNamespace(aggregate=opened, contribution=none, heard=b"")

    monkeypatch.setattr(training, "secure_sum", alone)

    def train(policy, job, *, users=False):
        ledger = open_ledger()
        client, _, _ = house.joined(job, policy, ledger=ledger)
        client.link.folder = object()
        batches = batches_of(client, sentences(3, seed=8, longest=7), size=2)
        held_out = batches_of(client, sentences(1, seed=9, longest=7), size=2)
        if job.task is not None:
            batches, held_out = labelled(client, records(4, seed=8))
        if users:  # All records of training are one person's.
            batches = tuple(replace(batch, records=("ann",) * len(batch.records)) for batch in batches)
        train.batches = len(batches)
        log = AnswerLog(tmp_path / "answered")
        try:
            Trainer(client, batches, held_out, answers=log, progress=lambda *_: None).run()
        finally:
            log.close()
        return ledger, {r for b in batches for r in b.records}, {r for b in held_out for r in b.records}

    return train


@pytest.mark.parametrize(
    ("text", "rounds", "epochs"),
    [(FROZEN, 1, 2), (NOISED, 2, 1), (ROUND, 2, 1), (STEP, 2, 2), (ANSWERED[0], 2, 1), (ANSWERED[1], 2, 2)],
    ids=["frozen", "frozen-noised", "round", "step", "labels, round", "labels, step"],
)
def test_a_run_costs_what_was_forecast(house, run, text, rounds, epochs):
    policy, job = policy_of(text), house.job(rounds=rounds, epochs=epochs)
    if text in ANSWERED:
        job = with_task(job)
    ahead = forecast(policy, job)
    assert ahead.fits
    ledger, trained, held_out = run(policy, job)
    spent = Counter((e.record, e.channel) for e in ledger.entries())
    needed = {c.channel: c.needed for c in ahead.costs if c.channel != "peers"}
    assert ("peers" in {c.channel for c in ahead.costs}) == (text == FROZEN)
    for record in trained:
        assert {at: spent[record, at] + spent[ALL, at] for at in needed} == needed
        assert ledger.mu(record) == pytest.approx(ahead.mu, rel=1e-9)
    for record in held_out:
        assert {at: n for (r, at), n in spent.items() if r == record} == {"cut": ahead.held_out}
    for cost in ahead.costs:
        assert cost.mu == pytest.approx(ledger.mu(next(iter(trained)), channels=(cost.channel,)))
    # The printed epsilon is no smaller than the exact one of that mu, and close to it.
    assert 1 <= ahead.epsilon / epsilon_for(ahead.mu, 1e-5) < 1.25
    assert ahead.epsilon <= ahead.budget <= policy.privacy.epsilon * (1 + 1e-9)


def test_one_person_with_all_records_costs_what_was_forecast_for_one_with_as_many(house, run):
    policy, job = policy_of(USERS), house.job(rounds=1, epochs=2)
    ahead = forecast(policy, job, records_per_user=3)
    ledger, _, _ = run(policy, job, users=True)
    spent = Counter(e.channel for e in ledger.entries() if e.record == "ann")
    needed = {c.channel: c.needed for c in ahead.costs}
    assert (spent["cut"], spent["gradient"]) == (needed["cut"], needed["gradient"]) == (6, 6)
    # Where two of the person's records share a batch they are one unit of one sum: the forecast is the worst case.
    assert spent["update"] <= needed["update"] == 6
    assert ledger.mu("ann") <= ahead.mu * (1 + 1e-12)
    assert forecast(policy_of(STEP), job, records_per_user=3) == forecast(policy_of(STEP), job), "another unit"


def test_of_a_person_all_records_may_be_held_out():
    policy = policy_of(USERS)
    ahead = forecast(policy, job_of(rounds=2, epochs=1), records_per_user=4)
    assert (ahead.held_out, ahead.fits, ahead.rounds) == (12, True, 2)
    ahead = forecast(policy, job_of(rounds=2, epochs=1), records_per_user=5)
    assert (ahead.costs[0].needed, ahead.held_out, ahead.fits, ahead.rounds) == (10, 15, False, 1)
    assert forecast(policy, job_of(rounds=1, epochs=1), records_per_user=13).rounds == 0


def scheduled(house, *, rounds, epochs, mode=None, optimiser=(), **schedule):
    raw = house.job(rounds=rounds, epochs=epochs).model_dump(mode="json", exclude_none=True)
    raw["schedule"] |= schedule
    raw["optimiser"] |= dict(optimiser)
    if mode == "splitfed-v3":
        raw["training"] = {"mode": mode, "every": 2}
        raw["sums"]["roster"] = ["alice"]  # Or its copy of B would wait for those of the others.
    elif mode is not None:
        raw["training"] = {"mode": mode}
    return Job.model_validate(raw)


AMPLE = STEP.replace("= 5\n", "= 40\n").replace("= 4\n", "= 30\n")
SUMS = NOISED.replace("releases = 3", "releases = 9")
V3 = {"mode": "splitfed-v3"}


@pytest.mark.parametrize(
    ("text", "job"),
    [
        (AMPLE, {"rounds": 1, "epochs": 3, "evaluate_every": 1}),
        (AMPLE, {"rounds": 2, "epochs": 2, "evaluate_every": 3}),
        (AMPLE, {"rounds": 3, "epochs": 1, "evaluate_every": 2}),
        (AMPLE, {"rounds": 3, "epochs": 1, "evaluate_every": 1000}),
        (AMPLE, {"rounds": 2, "epochs": 2, "evaluate_every": 1, **V3}),
        (AMPLE, {"rounds": 3, "epochs": 1, "evaluate_every": 3, **V3}),
        (AMPLE, {"rounds": 3, "epochs": 1, "evaluate_every": 4, **V3}),
        (AMPLE, {"rounds": 2, "epochs": 1, **V3}),
        (ROUND.replace("= 3\n", "= 9\n").replace("= 2\n", "= 5\n"), {"rounds": 3, "epochs": 1}),
        (FROZEN, {"rounds": 2, "epochs": 2, "evaluate_every": 1, "keep_best": True, "checkpoints": 1}),
        (FROZEN, {"rounds": 2, "epochs": 3, "evaluate_every": 3, "optimiser": {"accumulate": 2, "warmup": 2}}),
        (SILENT, {"rounds": 2, "epochs": 1, "evaluate_every": 1}),
        (SUMS, {"rounds": 3, "epochs": 2, "evaluate_every": 1, "optimiser": {"accumulate": 3}}),
        (SUMS, {"rounds": 2, "epochs": 1, **V3}),
        (FROZEN, {"rounds": 2, "epochs": 2, "evaluate_every": 1, **V3}),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_each_release_of_a_run_was_forecast(house, run, text, job):
    """Units are the ledger's own integers, of a training record and of a held-out one; so this is equality to the last bit."""
    policy, job = policy_of(text), scheduled(house, **job)
    ledger, trained, held_out = run(policy, job)
    spent = Counter((e.record, e.channel) for e in ledger.entries())
    ahead = forecast(policy, job, batches=run.batches)
    assert (ahead.fits, ahead.exact, ahead.batches) == (True, True, None)
    assert {ledger.spent_units(r) for r in trained} == {ahead.units}
    assert {ledger.spent_units(r) for r in held_out} == {ahead.units_held_out}
    assert {spent[r, "cut"] for r in held_out} == {ahead.held_out}
    assert ledger.mu() == max(ahead.mu, ahead.mu_held_out), "what run.json tells"
    inside = {spent[r, c.channel] + spent[ALL, c.channel] for r in trained for c in ahead.costs if c.channel != "peers"}
    assert inside == {c.needed for c in ahead.costs if c.channel != "peers"}
    unknown = forecast(policy, job)
    assert unknown.held_out <= ahead.held_out
    if job.schedule.evaluate_every is not None and policy.privacy.regime == "step":
        assert not unknown.exact
        assert unknown.batches >= run.batches
    else:
        assert replace(unknown, batches=None) == ahead, "the number of batches does not matter"


@pytest.mark.parametrize(
    "job",
    [
        {"optimiser": {"warmup": 3}, "evaluate_every": 1},
        {"optimiser": {"schedule": "linear", "client_steps": 2, "server_steps": 2}, "evaluate_every": 2},
        {"mode": "sequential", "evaluate_every": 1},
    ],
    ids=["warm-up", "the rate is 0 at the end", "in turns"],
)
def test_where_a_run_may_spend_less_the_forecast_is_a_bound_and_says_so(house, run, job):
    policy, job = policy_of(AMPLE), scheduled(house, rounds=3, epochs=2, **job)
    ledger, trained, held_out = run(policy, job)
    ahead = forecast(policy, job, batches=run.batches)
    assert not ahead.exact
    assert all(ledger.spent_units(r) <= ahead.units for r in trained)
    assert all(ledger.spent_units(r) <= ahead.units_held_out for r in held_out)


@pytest.mark.parametrize("mode", [None, "splitfed-v3"])
@pytest.mark.parametrize("users", [False, True], ids=["sequence", "user"])
def test_a_run_goes_through_with_what_was_forecast_and_sends_nothing_with_one_release_less(house, run, mode, users):
    job = scheduled(house, rounds=2, epochs=1, evaluate_every=1, mode=mode)
    text = AMPLE.replace('unit = "sequence"', 'unit = "user"') if users else AMPLE
    needed = forecast(policy_of(text), job, batches=2).held_out
    assert needed == 3 + (4 if mode is None else 2)
    enough = text.replace("= 40\n", f"= {needed}\n")
    short = text.replace("= 40\n", f"= {needed - 1}\n")
    assert not forecast(policy_of(short), job, batches=2).fits
    with pytest.raises(InputError, match="SS-1252"):
        run(policy_of(short), job)
    assert run.batches == 2
    assert forecast(policy_of(enough), job, batches=2).fits
    ledger, _, held_out = run(policy_of(enough), job)
    assert {ledger.spent_units(r) for r in held_out} == {forecast(policy_of(enough), job, batches=2).units_held_out}


def test_the_batches_within_reach_are_the_last_that_fit():
    policy = policy_of(STEP)  # Five releases at the cut.
    job = job_of(rounds=2, epochs=2)
    for every, most in ((1, 0), (2, 1), (3, 2), (5, 3), (8, 5)):
        asked = job.model_copy(update={"schedule": job.schedule.model_copy(update={"evaluate_every": every})})
        assert forecast(policy, asked).batches == most
        assert forecast(policy, asked).fits is (most > 0)
        if most:
            assert forecast(policy, asked, batches=most).fits
        late = forecast(policy, asked, batches=most + 1)
        assert (late.fits, late.held_out) == (False, 3 + 4 * (most + 1) // every)
    reach = forecast(policy, asked, batches=3)
    assert (reach.rounds, reach.epochs) == (2, 2)
    again = asked.model_copy(update={"schedule": asked.schedule.model_copy(update={"rounds": 1, "epochs": 1})})
    assert forecast(policy, again, batches=3).rounds == 3, "1 + 3 + 9 // 8 of five"
    assert forecast(policy, again, batches=31).rounds == 1
    assert forecast(policy, again, batches=32).rounds == 0


@pytest.mark.parametrize(
    ("text", "rounds", "epochs"),
    [(NOISED, 4, 1), (ROUND, 3, 1), (STEP, 2, 3)],
    ids=["updates", "gradients", "steps"],
)
def test_what_does_not_fit_is_refused_by_the_run_too(house, run, text, rounds, epochs):
    policy, job = policy_of(text), house.job(rounds=rounds, epochs=epochs)
    assert not forecast(policy, job).fits
    with pytest.raises(BudgetExhausted):
        run(policy, job)


@pytest.mark.parametrize("text", [FROZEN, NOISED, ROUND, STEP], ids=["frozen", "noised", "round", "step"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_the_reach_is_the_last_job_that_fits(text, epochs):
    policy = policy_of(text)
    if "round" in policy.privacy.regime and epochs > 1:
        epochs = 1
    reach = forecast(policy, job_of(rounds=1, epochs=epochs)).rounds
    if reach is None:
        assert forecast(policy, job_of(rounds=10_000, epochs=epochs)).fits
        return
    assert forecast(policy, job_of(rounds=2, epochs=epochs)).rounds == reach, "it does not depend on what was asked"
    assert reach > 0
    assert forecast(policy, job_of(rounds=reach, epochs=epochs)).fits
    assert not forecast(policy, job_of(rounds=reach + 1, epochs=epochs)).fits


def test_the_epochs_within_reach():
    assert forecast(policy_of(FROZEN), job_of(epochs=50)).epochs is None
    assert forecast(policy_of(ROUND), job_of(epochs=1)).epochs == 1
    ahead = forecast(policy_of(STEP), job_of(rounds=2, epochs=1))
    assert ahead.epochs == 2  # Four gradients in two rounds.
    assert forecast(policy_of(STEP), job_of(rounds=2, epochs=2)).fits
    assert not forecast(policy_of(STEP), job_of(rounds=2, epochs=3)).fits


def test_against_the_other_clients():
    """None where sums are bare; the sums alone where B stands still; everything where B learns and shows it."""
    job = job_of(rounds=2, epochs=1)
    assert forecast(policy_of(FROZEN), job).epsilon_peer is None
    noised = forecast(policy_of(NOISED), job)
    sums = next(c for c in noised.costs if c.channel == "update")
    assert 1 <= noised.epsilon_peer / epsilon_for(sums.mu, 1e-5) < 1.25
    assert noised.epsilon_peer < noised.epsilon
    for text in (ROUND, STEP):
        ahead = forecast(policy_of(text), job)
        assert ahead.epsilon_peer == ahead.epsilon


def test_what_a_server_can_learn_at_most():
    """I <= mu^2/8 nats and Phi(mu/2); at epsilon 8 less than one bit, which is said."""
    from statistics import NormalDist

    ahead = forecast(policy_of(SILENT.replace("share = 0.6", "share = 1.0")), job_of())
    cut = ahead.costs[0]
    assert cut.bits == pytest.approx(cut.mu**2 / 8 / math.log(2))
    assert cut.right == pytest.approx(NormalDist().cdf(cut.mu / 2))
    assert cut.bits < 0.5 + 1e-3  # The study's table: 0.50 at epsilon 8, delta 1e-5.
    assert ahead.useless
    assert not forecast(policy_of(ROUND), job_of(epochs=1)).useless


def test_tokens_are_this_sites_part():
    assert forecast(policy_of(FROZEN), job_of()).tokens == 24 // 3
    assert forecast(policy_of(SILENT), job_of()).tokens == 0


def test_unit_token_is_dear_as_soon_as_a_has_attention():
    token = policy_of(SILENT.replace('unit = "sequence"', 'unit = "token"'))
    job = job_of()
    bare = job.model_copy(update={"cut": job.cut.model_copy(update={"front": 0})})
    dear, cheap = (forecast(token, j).costs[0].sigma_over_clip for j in (job, bare))
    assert dear == pytest.approx(cheap * math.sqrt(16))  # The longest bucket.
    assert cheap == pytest.approx(forecast(policy_of(SILENT), job).costs[0].sigma_over_clip)


def test_labels_instead_of_gradients():
    head, _, rest = ROUND.partition("[privacy.gradients]")
    labels = (
        head + "[privacy.labels]\nclasses = 4\nshare = 0.2\n[privacy.updates]" + rest.partition("[privacy.updates]")[2]
    )
    ahead = forecast(policy_of(labels), job_of(rounds=2, epochs=1))
    assert [c.channel for c in ahead.costs] == ["cut", "labels", "update"]
    assert (ahead.costs[1].needed, ahead.costs[1].allowed) == (1, 1)
    assert ahead.costs[1].mu == pytest.approx(math.sqrt(0.2) * policy_mu(labels))
    assert ahead.mu == pytest.approx(math.sqrt(sum(c.mu**2 for c in ahead.costs)))
    # Every channel could pay, but the job has nothing to answer for; with labels of its own it fits.
    assert "[task]" in ahead.refusals[0]
    assert not ahead.fits
    job = job_of(rounds=2, epochs=1)
    for names, fits in ((("a", "b", "c", "d"), True), (("a", "b"), False)):
        assert forecast(policy_of(labels), job.model_copy(update={"task": Task(labels=names)})).fits is fits


def test_a_person_may_have_as_many_labels_as_the_budget_has_left():
    text = labels_policy("round", activations=20, updates=20, share=0.02, size=0.9)
    by_user = policy_of(text.replace('unit = "sequence"', 'unit = "user"'))
    job = job_of(rounds=2, epochs=1).model_copy(update={"task": Task(labels=("a", "b"))})
    (asked,) = (c for c in forecast(by_user, job, records_per_user=3).costs if c.channel == "labels")
    assert (asked.needed, asked.allowed, asked.fits) == (3, 1, False)
    assert forecast(by_user, job).fits


def policy_mu(text):
    from securesplit.privacy.plan import plan_for

    return plan_for(policy_of(text).privacy).mu


def test_without_privacy_there_is_nothing_to_forecast():
    assert forecast(policy_of(), job_of()) is None


def test_a_budget_that_cannot_be_divided_is_said():
    poor = SILENT.replace("epsilon = 8.0", "epsilon = 0.001").replace("releases = 1", "releases = 1000000")
    with pytest.raises(InputError) as caught:
        forecast(policy_of(poor), job_of())
    assert caught.value.code == "SS-1533"
