"""What a run leaves on its way: the last rounds' adapters, each with the name of the B that belongs to them."""

from __future__ import annotations

import random

import pytest
import torch

from securesplit.client.checkpoints import keep_round, middle_of, round_folder, save_adapters
from securesplit.client.pace import Pace
from securesplit.client.selection import matching
from securesplit.errors import InputError
from securesplit.protocol.job import Job
from securesplit.protocol.messages import Mark
from securesplit.transport.memory import MemoryServer
from tests.e2e.house import FROZEN, LAB, batches_of, policy_of, sentences
from tests.e2e.wreck import Wreck, dangerous


def job_of(house, *, training=None, blind: bool = False, **schedule) -> Job:
    raw = house.job(rounds=3, epochs=1, blind=blind).model_dump(mode="json", exclude_none=True)
    raw["schedule"] |= {"checkpoints": 2, **schedule}
    return Job.model_validate(raw | ({"training": training} if training else {}))


def test_a_job_that_keeps_none_has_the_digest_that_it_had_and_marks_nothing(house, tmp_path):
    job = house.job(blind=False)
    assert "checkpoints" not in job.canonical()
    assert job_of(house).digest != job_of(house, checkpoints=3).digest
    client, spy, _ = house.joined(job, policy_of())
    keep_round(client, tmp_path, 0)
    assert client.mark() == ""
    assert not list(tmp_path.glob("round-*"))
    assert spy.messages(Mark) == []


def test_where_b_is_frozen_rounds_are_kept_and_the_server_is_asked_nothing(house, tmp_path, open_ledger):
    client, spy, _ = house.joined(job_of(house, blind=True), policy_of(FROZEN), ledger=open_ledger())
    for number in range(4):
        (tmp_path / f"round-{number}-00.record").touch()
        keep_round(client, tmp_path, number)
    assert [path.name for path in matching(str(tmp_path / "round-*"))] == ["round-2", "round-3"]
    assert middle_of(tmp_path / "round-3") == ""
    assert len(list(tmp_path.glob("*.record"))) == 4
    assert spy.messages(Mark) == []


def test_a_checkpoint_s_parts_belong_to_one_state(house, tmp_path):
    client, _, _ = house.joined(job_of(house), policy_of())
    assert middle_of(tmp_path) == ""
    save_adapters(tmp_path, client, "ab" * 32)
    assert middle_of(tmp_path) == "ab" * 32
    other = tmp_path / "other"
    other.mkdir()
    save_adapters(other, client, "cd" * 32)
    (tmp_path / "adapter-front.safetensors").write_bytes((other / "adapter-front.safetensors").read_bytes())
    with pytest.raises(InputError, match="SS-1305"):
        middle_of(tmp_path)


def test_folders_without_adapters_are_no_checkpoints_and_neither_is_what_a_crash_left(house, tmp_path):
    client, _, _ = house.joined(job_of(house), policy_of())
    for name in ("round-10", "round-9", "best", ".round-8.0123.tmp"):
        (tmp_path / name).mkdir()
        save_adapters(tmp_path / name, client)
    for name in ("state", "tensorboard"):
        (tmp_path / name).mkdir()
    assert [path.name for path in matching(str(tmp_path / "*"))] == ["best", "round-9", "round-10"]


def test_the_best_keeps_the_name_of_its_b(house):
    client, _, core = house.joined(job_of(house, keep_best=True), policy_of())
    pace = Pace(client, lambda: 0.0)
    pace.saw(0, 2.0)
    first = pace.best.middle
    assert len(first) == 64
    client.train("both")
    client.step(batches_of(client, sentences(4, seed=1))[0])
    pace.saw(1, 3.0)
    assert pace.best.middle == first
    pace.saw(2, 1.0)
    assert pace.best.middle not in ("", first)
    again = Pace(client, lambda: 0.0)
    again.restore(pace.state())
    assert again.best.middle == pace.best.middle
    assert core.former.find(bytes.fromhex(first)) is None, "one best at a time"


def test_a_state_is_asked_for_anew_over_another_connection(house):
    core = house.core(job_of(house), policy_of())
    server = MemoryServer(core)
    link, _ = house.link(server, policy_of())
    client = house.client(link, policy_of())
    batch = batches_of(client, sentences(4, seed=1))[0]
    name, before = client.mark(1), client.loss(batch)
    client.train("both")
    client.step(batch)
    client.train(None)
    client.reset()
    after = client.loss(batch)
    assert after != before
    client.link.use(bytes.fromhex(name))
    assert client.loss(batch) == before
    link.redial = lambda _within: house.link(server, policy_of())[0]
    link.lasting = 5.0
    link._pipe.close()
    assert client.loss(batch) == before
    assert link.sessions == 2


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_dies_leaves_the_checkpoints_of_one_that_does_not(house, tmp_path, monkeypatch, seed):
    """Client and server die; names, adapters and kept states are those of the calm run."""
    job = job_of(house, training={"mode": "splitfed-v3", "every": 2}, keep_best=True, evaluate_every=2)
    # Nobody else is there: the means are of one copy.
    job = job.model_copy(update={"sums": job.sums.model_copy(update={"roster": ("alice",)})})
    made: list[Wreck] = []

    def outcome(name, crashes):
        made.append(Wreck.__new__(Wreck))
        made[-1].moments, made[-1].crashes = 0, crashes
        folder = tmp_path / name
        made[-1].__init__(house, job, policy_of(LAB), sentences(6, seed=5), folder, crashes, records=folder)
        trained, _ = made[-1].run()
        names = [middle_of(round_folder(folder, number)) for number in (1, 2)]
        states = made[-1].core.former
        kept = [states.find(bytes.fromhex(name)) for name in (*names, trained.best.middle)]
        assert all(values is not None for values in kept)
        files = [p.read_bytes() for n in (1, 2) for p in sorted(round_folder(folder, n).iterdir())]
        assert not round_folder(folder, 0).exists()
        assert len(list((folder / "server" / "former").glob("*.safetensors"))) <= 3
        return names, trained.best.middle, files

    dice = random.Random(seed)
    with dangerous(monkeypatch, lambda: made[-1]):
        calm = outcome("calm", lambda _n: False)
        wild = outcome("wild", lambda _n: dice.random() < 1 / 25)
    assert wild == calm
    assert made[1].deaths > 1
    assert made[1].server_deaths > 0
    for wreck in made:
        wreck._kept.close()
    assert torch.is_grad_enabled()
