"""Whole training runs whose server is killed inside a secure sum, while the clients' processes live on.

Regime ``frozen``: B never learns, and every record's released rows are in the ledger; so a run that is disturbed must end with the
very adapters of one that is not, and with the ledger that it began with.
"""

from __future__ import annotations

import threading
from contextlib import closing

import numpy as np
import pytest

from securesplit.aggregate.answered import AnswerLog
from securesplit.client.train import Trainer
from securesplit.privacy.ledger import Ledger
from tests.e2e.house import CLIENTS, SILENT, batches_of, build_house, policy_of, sentences
from tests.e2e.lives import World, quick
from tests.e2e.test_lives import named

POLICY = policy_of(SILENT)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("house"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    quick(monkeypatch)


class Training(World):
    """The same world, with whole trainers in it."""

    def life(self, name, disk) -> None:
        ledger = Ledger(self.house.root / f"{name}.ledger")
        with closing(ledger), closing(AnswerLog(self.folder / f"{name}.log")) as answers:
            client = self.house.client(self.dialled(name), self.policy, ledger)
            batches = batches_of(client, sentences(8, seed=len(name)))
            held_out = batches_of(client, sentences(4, seed=9))
            told = self.told.setdefault(name, [])
            trainer = Trainer(client, batches, held_out, answers=answers, progress=lambda what, *_: told.append(what))
            self.trained[name] = trainer.run()
            self.adapters[name] = client.read()
            self.paid[name] = list(ledger.entries())
            client.link.close()


def trained(house, folder, on=lambda *_: None) -> Training:
    folder.mkdir()
    job = house.job(rounds=2, epochs=1)
    job = job.model_copy(update={"sums": job.sums.model_copy(update={"attempts": 20, "quorum": 3})})
    scene = Training(house, job, POLICY, folder)
    scene.trained, scene.adapters, scene.paid, scene.told = {}, {}, {}, {}
    scene.on = lambda *what: on(scene, *what)
    scene.run(*CLIENTS)
    assert scene.errors == {}
    return scene


def test_a_server_that_is_killed_inside_sums_changes_nothing_of_what_is_learnt_or_paid(house, tmp_path):
    calm = trained(house, tmp_path / "calm")
    due = [("sent", "masked"), ("read", "unmask"), ("sent", "kept")]
    lock = threading.Lock()

    def kill(scene, name, at, message):
        with lock:
            now = name == "bob" and message is not None and due and (at, named(message)) == due[0]
            if now:
                due.pop(0)
        if now:
            scene.restart()

    wild = trained(house, tmp_path / "wild", kill)
    assert due == []
    for name in CLIENTS:
        assert np.array_equal(wild.adapters[name], calm.adapters[name])
        assert wild.trained[name].curve == calm.trained[name].curve
        assert len(wild.paid[name]) == len(calm.paid[name])
        assert [r.survivors for r in wild.trained[name].rounds] == [CLIENTS, CLIENTS]
    assert np.array_equal(calm.adapters["alice"], calm.adapters["carol"])
    assert any(
        "secure sum, waits for" in what and "the roster" not in what for told in wild.told.values() for what in told
    )
