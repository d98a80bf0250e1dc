"""Server and clients as processes that are killed fifty times with ``kill -9`` in one run, and started again with the same command.

The oracle is the same run without a kill: adapters of A, B and C to the bit, as many learning steps, as many charges.
The clients' local work comes one after the other, so that B meets their steps in one order; then all three meet in the sum.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open

from securesplit.privacy.ledger import Ledger
from tests.e2e.house import CLIENTS, LAB, ROUND, House, Program, build_house, job_text, policy_text, train_argv

KILLS_IN_SUMS = False
"""Whether somebody may be killed between a client's last local step and the end of the sum, too."""
STEP = (
    ROUND.replace('"round"', '"step"')
    .replace("releases = 3", "releases = 400")
    .replace("releases = 2", "releases = 400")
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stage:
    """One run of everybody; whoever is killed is started again with the same command."""

    def __init__(self, house: House, folder: Path, policy: str, epochs: int) -> None:
        self.house, self.folder, self.port = house, folder, free_port()
        folder.mkdir()
        job = job_text(house.model, rounds=1, epochs=epochs, blind="UnsafeNoPrivacy" not in policy)
        job = job.replace("stage_seconds = 3.0", "stage_seconds = 100.0\nreconnect_seconds = 120.0")
        (folder / "job.toml").write_text(job)
        (folder / "policy.toml").write_text(policy)
        self.lives: Counter[str] = Counter()
        self.running: dict[str, Program] = {}

    def start(self, name: str) -> None:
        self.lives[name] += 1
        label = f"{name}.{self.lives[name]}"
        if name == "gpu":
            argv: tuple[object, ...] = (
                "serve", "--job", self.folder / "job.toml", "--policy", self.folder / "policy.toml", "--keys",
                self.house.keys / "gpu", "--listen", f"127.0.0.1:{self.port}", "--threads", 1, "--output", "json",
                "--state", self.folder / "gpu.state", "--keep-every", 4, "--out", self.folder / "gpu",
            )  # fmt: skip
        else:
            url, policy = f"wss://localhost:{self.port}", self.folder / "policy.toml"
            plain = train_argv(self.house, name, url, policy, "--resume", "--keep-every", 4, "--patience", 120)
            argv = tuple(self.folder / name if word == self.house.root / name else word for word in plain)
        self.running[name] = Program(self.folder, label, *argv)

    def complaints(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("*.err")))

    def taken(self) -> int:
        """Learning steps in the server's last snapshot."""
        try:
            note = json.loads((self.folder / "gpu.state" / "manifest.json").read_text())["note"]
            return int(json.loads(note)["taken"]) if note else 0
        except FileNotFoundError:
            return 0

    def waits_for_sum(self, name: str) -> bool:
        """Whether the client has done its local work and keeps it."""
        try:
            note = json.loads((self.folder / name / "state" / "manifest.json").read_text())["note"]
        except FileNotFoundError:
            return False
        known = json.loads(note) if note else None
        return known is not None and len(known["losses"]) == self.steps

    def run(self, steps: int, kills: dict[int, str]) -> None:
        """Everybody, one after the other.

        Args:
            steps: of one client.
            kills: who dies when the server has taken so many steps; "client" is the one at work.
        """
        self.steps = steps
        left = sorted(kills)
        self.start("gpu")
        for place, name in enumerate(CLIENTS):
            self.start(name)
            deadline = time.monotonic() + 600
            while not self.waits_for_sum(name):
                assert time.monotonic() < deadline, self.complaints()
                for alive in ("gpu", name):
                    assert self.running[alive].process.poll() is None, self.complaints()
                if left and self.taken() >= left[0] and left[0] < (place + 1) * steps:
                    victim = "gpu" if kills[left.pop(0)] == "gpu" else name
                    time.sleep(random.random() / 20)
                    self.running[victim].kill()
                    self.start(victim)
                time.sleep(0.01)
        for victim in ("carol", "gpu", "alice") if KILLS_IN_SUMS else ():
            time.sleep(random.random() / 5)
            if self.running[victim].process.poll() is None:
                self.running[victim].kill()
                self.start(victim)
        for name in CLIENTS:
            assert self.running[name].wait(200) == 0, self.complaints()
        assert self.running["gpu"].stop() == 0, self.complaints()
        assert not left

    def end(self) -> None:
        for program in self.running.values():
            program.kill()

    def adapters(self) -> dict[str, bytes]:
        """Every tensor of A, B and C, to the bit."""
        out: dict[str, bytes] = {}
        for path in (self.folder / "gpu" / "adapter-middle.safetensors", *(self.folder / n / f"adapter-{p}.safetensors" for n in CLIENTS for p in ("front", "back"))):  # fmt: skip
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    out[f"{path.parent.name}/{path.name}/{name}"] = file.get_tensor(name).tobytes()
        return out

    def paid(self) -> dict[str, Counter[str]]:
        """Charges by client and channel."""
        found = {}
        for name in CLIENTS:
            ledger = Ledger(self.house.keys / name / "ledger")
            ledger.verify()
            found[name] = Counter(entry.channel for entry in ledger.entries())
            ledger.close()
        return found


def both(tmp_path: Path, policy: str, *, epochs: int, kills: int, seed: int) -> tuple[Stage, Stage]:
    """A calm run and one with kills, each in a house of its own with the same model and data."""
    stages = []
    steps = 2 * epochs  # Of one client: six records of one length, in batches of four.
    dice = random.Random(seed)
    for label, count in (("calm", 0), ("killed", kills)):
        house = build_house(tmp_path / f"{label}.house")
        for number, name in enumerate(CLIENTS):
            house.data(f"{name}.jsonl", 8, seed=40 + number)
        stage = Stage(house, tmp_path / label, policy, epochs)
        stages.append(stage)
        when = dice.sample([n for n in range(1, 3 * steps) if n % steps], count)
        try:
            stage.run(steps, {n: dice.choice(["gpu", "client"]) for n in when})
        finally:
            stage.end()
    return stages[0], stages[1]


@pytest.mark.slow
def test_fifty_kills_change_no_bit(tmp_path, capsys):
    calm, killed = both(tmp_path, policy_text(LAB, buckets=[16]), epochs=40, kills=50, seed=8)
    assert killed.adapters() == calm.adapters()
    assert killed.taken() == calm.taken() == 3 * calm.steps, "a step was learnt twice, or not at all"
    assert sum(killed.lives.values()) == 50 + 4
    with capsys.disabled():
        print(f"\n50 kills, {dict(killed.lives)} lives; {killed.taken()} steps, adapters of A, B and C to the bit")


@pytest.mark.slow
def test_kills_are_not_paid_for(tmp_path):
    calm, killed = both(tmp_path, policy_text(STEP, buckets=[16]), epochs=6, kills=12, seed=3)
    assert killed.paid() == calm.paid()
    assert killed.taken() == calm.taken()
