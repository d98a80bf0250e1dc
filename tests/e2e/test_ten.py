"""Ten clients and a server, each its own process, over mutual TLS; kill -9 at random. Plain integer sums are the oracle."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.house import ROOT, Program, build_house, job_text, policy_text, start_server
from tests.e2e.swarm import Plan, schedule

TEN = tuple(f"site-{number}" for number in range(10))
QUORUM = 6
_LOG = re.compile(
    r"(WARNING|INFO) (securesplit\.[a-z.]+|websockets\.server): "
    r"(connection \d+: site-\d|connection \d+: closed|connection \d+: site-\d admitted the job"
    r"|connection \d+ \(site-\d\) is closed: \[SS-60\d\d\] [a-z, ]+|certificates reloaded"
    r"|server (listening on 127.0.0.1:\d+|closing)|connection (open|closed|rejected|handler failed).*|policy 'tiny' is UnsafeNoPrivacy.*"
    r"|opening handshake failed|model: .*)"
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


def let_loose(house, server, url, *, label, rounds, kills=(), dim=500, seconds=100.0, seed=0) -> Told:
    folder = house.root / label
    folder.mkdir()
    plan = Plan(
        url=url, keys=str(house.keys), policy=str(house.root / "server.policy.toml"), folder=str(folder), names=TEN,
        rounds=rounds, dim=dim, seed=seed, seconds=seconds, kills=kills,
    )  # fmt: skip
    plan.write(folder / "plan.json")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.swarm", str(folder / "plan.json")], cwd=ROOT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds + 60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    (folder / "said.json").write_text(out)
    return Told(json.loads(out), folder, err)


def check_sums(told: Told, rounds: int) -> int:
    """Every sum that anybody holds is the plain sum of what its named survivors wrote down; how many rounds gave one."""
    given: dict[str, dict[str, np.ndarray]] = {}
    for path in (told.folder / "given").glob("*.npy"):
        session, name = path.name.removesuffix(".npy").split(".")
        given.setdefault(session, {})[name] = np.load(path)
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


def test_ten_processes_and_kills_at_random(ten, capsys):
    rounds, seed = 24, int(os.environ.get("SWARM_SEED", "7"))
    kills = schedule(seed, TEN, rounds, crowd=5)
    server, url = start_server(ten, ten_job(ten), policy_text())
    try:
        told = let_loose(ten, server, url, label="swarm", rounds=rounds, kills=kills)
        told_short = {**told.said, "lines": len(told.lines)}
        finished = check_sums(told, rounds)
        assert told.said["hung"] == [], told_short
        check_logs(ten, server, told)
        assert finished >= rounds - 2, told_short
        with capsys.disabled():
            print(
                f"\nseed {seed}: {len(told.said['killed'])} kills of {len(kills)} planned, {finished} of {rounds} rounds with a sum, {told.said['seconds']:.1f} s"
            )
            print(dict(sorted(points(told).items())))
            for number in range(rounds):
                if told.sums(number):
                    dead = sum(k["round"] == number for k in told.said["killed"])
                    print(number, dead, f"{told.seconds(number):.2f}", len(told.sums(number)), told.codes(number))
                else:
                    print(number, "no sum", told.codes(number))
    finally:
        assert server.stop() == 0
