"""Killed anywhere, starved of disk, or raced by others: what came out is paid, once, and comes out the same again.

The oracle is what the processes wrote after ``charge`` had returned, as a recording proxy would.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from securesplit.privacy.ledger import Charge, Ledger

# One interpreter imports once and forks a child per line of its input, so that a hundred deaths take seconds.
NURSERY = """
import os, random, resource, signal, sys, traceback
from pathlib import Path
from securesplit.errors import SecureSplitError
from securesplit.privacy import anchor, custody
from securesplit.privacy.chain import Chain
from securesplit.privacy.ledger import Charge, Ledger
from securesplit.privacy.memo import Memo

root = Path(sys.argv[1])

def charge(ledger, record, version, payload, cap=10_000):
    charge = Charge(record, "cut", 1, 1.0, 2.0, "p", version=version, payload=payload)
    return ledger.charge([charge], budget=10**9, caps=[cap])[0]

def spend(_):
    out = os.open(root / "wire", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    ledger = Ledger(root / "ledger", anchors=root / "state")
    while True:
        version = random.choice(["", f"v{random.randrange(60)}"])
        group = [Charge(r, "cut", 1, 1.0, 2.0, "p", version=version, payload=os.urandom(3000)) for r in "ab"]
        for c, sent in zip(group, ledger.charge(group, budget=10**9, caps=[10_000] * 2)):
            os.write(out, f"\\n{c.record} {version or '-'} {sent.hex()} .\\n".encode())

def race(number):
    ledger = Ledger(root / "ledger", anchors=root / "state")
    out = open(root / f"race-{number}", "w")
    for i in random.sample(range(30), 30):
        try:
            print(i, charge(ledger, "r", f"v{i}", os.urandom(500), cap=7).hex(), file=out)
        except SecureSplitError as error:
            print(i, error.code, file=out)
    out.close()

def starve(_):
    ledger = Ledger(root / "ledger", anchors=root / "state")
    log = (root / "ledger" / "ledger.sqlite-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (log + 40_000, resource.RLIM_INFINITY))
    said = []
    for size in (200_000, 1000):
        try:
            said.append(charge(ledger, "r", f"big{size}", bytes(size)).hex())
        except SecureSplitError as error:
            said.append(error.code)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said.append(charge(ledger, "r", "after", b"after").decode())
    (root / "starved").write_text(" ".join(said))

def die(point):
    def end(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    ledger = None if point.startswith("opening") else Ledger(root / "ledger", anchors=root / "state")
    owner, name = {
        "append": (Chain, "append"), "keep": (Memo, "keep"), "commit": (anchor.Anchors, "write"),
        "draft": (Path, "replace"), "rename": (anchor, "sync_folder"),
    }[point.removeprefix("opening-")]
    setattr(owner, name, end)
    ledger = ledger or Ledger(root / "ledger", anchors=root / "state")
    (root / "out").write_bytes(charge(ledger, "r", "v", b"first"))

for line in sys.stdin:
    job, argument = line.split()
    child = os.fork()
    if child == 0:
        try:
            {"spend": spend, "race": race, "starve": starve, "die": die}[job](argument)
        except BaseException:
            (root / "faults").write_text(traceback.format_exc())
        finally:
            os._exit(0)
    print(child, flush=True)
    if job != "spend":
        print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture
def nursery(tmp_path):
    """``nursery()`` gives a function ``start(job, argument)``, which gives a child's process id."""
    started = []

    def another():
        command = [sys.executable, "-c", NURSERY, str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)

        def start(job, argument="-"):
            process.stdin.write(f"{job} {argument}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        start.status = lambda: int(process.stdout.readline())
        return start

    yield another
    for process in started:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=60)
    assert not (tmp_path / "faults").exists(), (tmp_path / "faults").read_text()


def wire(root: Path) -> list[tuple[str, str, bytes]]:
    """Whole lines only: a child may have died while it wrote one."""
    path = root / "wire"
    lines = path.read_text().split("\n") if path.exists() else []
    found = []
    for line in lines:
        if not line.endswith(" ."):
            continue
        record, version, payload, _ = line.split()
        found.append((record, "" if version == "-" else version, bytes.fromhex(payload)))
    return found


def check(root: Path) -> None:
    (anchor,) = list((root / "state").glob("*.json")) or [None]
    anchored = json.loads(anchor.read_text())["seq"] if anchor else 0
    ledger = Ledger(root / "ledger", anchors=root / "state")
    sent = wire(root)
    paid = {e.payload: e for e in ledger.entries()}
    first: dict[tuple[str, str], bytes] = {}
    for record, version, payload in sent:
        entry = paid[hashlib.sha256(payload).hexdigest()]  # nothing came out that was not paid
        assert (entry.record, entry.version) == (record, version)
        assert entry.seq <= anchored
        if version:
            assert first.setdefault((record, version), payload) == payload  # the same bytes, whoever asked
            assert ledger.recall(record, "cut", version) == payload
    once = Counter((e.record, e.version) for e in ledger.entries() if e.version)
    assert set(once.values()) <= {1}  # nothing was charged twice
    assert ledger.spent_units("a") == ledger.spent_units("b") == len(paid) / 2  # groups are whole
    ledger.verify()
    ledger.close()


def kill_often(root: Path, start, deaths: int, *, together: int = 1, seed: int = 0) -> None:
    chance, alive = random.Random(seed), []
    for _ in range(deaths):
        while len(alive) < together:
            alive.append(start("spend"))
        time.sleep(chance.uniform(0.0, 0.12))
        os.kill(alive.pop(chance.randrange(together)), signal.SIGKILL)
        if together == 1:
            check(root)
    for child in alive:
        os.kill(child, signal.SIGKILL)
    check(root)
    assert len(wire(root)) > deaths  # or the children died before they did anything


def test_killed_25_times_the_ledger_knows_all_that_came_out_and_charged_nothing_twice(tmp_path, nursery):
    kill_often(tmp_path, nursery(), 25)


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 3])
def test_killed_100_times_the_ledger_knows_all_that_came_out(tmp_path, nursery, together):
    kill_often(tmp_path, nursery(), 100, together=together, seed=together)


@pytest.mark.parametrize("point", ["append", "keep", "commit", "draft", "rename"])
def test_a_death_at_each_step_of_a_charge_leaves_all_of_it_or_nothing(tmp_path, nursery, point):
    Ledger(tmp_path / "ledger", anchors=tmp_path / "state").close()
    start = nursery()
    start("die", point)
    assert start.status() == signal.SIGKILL
    assert not (tmp_path / "out").exists()  # nothing leaves before all is on disk
    ledger = Ledger(tmp_path / "ledger", anchors=tmp_path / "state")
    whole = point not in {"append", "keep"}
    assert ledger.recall("r", "cut", "v") == (b"first" if whole else None)
    assert ledger.spent_units() == whole
    again = Charge("r", "cut", 1, 1.0, 2.0, "p", version="v", payload=b"second")
    assert ledger.charge([again], budget=1, caps=[1]) == (b"first" if whole else b"second",)
    ledger.verify()
    ledger.close()


@pytest.mark.parametrize("point", ["commit", "draft", "rename"])
def test_a_death_while_a_ledger_is_made_leaves_one_that_can_be_used(tmp_path, nursery, point):
    start = nursery()
    start("die", f"opening-{point}")
    assert start.status() == signal.SIGKILL
    ledger = Ledger(tmp_path / "ledger", anchors=tmp_path / "state")
    ledger.charge([Charge("r", "cut", 1, 1.0, 2.0, "p")], budget=1, caps=[1])
    ledger.close()
    Ledger(tmp_path / "ledger", anchors=tmp_path / "state").close()


def test_processes_that_race_for_one_record_agree_on_the_bytes_and_keep_its_cap(tmp_path, nursery):
    starts = [nursery() for _ in range(4)]
    for number, start in enumerate(starts):
        start("race", number)
    for start in starts:
        assert start.status() == 0
    said: dict[str, set[str]] = defaultdict(set)
    for number in range(4):
        for line in (tmp_path / f"race-{number}").read_text().splitlines():
            version, answer = line.split()
            said[version].add(answer)
    bought = {v: answers - {"SS-5002"} for v, answers in said.items() if answers != {"SS-5002"}}
    assert len(said) == 30
    assert len(bought) == 7
    assert all(len(answers) == 1 for answers in bought.values())
    ledger = Ledger(tmp_path / "ledger", anchors=tmp_path / "state")
    assert ledger.spent_units("r") == 7
    assert {v: {ledger.recall("r", "cut", f"v{v}").hex()} for v in bought} == bought
    ledger.verify()
    ledger.close()


def test_a_disk_that_fills_up_lets_nothing_out_and_is_usable_when_it_has_room(tmp_path, nursery):
    before = Ledger(tmp_path / "ledger", anchors=tmp_path / "state")
    before.charge([Charge("r", "cut", 1, 1.0, 2.0, "p")], budget=10, caps=[10])
    start = nursery()
    start("starve")
    assert start.status() == 0
    first, second, after = (tmp_path / "starved").read_text().split()
    assert first == "SS-1522"
    assert second in {"SS-1522", bytes(1000).hex()}
    assert after == "after"
    assert before.recall("r", "cut", "big200000") is None
    assert before.recall("r", "cut", "after") == b"after"
    before.close()
    whole = Ledger(tmp_path / "ledger", anchors=tmp_path / "state")
    assert whole.spent_units() == 2 + (second != "SS-1522")
    whole.verify()
    whole.close()
