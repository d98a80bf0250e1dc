"""Whole runs over TLS on loopback, three clients in threads. Plain integer sums are the oracle for the secure ones."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import securesplit.client.rounds as rounds_module
from securesplit.aggregate import wire
from securesplit.aggregate.client import ClientRound
from securesplit.client.run import Run, RunRecord, run_training
from securesplit.client.train import Trainer
from securesplit.errors import AggregationAborted, BudgetExhausted
from securesplit.kept.folder import Kept
from securesplit.model.export import collect_adapters, export_adapter, read_part_adapters, restore_adapters
from securesplit.model.lora import add_adapters
from securesplit.model.store import load_back, load_front
from securesplit.privacy.gate import Gate
from securesplit.privacy.ledger import Ledger
from securesplit.privacy.plan import plan_for
from tests.e2e.house import CLIENTS, FROZEN, ROUND, Loopback, build_model, policy_of


@dataclass
class Outcome:
    records: dict[str, RunRecord]
    errors: dict[str, BaseException]


def train_all(house, core, policy, *, count=6, names=CLIENTS, seconds=60, resume=False) -> Outcome:
    """Every client's whole run, each in a thread of its own with its own data."""
    outcome = Outcome({}, {})
    with Loopback(core, house.keys) as loop:

        def one(name: str, seed: int) -> None:
            run = Run(
                policy=policy, keys=house.keys / name, server=loop.url, data=house.data(f"{name}.jsonl", count, seed=seed),
                out=house.root / name, held_out=2, limit=None, max_tokens=16, truth=house.root / f"{name}.truth", alone=False,
                model=str(house.model), cache=house.root / "cache", overwrite=not resume,
                resume=resume,
            )  # fmt: skip
            try:
                outcome.records[name] = run_training(run, lambda *_: None)
            except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
                outcome.errors[name] = error

        threads = [threading.Thread(target=one, args=(name, 30 + i), daemon=True) for i, name in enumerate(names)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds)
        assert not any(thread.is_alive() for thread in threads)
    return outcome


def sums_are_exact(house, rounds: int, names=CLIENTS) -> None:
    """Each client's opened ring sum is the plain sum of what all clients put in, mod 2^32, bit for bit."""
    for number in range(rounds):
        files = {name: np.load(house.root / name / f"round-{number}.npz") for name in names}
        total = sum(f["contribution"].astype(np.uint64) for f in files.values()) % (1 << 32)
        for file in files.values():
            assert file["ring_sum"].dtype == np.uint32
            assert np.array_equal(file["ring_sum"], total.astype(np.uint32))
        assert np.count_nonzero(total) > 0.5 * len(total)


def adapters(house, name):
    return {
        f"{part}.{key}": value
        for part in ("front", "back")
        for key, value in load_file(house.root / name / f"adapter-{part}.safetensors").items()
    }


def alike(house, names=CLIENTS):
    first = adapters(house, names[0])
    for name in names[1:]:
        other = adapters(house, name)
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)
    return first


def test_open_two_rounds_the_sums_are_exact_and_the_export_is_the_split(house, tmp_path):
    core = house.core(house.job(blind=False), policy_of())
    outcome = train_all(house, core, policy_of())
    assert outcome.errors == {}
    sums_are_exact(house, 2)
    alike(house)
    assert (core.sums.finished, core.sums.aborted) == (2, 0)
    record = outcome.records["alice"]
    assert record.survivors == (CLIENTS, CLIENTS)
    assert (record.epsilon, record.tls, record.regime, record.steps) == (None, "TLSv1.3", "open", 2 * 2 * 2)
    # The server's view of the last sum is the clients': in this job it is not blind.
    assert np.array_equal(core.sums.last.ring_sum, np.load(house.root / "bob" / "round-1.npz")["ring_sum"])
    middle = core._engine.middle
    parts = [read_part_adapters(house.root / "bob" / f"adapter-{part}.safetensors") for part in ("front", "back")]
    export_adapter([parts[0], collect_adapters(middle, model=house.digest), parts[1]], tmp_path / "peft", "tiny")
    whole = PeftModel.from_pretrained(build_model(), tmp_path / "peft")
    front, back = load_front(house.model), load_back(house.model)
    for part, saved in zip((front, back), parts, strict=True):
        add_adapters(part, 2, 4.0, ("q_proj", "v_proj", "down_proj"), seed=99)
        restore_adapters(part, saved)
    ids = torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        split, joined, plain = back(middle(front(ids))), whole(ids).logits, build_model()(ids).logits
    assert torch.equal(split, joined)
    assert (split - plain).abs().max() > 1e-3


def test_frozen_two_rounds_blind_and_each_record_is_paid_once(house):
    policy = policy_of(FROZEN)
    core = house.core(house.job(), policy)
    before = [p.clone() for p in core._engine.middle.parameters()]
    outcome = train_all(house, core, policy)
    assert outcome.errors == {}
    sums_are_exact(house, 2)
    first = alike(house)
    assert all(torch.equal(a, b) for a, b in zip(before, core._engine.middle.parameters(), strict=True))
    # A is where the job started; C has learnt.
    untouched = load_front(house.model)
    add_adapters(untouched, 2, 4.0, ("q_proj", "v_proj", "down_proj"), seed=7)
    start = {t.name: t.value for t in collect_adapters(untouched).tensors}
    fronts = {k.removeprefix("front."): v for k, v in first.items() if k.startswith("front.")}
    assert fronts.keys() == start.keys()
    assert all(torch.equal(fronts[key], start[key]) for key in start)
    assert any(value.abs().sum() > 0 for key, value in first.items() if key.startswith("back.") and "lora_B" in key)
    # The server's sum is blind: not what the clients opened.
    assert core.sums.last.aggregate is None
    assert not np.array_equal(core.sums.last.ring_sum, np.load(house.root / "alice" / "round-1.npz")["ring_sum"])
    plan = plan_for(policy.privacy)
    for name in CLIENTS:
        record = outcome.records[name]
        assert [(c.channel, c.releases) for c in record.channels] == [("bare", 1), ("cut", 6), ("peers", 1)]
        # Its own release, and two thirds of the 24 tokens: what the two others may generate with the common C.
        assert record.mu == pytest.approx((plan.cut.mu**2 + 16 * plan.decode.mu**2) ** 0.5)
        assert 0 < record.epsilon < 8.0
        ledger = Ledger(house.keys / name / "ledger")
        ledger.verify()
        ledger.close()
        lines = (house.root / f"{name}.truth").read_text().splitlines()
        assert len(lines) == 6, "each record crossed once, evaluation included"


def test_the_same_data_again_costs_nothing_and_another_policy_is_refused(house):
    policy = policy_of(FROZEN)
    first = train_all(house, house.core(house.job(rounds=1), policy), policy)
    assert first.errors == {}
    in_the_way = train_all(house, house.core(house.job(rounds=1), policy), policy, names=("alice",))
    assert in_the_way.errors["alice"].code == "SS-1231", "the truth file of the first run"
    for name in CLIENTS:
        (house.root / f"{name}.truth").unlink()
    again = train_all(house, house.core(house.job(rounds=1, name="other"), policy), policy)
    assert again.errors == {}
    assert [r.mu for r in again.records.values()] == [r.mu for r in first.records.values()]
    (house.root / "alice.truth").unlink()
    other = policy_of(FROZEN.replace("clip = 4.0", "clip = 5.0"))
    refused = train_all(house, house.core(house.job(rounds=1), other), other, names=("alice",))
    assert isinstance(refused.errors["alice"], BudgetExhausted)
    assert (house.root / "alice.truth").read_text() == "", "nothing was sent"


def test_a_run_that_dies_just_before_its_very_end_goes_on(house, monkeypatch):
    """Its record is written already, and is no finished run in the way of the one that goes on; nor is its truth file."""
    policy, finish = policy_of(FROZEN), Kept.finish

    def dies(_self, _job):
        raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "finish", dies)
    died = train_all(house, house.core(house.job(rounds=1), policy), policy)
    assert {type(error) for error in died.errors.values()} == {KeyboardInterrupt}
    files = ("run.json", "adapter-back.safetensors")
    before = [(house.root / "alice" / name).read_bytes() for name in files[1:]]
    assert (house.root / "alice" / files[0]).exists()
    crossed = (house.root / "alice.truth").read_text().splitlines()
    assert len(crossed) == 6, "each record crossed once"
    monkeypatch.setattr(Kept, "finish", finish)
    again = train_all(house, house.core(house.job(rounds=1), policy), policy, names=("alice",), resume=True)
    assert again.errors == {}
    assert [(house.root / "alice" / name).read_bytes() for name in files[1:]] == before
    lines = (house.root / "alice.truth").read_text().splitlines()
    assert lines[:6] == crossed
    texts = {json.loads(line)["text"] for line in crossed}
    assert {json.loads(line)["text"] for line in lines[6:]} <= texts, "held-out records that are looked at once more"


def test_the_round_regime_moves_only_by_the_noised_sum(house, monkeypatch):
    policy, lock = policy_of(ROUND), threading.Lock()
    noised, means = [], []
    release, step = Gate.release_update, Trainer._common_step

    def spy_release(self, update):
        out = release(self, update)
        with lock:
            noised.append((out, update.steps * update.step))
        return out

    def spy_step(self, mean, factor):
        before = self._client.read()
        other = self._client.read("A" if factor == "B" else "B")
        assert np.array_equal(before, self._client_start), "nothing moved before the sum"
        step(self, mean, factor)
        # AdamW's first step of size lr along the mean, whatever its scale: an oracle without torch's optimiser.
        want = start_of[id(self)] - self._client.job.optimiser.client_lr * mean / (np.abs(mean) + 1e-8)
        assert np.allclose(self._client.read(factor), want, atol=1e-6)
        assert np.array_equal(other, self._client.read("A" if factor == "B" else "B"))
        with lock:
            means.append(mean)

    start_of: dict[int, np.ndarray] = {}
    one_round = Trainer._round

    def spy_round(self, number):
        factor = "B" if number % 2 == 0 else "A"
        self._client_start, start_of[id(self)] = self._client.read(), self._client.read(factor)
        return one_round(self, number)

    monkeypatch.setattr(Gate, "release_update", spy_release)
    monkeypatch.setattr(Trainer, "_common_step", spy_step)
    monkeypatch.setattr(Trainer, "_round", spy_round)
    core = house.core(house.job(epochs=1), policy)
    outcome = train_all(house, core, policy)
    assert outcome.errors == {}
    sums_are_exact(house, 2)
    alike(house)
    assert len(noised) == len(means) == 6
    channel = plan_for(policy.privacy).update
    for out, clean in noised:
        assert out.noised
        assert (out.vector - clean).std() == pytest.approx(channel.sigma, rel=0.25)
    # All clients of a round meet the same mean of the noised parts; which part is whose does not matter to a mean.
    for half in (0, 1):
        parts = np.mean([v.vector for v, _ in noised[3 * half : 3 * half + 3]], axis=0)
        for mean in means[3 * half : 3 * half + 3]:
            assert np.allclose(mean, parts, atol=1e-3)
    for record in outcome.records.values():
        # Four records in each of two rounds on three channels; two held-out ones are evaluated three times.
        assert {c.channel: c.releases for c in record.channels} == {"cut": 4 * 2 + 2 * 3, "gradient": 8, "update": 8}
        assert record.epsilon <= 1000


def test_the_step_regime_pays_for_every_state_and_shares_noised_paths_alone(house, monkeypatch):
    stated = ROUND.replace('"round"', '"step"').replace("releases = 3", "releases = 4").replace("= 2\n", "= 4\n")
    policy, lock = policy_of(stated), threading.Lock()
    shared, release = [], Gate.release_update

    def spy_release(self, update):
        out = release(self, update)
        if isinstance(update, np.ndarray):
            with lock:
                shared.append(out)
        return out

    monkeypatch.setattr(Gate, "release_update", spy_release)
    core = house.core(house.job(), policy)
    outcome = train_all(house, core, policy)
    assert outcome.errors == {}
    sums_are_exact(house, 2)
    alike(house)
    assert len(shared) == 6
    assert all(update.noised for update in shared)
    for record in outcome.records.values():
        # Four records, two epochs in two rounds: every step has a new state. Two held-out ones are evaluated three times.
        assert {c.channel: c.releases for c in record.channels} == {"cut": 4 * 4 + 2 * 3, "gradient": 16, "update": 16}
        assert record.epsilon <= 1000
        assert record.regime == "step"


def test_a_client_that_vanishes_after_its_masked_vector_stays_in_the_sum(house, monkeypatch):
    """The other two finish with the exact sum of three; the lost one's masks are taken out of it."""
    given, send, contribute = {}, rounds_module._Line.say, ClientRound.contribute

    def keep(self, update, weight):
        clipped = contribute(self, update, weight)
        given[self.name] = self.contribution.copy()
        return clipped

    class Vanished(Exception):
        pass

    def vanish(line, message):
        send(line, message)
        if line._link.name == "carol" and message.stage == wire.MASKED:
            line._link._pipe._socket.socket.shutdown(2)
            raise Vanished

    monkeypatch.setattr(ClientRound, "contribute", keep)
    monkeypatch.setattr(rounds_module._Line, "say", vanish)
    core = house.core(house.job(rounds=1), policy_of())
    outcome = train_all(house, core, policy_of())
    assert set(outcome.errors) == {"carol"}
    assert isinstance(outcome.errors["carol"], Vanished)
    total = (sum(v.astype(np.uint64) for v in given.values()) % (1 << 32)).astype(np.uint32)
    for name in ("alice", "bob"):
        assert np.array_equal(np.load(house.root / name / "round-0.npz")["ring_sum"], total)
        assert outcome.records[name].survivors == (CLIENTS,)
    alike(house, ("alice", "bob"))
    assert (core.sums.finished, core.sums.aborted) == (1, 0)


def test_with_too_few_clients_every_one_is_told_and_nobody_gets_a_sum(house, monkeypatch):
    """Carol goes before her vector: two of three are below the floor."""
    send = rounds_module._Line.say

    class Vanished(Exception):
        pass

    def vanish(line, message):
        if line._link.name == "carol" and message.stage == wire.MASKED:
            raise Vanished
        send(line, message)

    monkeypatch.setattr(rounds_module._Line, "say", vanish)
    core = house.core(house.job(rounds=1), policy_of())
    outcome = train_all(house, core, policy_of())
    assert set(outcome.errors) == set(CLIENTS)
    for name in ("alice", "bob"):
        assert isinstance(outcome.errors[name], AggregationAborted)
        assert outcome.errors[name].exit_code == 5
        assert not list((house.root / name).glob("round-*.npz"))
    assert (core.sums.finished, core.sums.aborted) == (0, 1)
