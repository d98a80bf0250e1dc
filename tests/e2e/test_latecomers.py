"""Clients that come when rounds are over already, over TLS on loopback. The others' adapters are the oracle, and plain sums."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from securesplit.client import attempts, elastic
from securesplit.client import run as run_module
from securesplit.client.checkpoints import middle_of
from securesplit.client.client import Client
from securesplit.client.elastic import Elastic
from securesplit.client.run import Run, RunRecord, run_training
from securesplit.client.train import Trainer
from securesplit.privacy.ledger import Ledger
from securesplit.protocol.job import Job
from tests.e2e.house import CLIENTS, FROZEN, LAB, ROUND, Loopback, build_house, policy_of
from tests.e2e.test_rounds import adapters as adapters_of
from tests.e2e.test_rounds import alike

FOUR = (*CLIENTS, "dora")


@pytest.fixture
def four(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "_FIRST", 0.05)
    monkeypatch.setattr(attempts, "_LONGEST", 0.2)
    return build_house(tmp_path / "house", "dora")


def job_of(four, *, rounds=4, training=None, **sums) -> Job:
    fields = four.job(rounds=rounds, epochs=1).model_dump(mode="json", exclude_none=True)
    given = {
        "roster": FOUR,
        "threshold": 3,
        "stage_seconds": 2.0,
        "reconnect_seconds": 1.0,
        "attempts": 30,
        "late": "handover",
    }
    fields["sums"] |= given | sums
    fields["schedule"] |= {"checkpoints": 2}
    if training is not None:
        fields["training"] = {"straggler_seconds": 2.0, **training}
    return Job.model_validate(fields)


def core_of(four, job, policy):
    core = four.core(job, policy)
    core.sums._gathering._seconds = 3.0  # Ten times the stage's patience is too long for a test.
    return core


@dataclass
class Party:
    """Clients' runs, each in a thread of its own."""

    house: object
    policy: object
    loop: Loopback
    records: dict[str, RunRecord] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)
    threads: dict[str, threading.Thread] = field(default_factory=dict)

    def start(self, *names: str, resume: bool = False) -> None:
        for name in names:
            self.threads[name] = threading.Thread(target=self._one, args=(name, resume), daemon=True)
            self.threads[name].start()

    def _one(self, name: str, resume: bool) -> None:
        house = self.house
        run = Run(
            policy=self.policy, keys=house.keys / name, server=self.loop.url, data=house.data(f"{name}.jsonl", 6, seed=30 + FOUR.index(name)),
            out=house.root / name, held_out=2, limit=None, max_tokens=16, truth=None, alone=False,
            model=str(house.model), cache=house.root / "cache", resume=resume, patience=20.0,
        )  # fmt: skip
        try:
            self.records[name] = run_training(run, lambda *_: None)
        except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
            self.errors[name] = error

    def finish(self, seconds: float = 90) -> None:
        for thread in self.threads.values():
            thread.join(seconds)
        assert not any(thread.is_alive() for thread in self.threads.values())


def until(condition, seconds=40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def sums_are_exact(four, records) -> None:
    """Each opened sum is the plain sum of what its survivors put in, mod 2^32."""
    survivors = dict(enumerate(records["alice"].survivors))
    for number, names in survivors.items():
        files = {name: np.load(four.root / name / f"round-{number}.npz") for name in names}
        total = sum(f["contribution"].astype(np.uint64) for f in files.values()) % (1 << 32)
        assert all(np.array_equal(f["ring_sum"], total.astype(np.uint32)) for f in files.values())


@pytest.mark.parametrize("privacy", [LAB, FROZEN, ROUND], ids=["open", "frozen", "round"])
def test_one_that_comes_late_is_where_the_others_are(four, privacy):
    privacy = privacy.replace("releases = 3", "releases = 6").replace("releases = 2\n", "releases = 5\n")
    policy = policy_of(privacy)
    core = core_of(four, job_of(four), policy)
    with Loopback(core, four.keys) as loop:
        party = Party(four, policy, loop)
        party.start(*CLIENTS)
        until(lambda: core.sums.finished >= 1)
        party.start("dora")
        party.finish()
    assert party.errors == {}
    alike(four, FOUR)
    sums_are_exact(four, party.records)
    dora, alice = party.records["dora"], party.records["alice"]
    first = len(dora.missed)
    assert dora.missed == tuple(range(first))
    assert 1 <= first < 4
    assert dora.survivors == alice.survivors[first:] == (FOUR,) * (4 - first)
    assert alice.survivors[:first] == (CLIENTS,) * first
    assert len(dora.curve) == 4 - first + 1
    assert len(alice.curve) == 5
    # Its checkpoints name the same states of B as the others', where B learns.
    for number in (2, 3):
        named = {
            middle_of(four.root / name / f"round-{number}")
            for name in FOUR
            if (four.root / name / f"round-{number}").is_dir()
        }
        assert len(named) == 1
        assert (named != {""}) == (privacy is not FROZEN and "frozen" not in privacy)
    assert (four.root / "dora" / "round-3").is_dir()
    if privacy is not LAB and dora.epsilon is not None:
        ledger = Ledger(four.keys / "dora" / "ledger")
        ledger.verify()
        ledger.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapters", "training"),
    [
        ({}, {"mode": "client-batch"}),
        ({}, {"mode": "hierarchical", "every": 1}),
        ({}, {"mode": "splitfed-v1"}),
        ({}, {"mode": "splitfed-v2", "order": "roster", "personal": ["back"]}),
        ({"sharing": "share-a"}, {}),
        ({"sharing": "core"}, {}),
        ({"sharing": "naive", "inexact": True}, {}),
    ],
    ids=["client-batch", "hierarchical", "v1", "personal", "share-a", "core", "naive"],
)
def test_in_every_mode(four, adapters, training):
    policy, job = policy_of(LAB), job_of(four, training=training or None)
    job = Job.model_validate(
        {**(raw := job.model_dump(mode="json", exclude_none=True)), "adapters": raw["adapters"] | adapters}
    )
    core = core_of(four, job, policy)
    with Loopback(core, four.keys) as loop:
        party = Party(four, policy, loop)
        party.start(*CLIENTS)
        until(lambda: core.sums.finished >= 1)
        party.start("dora")
        party.finish()
    assert party.errors == {}
    found = {name: adapters_of(four, name) for name in FOUR}

    def own(key: str) -> bool:
        personal = bool(training.get("personal")) and key.startswith("back")
        return personal or ("lora_B" in key and "share-a" in adapters.values())

    for name in CLIENTS:
        assert all(torch.equal(found["dora"][key], found[name][key]) for key in found[name] if not own(key))
    assert party.records["dora"].missed[0] == 0
    assert party.records["alice"].survivors[-1] == FOUR


@pytest.mark.parametrize("lie", ["another key", "box", "nothing"])
def test_a_server_that_meddles_keeps_a_client_out_and_gives_it_nothing_false(four, monkeypatch, lie):
    policy = policy_of(LAB)
    core = core_of(four, job_of(four), policy)
    honest = core.sums.answers

    def meddles(name, message):
        if lie == "another key":
            message = message.model_copy(update={"key": bytes(31) + b"\x09"})
        box = bytearray(message.box.data)
        box[len(box) // 2] ^= 1
        return (
            message
            if lie != "box"
            else message.model_copy(update={"box": message.box.model_copy(update={"data": bytes(box)})})
        )

    def answers(name, message, now):
        return [] if lie == "nothing" else honest(name, meddles(name, message), now)

    monkeypatch.setattr(core.sums, "answers", answers)
    monkeypatch.setattr(elastic, "PATIENCE", 6.0)
    with Loopback(core, four.keys) as loop:
        party = Party(four, policy, loop)
        party.start(*CLIENTS)
        until(lambda: core.sums.finished >= 1)
        party.start("dora")
        party.finish()
    error = party.errors.pop("dora")
    assert error.code == "SS-6036"
    assert party.errors == {}
    alike(four, CLIENTS)
    assert party.records["alice"].survivors == (CLIENTS,) * 4


def test_one_that_was_away_for_rounds_comes_back(four, monkeypatch):
    policy = policy_of(LAB)
    core = core_of(four, job_of(four), policy)
    local, there = Trainer._local_steps, threading.Event()

    def dies(self, number, factor, start):
        if self._client.link.name == "dora" and number == 1 and not there.is_set():
            there.set()
            raise KeyboardInterrupt
        return local(self, number, factor, start)

    monkeypatch.setattr(Trainer, "_local_steps", dies)
    with Loopback(core, four.keys) as loop:
        party = Party(four, policy, loop)
        party.start(*FOUR)
        until(lambda: "dora" in party.errors)
        assert isinstance(party.errors.pop("dora"), KeyboardInterrupt)
        until(lambda: core.sums.finished >= 2)
        party.start("dora", resume=True)
        party.finish()
    assert party.errors == {}
    alike(four, FOUR)
    sums_are_exact(four, {"alice": party.records["alice"]})
    dora, alice = party.records["dora"], party.records["alice"]
    assert dora.missed[0] == 1
    assert alice.survivors[0] == FOUR
    assert alice.survivors[1] == CLIENTS
    assert alice.survivors[-1] == FOUR


@pytest.mark.parametrize("privacy", [LAB, ROUND], ids=["open", "round"])
def test_one_that_was_away_in_the_middle_of_a_round_pays_nothing_for_its_rest(four, monkeypatch, privacy):
    privacy = privacy.replace("releases = 3", "releases = 6").replace("releases = 2\n", "releases = 5\n")
    policy = policy_of(privacy)
    job = job_of(four).model_dump(mode="json", exclude_none=True)
    core = core_of(four, Job.model_validate(job | {"schedule": job["schedule"] | {"batch": 2}}), policy)
    step, caught_up, events, paid = Client.step, Elastic.caught_up, [], []

    def spent() -> int:
        if privacy == LAB:
            return 0
        with closing(Ledger(four.keys / "dora" / "ledger")) as ledger:
            return ledger.spent_units()

    def dies(self, batch, **named):
        if self.link.name == "dora" and named["at"] == 3:  # Two batches to a round: the second round, half done.
            events.append("step")
            if len(events) == 1:
                raise KeyboardInterrupt
        return step(self, batch, **named)

    def helped(self):
        done = caught_up(self)
        if done and self._client.link.name == "dora":
            events.append("helped")
            paid.append(spent())
        return done

    monkeypatch.setattr(Client, "step", dies)
    monkeypatch.setattr(Elastic, "caught_up", helped)
    with Loopback(core, four.keys) as loop:
        party = Party(four, policy, loop)
        party.start(*FOUR)
        until(lambda: "dora" in party.errors)
        assert isinstance(party.errors.pop("dora"), KeyboardInterrupt)
        before = spent()
        until(lambda: core.sums.finished >= 2)
        party.start("dora", resume=True)
        party.finish()
    assert party.errors == {}
    alike(four, FOUR)
    assert party.records["dora"].missed[0] == 1
    assert events[:2] == ["step", "helped"]
    assert paid[0] == before


def test_one_that_is_killed_right_after_it_was_helped_on_goes_on(four, monkeypatch):
    policy = policy_of(LAB)
    core = core_of(four, job_of(four, rounds=5), policy)
    looks, killed = Trainer._evaluate, threading.Event()

    def dies(self):
        loss = looks(self)
        if self._client.link.name == "dora" and not killed.is_set():
            killed.set()
            raise KeyboardInterrupt  # Its answers are on disk, and nothing that came after.
        return loss

    monkeypatch.setattr(Trainer, "_evaluate", dies)
    with Loopback(core, four.keys) as loop:
        party = Party(four, policy, loop)
        party.start(*CLIENTS)
        until(lambda: core.sums.finished >= 1)
        party.start("dora")
        until(lambda: "dora" in party.errors)
        assert isinstance(party.errors.pop("dora"), KeyboardInterrupt)
        party.start("dora", resume=True)
        party.finish()
    assert party.errors == {}
    alike(four, FOUR)
    assert party.records["dora"].missed[0] == 0


def test_a_round_that_went_on_without_its_update_counts_once_for_the_rate(four, monkeypatch):
    policy = policy_of(LAB)
    core = core_of(four, job_of(four), policy)
    summed, run, moves = Trainer._summed, Trainer.run, {}

    def slow(self, number, *rest):
        if self._client.link.name == "dora" and number == 1:
            until(lambda: core.sums.finished >= 2)
        return summed(self, number, *rest)

    def noted(self):
        trained = run(self)
        moves[self._client.link.name] = self._at.moves / len(self._batches)
        return trained

    monkeypatch.setattr(Trainer, "_summed", slow)
    monkeypatch.setattr(Trainer, "run", noted)
    with Loopback(core, four.keys) as loop:
        party = Party(four, policy, loop)
        party.start(*FOUR)
        party.finish()
    assert party.errors == {}
    alike(four, FOUR)
    assert party.records["dora"].missed[0] == 1
    assert moves == dict.fromkeys(FOUR, 4.0)


def test_a_quorum_that_is_lost_is_regained_by_two_who_lost_everything(four, monkeypatch):
    policy = policy_of(LAB)
    core = core_of(four, job_of(four), policy)
    local, died = Trainer._local_steps, set()

    def dies(self, number, factor, start):
        name = self._client.link.name
        if name in ("carol", "dora") and number == 2 and name not in died:
            died.add(name)
            raise KeyboardInterrupt
        return local(self, number, factor, start)

    monkeypatch.setattr(Trainer, "_local_steps", dies)
    with Loopback(core, four.keys) as loop:
        party = Party(four, policy, loop)
        party.start(*FOUR)
        until(lambda: {"carol", "dora"} <= set(party.errors))
        for name in ("carol", "dora"):
            party.threads[name].join(30)
            assert isinstance(party.errors.pop(name), KeyboardInterrupt)
            shutil.rmtree(four.root / name)
        party.start("carol", "dora")
        party.finish()
    assert party.errors == {}
    alike(four, FOUR)
    for name in ("carol", "dora"):
        assert party.records[name].missed == (0, 1)
        assert party.records[name].survivors == (FOUR, FOUR)


def test_one_that_comes_after_the_last_round_takes_what_all_have(four, monkeypatch):
    policy = policy_of(LAB)
    core = core_of(four, job_of(four, rounds=2), policy)
    losses, there = run_module.held_out_losses, threading.Event()

    def waits(client, held_out):  # The others are still at their last figures.
        if client.link.name in CLIENTS:
            deadline = time.monotonic() + 30
            while not there.is_set() and time.monotonic() < deadline:
                client.loss(held_out[0])
                time.sleep(0.1)
        else:
            there.set()
        return losses(client, held_out)

    monkeypatch.setattr(run_module, "held_out_losses", waits)
    with Loopback(core, four.keys) as loop:
        party = Party(four, policy, loop)
        party.start(*CLIENTS)
        until(lambda: core.sums.finished >= 2 and core.sums._ending.number == 1 and not core.sums._ending.open)
        party.start("dora")
        party.finish()
    assert party.errors == {}
    alike(four, FOUR)
    dora = party.records["dora"]
    assert (dora.missed, dora.survivors, dora.steps, len(dora.curve)) == ((0, 1), (), 0, 1)
