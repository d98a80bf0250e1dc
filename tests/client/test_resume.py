"""A run that is killed again and again ends as one that was never touched: adapters to the bit, each release paid once.

The oracle is the run without a crash, and for the ledger what reached the server.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from securesplit.client import memory
from securesplit.client.memory import Remembered
from securesplit.client.noted import Meters
from securesplit.client.position import RoundRecord
from securesplit.client.resume import clean, is_finished, ready
from securesplit.client.run import _TruthWriter
from securesplit.client.train import Trainer
from securesplit.data.corpus import Record
from securesplit.errors import InputError
from securesplit.kept.folder import Facts, Kept
from securesplit.privacy import mechanism
from securesplit.privacy.ledger import Ledger
from securesplit.protocol.messages import Blob, Bye, Forward
from securesplit.runs.metrics import Metrics, read_metrics
from tests.client.test_regimes import STEP, with_releases
from tests.e2e.house import FROZEN, LAB, ROUND, policy_of, sentences
from tests.e2e.wreck import Wreck, dangerous

TEXTS = sentences(6, seed=5)
PRIVATE = {
    "frozen": FROZEN,
    "round": with_releases(ROUND, 9, 9, 9),
    "step": with_releases(STEP, 9, 9, 9),
}


@pytest.fixture
def wrecks(house, tmp_path, monkeypatch):
    """Makes runs, with a moment before and after everything that lasts."""
    made: list[Wreck] = []

    def make(policy, crashes=lambda _n: False, **options):
        job = house.job(rounds=2, epochs=options.pop("epochs", 1), blind=not policy.unsafe)
        made.append(Wreck.__new__(Wreck))
        made[-1].moments, made[-1].crashes = 0, crashes
        made[-1].__init__(house, job, policy, TEXTS, tmp_path / f"run{len(made)}", crashes, **options)
        return made[-1]

    with dangerous(monkeypatch, lambda: made[-1]):
        yield make
    for wreck in made:
        wreck._kept.close()


def quiet(monkeypatch):
    """Noise that depends on nothing but what it covers, so that two runs can be compared."""

    def like(rows):
        seed = int.from_bytes(hashlib.sha256(rows.numpy().tobytes()).digest()[:7], "little")
        return torch.randint(-50, 51, rows.shape, generator=torch.Generator().manual_seed(seed), dtype=rows.dtype)

    monkeypatch.setattr(mechanism, "discrete_gaussian_like", like)
    monkeypatch.setattr(
        "securesplit.privacy.gate.discrete_gaussian", lambda shape: np.arange(np.prod(shape)).reshape(shape) % 17
    )


def now_and_then(seed, one_in=30):
    """Dies at moments that nobody foresees, and that are the same in every run of the test."""
    dice = random.Random(seed)
    return lambda _n: dice.random() < 1 / one_in


def outcome(wreck):
    trained, _ = wreck.run()
    return wreck.adapters(), trained.curve, [r.losses for r in trained.rounds], trained.steps


@pytest.mark.parametrize("seed", range(4))
def test_a_run_that_dies_all_the_time_ends_as_one_that_does_not(wrecks, seed):
    policy = policy_of(LAB)
    calm = wrecks(policy, epochs=2)
    expected = outcome(calm)
    wreck = wrecks(policy, now_and_then(seed), epochs=2)
    assert outcome(wreck) == expected
    assert wreck.deaths > 2
    assert wreck.server_deaths > 2
    assert all(len(payloads) == 1 for payloads in wreck.releases().values()), "a step number had two contents"
    assert wreck.releases() == calm.releases()
    assert wreck.core.steps.taken == calm.core.steps.taken, "a step was learnt twice"
    assert wreck.rows() == calm.rows(), "a row stands there twice, or not at all"


def test_a_run_that_an_earlier_release_began_goes_on(wrecks, monkeypatch):
    whole = memory._Note.model_dump_json
    monkeypatch.setattr(memory._Note, "model_dump_json", lambda note: whole(note, exclude={"missed", "looked"}))
    policy = policy_of(LAB)
    expected = outcome(wrecks(policy, epochs=2))
    wreck = wrecks(policy, now_and_then(0), epochs=2)
    assert outcome(wreck) == expected
    assert wreck.deaths > 2


@pytest.mark.parametrize("regime", sorted(PRIVATE))
def test_a_private_run_that_dies_pays_for_each_release_once(wrecks, regime):
    """What reached the server is what the ledger says, entry by entry; no number of a step had two contents."""
    policy = policy_of(PRIVATE[regime])
    calm = wrecks(policy)
    calm.run()
    wreck = wrecks(policy, now_and_then(len(regime), 25))
    wreck.run()
    assert wreck.deaths > 2
    assert wreck.server_deaths > 0
    assert all(len(payloads) == 1 for payloads in wreck.releases().values())
    assert wreck.releases().keys() == calm.releases().keys()
    ledgers = [Ledger(run.folder / "ledger", anchors=run.folder / "anchors") for run in (calm, wreck)]
    counts = [Counter(entry.channel for entry in ledger.entries()) for ledger in ledgers]
    paid = {entry.payload for entry in ledgers[1].entries()}
    assert counts[0] == counts[1], "a crash was paid for"
    assert ledgers[0].spent_units() == ledgers[1].spent_units()
    sent = {hashlib.sha256(block).hexdigest() for block in wreck.blocks()}
    updates = {hashlib.sha256(vector).hexdigest() for vector in wreck.given}
    assert sent <= paid
    if regime == "round":
        assert updates <= paid
    assert paid == sent | {
        entry.payload for entry in ledgers[1].entries() if entry.channel in {"update", "peers", "bare"}
    }
    for ledger in ledgers:
        ledger.verify()
        ledger.close()


@pytest.mark.parametrize("regime", sorted(PRIVATE))
def test_a_private_run_that_dies_has_the_same_adapters_under_the_same_noise(wrecks, monkeypatch, regime):
    quiet(monkeypatch)
    policy = policy_of(PRIVATE[regime])
    expected = outcome(wrecks(policy))
    wreck = wrecks(policy, now_and_then(3 * len(regime), 25))
    assert outcome(wreck) == expected
    assert wreck.deaths + wreck.server_deaths > 4


def test_a_new_run_does_not_take_an_unfinished_ones_place(tmp_path):
    out, facts = tmp_path / "out", Facts(party="alice", job="j", model="m", policy="p")
    assert not is_finished(out)
    assert ready(out, resume=False) == ready(out, resume=True) == (out / "state", False)
    kept = Kept.open(out / "state", facts)
    with pytest.raises(InputError, match="interrupted") as caught:
        ready(out, resume=False)
    assert caught.value.code == "SS-1290"
    place, goes_on = ready(out, resume=True)
    assert place.is_dir()
    assert goes_on
    kept.finish("done")
    kept.close()
    assert is_finished(out)
    place, goes_on = ready(out, resume=False)
    assert place.exists(), "nothing is lost before the new run begins"
    assert not goes_on, "what a finished run left is not gone on with"
    assert not clean(out / "state").exists(), "a finished run makes room"


@pytest.mark.parametrize("cut", range(0, 140, 9))
def test_a_truth_file_that_a_crash_cut_anywhere_is_made_whole(tmp_path, cut):
    records = tuple(Record(text=f"text {i}", pii=()) for i in range(4))

    def batch(*sources):
        rows = torch.zeros(len(sources), 4, dtype=torch.int64)
        return SimpleNamespace(sources=sources, lengths=(4,) * len(sources), tokens=rows)

    steps = [batch(0, 1), batch(2, 3), batch(1, 0)]
    path = tmp_path / "truth"
    whole = _TruthWriter(path, records)
    for number, step in enumerate(steps):
        whole(number, step)
    expected = path.read_bytes()  # Before it is closed: a process that is killed closes nothing.
    whole.close()
    path.write_bytes(expected[: len(expected) - cut])
    again = _TruthWriter(path, records, resume=True)
    again(2, steps[2])  # Whose lines were cut, so that it was under way.
    again.close()
    assert path.read_bytes() == expected


def test_a_run_whose_requests_are_others_than_before_stops(wrecks):
    wreck = wrecks(policy_of(LAB), lambda n: n == 60)
    request = Forward(step=0, lengths=(1,), learn=True, hidden=Blob(dtype="f32", shape=(1, 1), data=bytes(4)))
    kept = Kept.open(wreck.folder / "other", Facts(party="a", job="j", model="m", policy="p"))
    Remembered(kept).keep(request, Bye())
    kept.close()
    kept = Kept.open(wreck.folder / "other", Facts(party="a", job="j", model="m", policy="p"))
    with pytest.raises(InputError) as caught:
        Remembered(kept).recall(request.model_copy(update={"step": 1}))
    assert caught.value.code == "SS-1294"
    kept.close()


def _sum(value):
    words = np.full(40, value, dtype=np.uint32)
    return RoundRecord(
        number=0, losses=(1.0,), survivors=("alice",), total_weight=3, contribution=words, ring_sum=words + 1
    )


def _kept(path):
    return Kept.open(path, Facts(party="a", job="j", model="m", policy="p"))


def test_a_sum_that_no_snapshot_names_gives_way_to_the_next_life_s(tmp_path):
    """Between a sum's file and its snapshot a crash lets the round be entered again, and another sum may come."""
    kept = _kept(tmp_path / "s")
    Remembered(kept)._write_round(_sum(1))
    again = Remembered(kept)
    again._write_round(_sum(5))
    said = memory._Round(number=0, losses=[1.0], survivors=["alice"], total_weight=3, residual=None)
    assert again._read_round(said).ring_sum.tolist() == [6] * 40
    kept.close()


@pytest.mark.parametrize("named", [True, False])
def test_a_sum_s_file_that_was_cut_or_changed_or_is_another_run_s_is_refused(tmp_path, named):
    kept = _kept(tmp_path / "s")
    writer = Remembered(kept)
    writer._write_round(_sum(1))
    path = tmp_path / "s" / "round-0.npz"
    whole = path.read_bytes()
    said = memory._Round(
        number=0, losses=[1.0], survivors=["alice"], total_weight=3, residual=None,
        sha256=writer._sums[0] if named else "",
    )  # fmt: skip
    dice = random.Random(0)
    spoilt = [whole[:size] for size in range(0, len(whole), 7)]
    for _ in range(150):
        at = dice.randrange(len(whole))
        spoilt.append(whole[:at] + bytes([whole[at] ^ (1 << dice.randrange(8))]) + whole[at + 1 :])
    if named:
        Remembered(kept)._write_round(_sum(9))
        spoilt.append(path.read_bytes())
    for data in spoilt:
        path.write_bytes(data)
        code, found = "", None
        try:
            found = Remembered(kept)._read_round(said)
        except InputError as error:
            code = error.code
        # Without a name a bit that says nothing may turn, such as a time.
        assert code == "SS-1292" or (not named and found is not None and found.ring_sum.tolist() == [2] * 40)
    path.write_bytes(whole)
    assert Remembered(kept)._read_round(said).contribution.tolist() == [1] * 40
    kept.close()


@pytest.mark.parametrize("seed", range(3))
def test_the_metrics_of_a_run_that_dies_are_those_of_one_that_does_not(wrecks, tmp_path, monkeypatch, seed):
    """No row twice and none missing; bytes count what went over the wire, each byte once."""
    made = []

    def trainer(client, *args, memory, metrics, **options):  # In place of the wreck's own, which meter nothing.
        folder = tmp_path / f"metrics{len(made)}"
        folder.mkdir(exist_ok=True)
        after, looks = memory.resumes_at, memory.looks
        metrics = Metrics(folder, Meters(client), after=after, looks=looks)
        write = metrics._write

        def row(*said):
            write(*said)
            wreck.moment()  # Between a row and whatever comes next somebody may die, too.

        monkeypatch.setattr(metrics, "_write", row)
        inner = Trainer(client, *args, memory=memory, metrics=metrics, **options)

        def run():
            try:
                return inner.run()
            finally:
                metrics.close()

        return SimpleNamespace(run=run)

    monkeypatch.setattr("tests.e2e.wreck.Trainer", trainer)
    rows, up = [], []
    for crashes in (lambda _n: False, now_and_then(seed, 25)):
        wreck = wrecks(policy_of(LAB), crashes, epochs=2)
        wreck.run()
        rows.append(read_metrics(tmp_path / f"metrics{len(made)}").rows)
        up.append(wreck.client.link.bytes_up)
        made.append(wreck)
    assert made[1].deaths > 2
    calm, dead = ([(r.kind, r.step, r.round, r.loss) for r in held] for held in rows)
    assert dead == calm
    for held, total in zip(rows, up, strict=True):
        counted = [row.bytes_up for row in held]
        assert counted == sorted(counted)
        assert 0 < counted[-1] <= total
