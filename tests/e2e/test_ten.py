"""Ten clients and a server, each its own process, over mutual TLS; kill -9 at random. Plain integer sums are the oracle."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.house import ROOT, Program, build_house, job_text, policy_text, start_server, train_argv
from tests.e2e.swarm import STAGES, Kill, Plan, schedule

TEN = tuple(f"site-{number}" for number in range(10))
QUORUM = 6
# All that a server may say with -v in these runs; anything else, and so anything private, is a fault.
_LOG = re.compile(
    r"INFO securesplit\.transport\.record: connection \d+: (spiffe://[a-z./-]+/client/site-\d from 127\.0\.0\.1:\d+|closed (SS-60\d\d)?)"
    r"|WARNING securesplit\.transport\.record: refused \(protocol\): \[SS-60\d\d\] 127\.0\.0\.1:\d+ spiffe://[a-z./-]+/client/site-\d"
    r"|INFO securesplit\.server\.core: connection \d+: site-\d admitted the job, under policy [0-9a-f]{16}"
    r"|WARNING securesplit\.server\.core: connection \d+ \(site-\d\) is closed: \[SS-60\d\d\] a client [a-z ]+"
    r"|INFO websockets\.server: (server listening on 127\.0\.0\.1:\d+|connection (open|closed))"
)


def ten_job(house, *, stage: float = 4.0, reconnect: float = 1.0, rounds: int = 1) -> str:
    return (
        job_text(house.model, blind=False, rounds=rounds)
        .replace('roster = ["alice", "bob", "carol"]', f"roster = {json.dumps(TEN)}\nreconnect_seconds = {reconnect}")
        .replace("threshold = 2\nmin_clients = 3", f"threshold = {QUORUM}\nmin_clients = {QUORUM}")
        .replace("stage_seconds = 3.0", f"stage_seconds = {stage}")
    )


@dataclass
class Told:
    """What a swarm did."""

    said: dict
    folder: Path
    errors: str

    @property
    def lines(self) -> list[tuple[str, int, int, float, str]]:
        return [tuple(line) for line in self.said["lines"]]

    def sums(self, number: int) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
        files = {path.name.split(".")[1]: np.load(path) for path in self.folder.glob(f"got/{number}.*.npz")}
        return {name: (f["words"], tuple(f["survivors"].tolist())) for name, f in files.items()}

    def codes(self, number: int) -> dict[str, str]:
        return {name: what for name, _, n, _, what in self.lines if n == number and what.startswith("SS-")}

    def seconds(self, number: int) -> float:
        """From the first that began to the last that had its sum."""
        of = [(at, what) for _, _, n, at, what in self.lines if n == number]
        return max(at for at, what in of if what == "done") - min(at for at, what in of if what == "begun")


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("ten"), *TEN)


def let_loose(house, server, url, *, label, rounds, kills=(), dim=500, seconds=100.0) -> Told:
    assert server.process.poll() is None, server.complaint
    folder = house.root / label
    folder.mkdir()
    plan = Plan(
        url=url, keys=str(house.keys), policy=str(house.root / "server.policy.toml"), folder=str(folder), names=TEN,
        rounds=rounds, dim=dim, seconds=seconds, kills=kills,
    )  # fmt: skip
    return released(plan)


def released(plan: Plan) -> Told:
    """A swarm in a process group of its own, which goes when the test goes."""
    folder = Path(plan.folder)
    plan.write(folder / "plan.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.swarm", str(folder / "plan.json")], cwd=ROOT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=plan.seconds + 60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    (folder / "said.json").write_text(out)
    return Told(json.loads(out), folder, err)


def check_sums(told: Told, rounds: int) -> int:
    """Every sum that anybody holds is the plain sum of what its named survivors wrote down; how many rounds gave one."""
    given: dict[str, dict[str, np.ndarray]] = {}
    for path in (told.folder / "given").glob("*.npz"):
        session, name, _ = path.name.split(".")
        given.setdefault(session, {})[name] = np.load(path)["words"]
    finished = 0
    for number in range(rounds):
        sums = told.sums(number)
        finished += bool(sums)
        assert len({survivors for _, survivors in sums.values()}) <= 1, number
        for words, survivors in sums.values():
            assert len(survivors) >= QUORUM
            assert set(sums) <= set(survivors)
            # The one session of this round in which all of them masked a vector; an aborted round has another name.
            oracle = [
                sum(masked[name].astype(np.uint64) for name in survivors) % (1 << 32)
                for masked in given.values()
                if set(survivors) <= set(masked)
            ]
            assert any(np.array_equal(words, total) for total in oracle), (number, survivors)
    return finished


def check_logs(house, server: Program, told: Told) -> None:
    assert server.process.poll() is None, server.complaint
    strange = [line for line in server.complaint.splitlines() if not _LOG.fullmatch(line)]
    assert strange == []
    assert "Traceback" not in told.errors
    assert {line for line in told.errors.splitlines() if "UnsafeNoPrivacy" not in line} == set()
    for name in TEN:
        path = house.keys / name / "answered.log"
        if path.exists():
            rounds = [
                tuple(json.loads(line)[k] for k in ("session", "round")) for line in path.read_bytes().splitlines()
            ]
            assert len(rounds) == len(set(rounds))


def points(told: Told) -> Counter[str]:
    return Counter(kill["point"] for kill in told.said["killed"])


def described(told: Told, seed: int, kills: tuple[Kill, ...], rounds: int) -> str:
    """Everything that is needed to play the same schedule again, and how it went."""
    lines = [
        f"seed {seed}: {len(told.said['killed'])} of {len(kills)} kills, {told.said['seconds']:.1f} s, hung {told.said['hung']}"
    ]
    lines += [f"killed at: {dict(sorted(points(told).items()))}", f"exit codes: {told.said['codes']}"]
    for number in range(rounds):
        dead = [(k["name"], k["point"]) for k in told.said["killed"] if k["round"] == number]
        sums = told.sums(number)
        end = f"{told.seconds(number):.2f} s, {len(sums)} with the sum" if sums else "no sum"
        lines.append(f"round {number}: {end}; killed {dead}; {told.codes(number)}")
    return "\n".join(lines)


def all_is_well(house, server: Program, told: Told, *, rounds: int, kills: tuple[Kill, ...], seed: int = 0) -> int:
    """What holds whatever happened; the number of rounds that gave a sum."""
    story = described(told, seed, kills, rounds)
    assert told.said["hung"] == [], story
    finished = check_sums(told, rounds)
    check_logs(house, server, told)
    assert Counter(code for _, code in told.said["codes"])[-9] == len(told.said["killed"]), story
    assert {code for _, code in told.said["codes"]} <= {0, -9}, story
    for number in range(rounds):
        # Left behind, or with too few: by these codes and with exit code 5. Who begins anew may come for a round that the
        # others have behind them: SS-6004, or SS-6005 while the next one is running.
        assert set(told.codes(number).values()) <= {f"SS-60{n} 5" for n in ("04", "05", "10", "13")}, story
        whole = [name for name, _, n, _, what in told.lines if n == number and what == "done"]
        assert set(whole) <= set(told.sums(number)), story
    return finished


@pytest.fixture(scope="module")
def served(ten):
    server, url = start_server(ten, ten_job(ten), policy_text())
    yield server, url
    assert server.stop() == 0, server.complaint


def test_ten_processes_and_kills_at_random(ten, served):
    """At every point of a round somebody dies; in one round so many that no sum is given, and the next goes on."""
    rounds, seed = 24, int(os.environ.get("SWARM_SEED", "7"))
    kills = schedule(seed, TEN, rounds, crowd=6)
    told = let_loose(ten, *served, label="swarm", rounds=rounds, kills=kills)
    story = described(told, seed, kills, rounds)
    print(story)
    finished = all_is_well(ten, served[0], told, rounds=rounds, kills=kills, seed=seed)
    assert finished >= rounds - 3, story
    assert len(told.said["killed"]) > 20, story  # Who was left behind before does not reach the moment of its death.
    assert told.sums(rounds // 2) == {}, story
    assert "SS-6010 5" in told.codes(rounds // 2).values(), story
    assert {point.split()[-1] for point in points(told)} >= set(STAGES), story
    assert told.said["seconds"] < 60, story


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 105))
def test_a_hundred_kills_with_larger_vectors(ten, served, seed, capsys):
    rounds = 60
    kills = schedule(seed, TEN, rounds, each=(1, 2, 3), crowd=6)
    told = let_loose(ten, *served, label=f"many-{seed}", rounds=rounds, kills=kills, dim=50_000, seconds=400)
    with capsys.disabled():
        print("\n" + described(told, seed, kills, rounds))
    assert all_is_well(ten, served[0], told, rounds=rounds, kills=kills, seed=seed) >= rounds - 6


@pytest.mark.slow
def test_seconds_of_a_round_when_none_one_and_three_die(ten, capsys):
    """With the default patience of ten seconds for a lost connection. Nobody comes back."""
    server, url = start_server(ten, ten_job(ten, stage=60.0, reconnect=10.0), policy_text(max_message_bytes=1 << 23))
    try:
        for dim in (1000, 1_000_000):
            for dead in (0, 1, 3):
                for point in ("said shares", "said masked"):
                    kills = tuple(Kill(1, name, point, 0.0, "never") for name in TEN[:dead])
                    label = f"seconds-{dim}-{dead}-{point[5:]}"
                    told = let_loose(ten, server, url, label=label, rounds=3, kills=kills, dim=dim, seconds=200)
                    all_is_well(ten, server, told, rounds=3, kills=kills)
                    seconds = [round(told.seconds(number), 2) for number in range(3)]
                    with capsys.disabled():
                        print(
                            f"\ndim {dim}, {dead} killed in round 1 at {point!r}: seconds of rounds 0, 1, 2: {seconds}",
                            end="",
                        )
                    assert max(seconds) < 20
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("stage", ["advertise", "masked", "unmask"])
def test_a_server_that_dies_leaves_no_sum_and_nobody_who_waits(ten, tmp_path, stage):
    """kill -9 of the server when one client reports the stage: the rest end by the error of a lost connection."""
    # Keys of its own: the other server of this file runs on, and one process writes the audit log of one folder.
    shutil.copytree(ten.keys, tmp_path / "keys", ignore=shutil.ignore_patterns("audit"))
    ten = replace(ten, root=tmp_path, keys=tmp_path / "keys")
    server, url = start_server(ten, ten_job(ten), policy_text(), label="server")
    folder = tmp_path / f"orphans-{stage}"
    folder.mkdir()
    plan = Plan(
        url=url, keys=str(ten.keys), policy=str(ten.root / "server.policy.toml"), folder=str(folder), names=TEN, rounds=2,
        dim=500, seconds=40.0, server=server.process.pid,
        kills=(Kill(1, "server", f"saying {stage}", 0.0, "never"),),
    )  # fmt: skip
    told = released(plan)
    assert server.wait() == -9
    assert "Traceback" not in server.complaint + told.errors
    assert told.said["hung"] == []
    assert told.said["killed"] == [{"name": "server", "round": 1, "point": f"saying {stage}"}]
    assert len(told.sums(0)) == len(TEN)
    # The last answers may have been on their way already; who has none ended by SS-3020, and nobody has half a sum.
    lost = told.codes(1)
    assert set(lost.values()) == {"SS-3020 4"}
    assert set(lost) | set(told.sums(1)) == set(TEN)
    assert len(lost) >= (len(TEN) if stage != "unmask" else 1)
    check_sums(told, 2)
    assert told.said["seconds"] < 15


# A client of `securesplit train` that writes down what it adds to a sum before that leaves, and how far it is.
KEEPER = """
import os, sys
import numpy as np
from securesplit.aggregate.client import ClientRound
from securesplit.client import rounds
from securesplit.cli.main import main
label, say, contribute, given = os.environ["KEEPER"], rounds._Line.say, ClientRound.contribute, {}
def keep(self, update, weight):
    clipped = contribute(self, update, weight)
    given[self.config.round] = self.contribution.copy()
    return clipped
def told(line, message):
    if message.stage == 2:
        np.savez(f"{label}.part.npz", words=given[message.round])
        os.rename(f"{label}.part.npz", f"{label}.{message.round}.npz")
    with open(f"{label}.steps", "a") as steps:
        steps.write(f"{message.round} {message.stage}\\n")
    say(line, message)
ClientRound.contribute, rounds._Line.say = keep, told
main()
"""


def trainee(house, name: str, url: str, *, label: str, monkeypatch) -> Program:
    monkeypatch.setenv("KEEPER", label)
    argv = list(train_argv(house, name, url, house.root / "server.policy.toml"))
    argv[argv.index("--out") + 1] = house.root / f"{label}.out.d"
    return Program(house.root, label, *argv, python=KEEPER)


@pytest.mark.slow
def test_ten_trainings_of_which_three_are_killed_and_one_begins_anew(ten, monkeypatch):
    """`securesplit train` as users run it. Who begins anew stands at round 0, and must not put out the others."""
    for seed, name in enumerate(TEN):
        ten.data(f"{name}.jsonl", 6, seed=60 + seed)
    server, url = start_server(ten, ten_job(ten, stage=60.0, reconnect=2.0, rounds=4), policy_text())
    running = {name: trainee(ten, name, url, label=name, monkeypatch=monkeypatch) for name in TEN}
    victims = {"site-1": "0 1", "site-4": "1 2", "site-8": "2 3"}
    try:
        deadline, due = time.monotonic() + 240, dict(victims)
        while due and time.monotonic() < deadline:
            for name, step in list(due.items()):
                steps = ten.root / f"{name}.steps"
                if steps.exists() and step in steps.read_text().splitlines():
                    os.kill(running[name].process.pid, signal.SIGKILL)
                    del due[name]
                    if name == "site-4":
                        again = trainee(ten, name, url, label="again", monkeypatch=monkeypatch)
            time.sleep(0.005)
        assert due == {}
        codes = {name: program.wait(240) for name, program in running.items()}
        assert codes == {name: -9 if name in victims else 0 for name in TEN}, [p.complaint for p in running.values()]
        assert again.wait(120) == 5, again.complaint
        assert re.search(r"error\[SS-(6004|6005|6010|6013)\]", again.complaint)
        for number in range(4):
            ended = {
                name: np.load(ten.root / f"{name}.out.d" / f"round-{number}.npz") for name in TEN if name not in victims
            }
            survivors = running["site-0"].said["survivors"][number]
            assert len(survivors) >= 7
            given = [np.load(ten.root / f"{name}.{number}.npz")["words"].astype(np.uint64) for name in survivors]
            assert all(np.array_equal(file["ring_sum"], sum(given) % (1 << 32)) for file in ended.values())
        assert all(running[n].said["survivors"] == running["site-0"].said["survivors"] for n in TEN if n not in victims)
        everything = "".join(p.complaint for p in (*running.values(), again, server))
        assert "Traceback" not in everything
        words = (ten.root / "site-0.jsonl").read_text().split('"')[3]
        assert words not in everything
    finally:
        for program in running.values():
            program.kill()
        assert server.stop() == 0
