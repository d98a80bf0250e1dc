"""kill -9 of anybody at any time, while all clients learn at once and inside the secure sums; nothing but files survives.

Real processes over mTLS. Whoever is killed is started again by the same command. The oracle is a calm run of the same job in a
house of its own: equal adapters of A, B and C to the bit, every step learnt once, and no charge that is not the calm run's.
"""

from __future__ import annotations

import json
import random
import time

import pytest

from tests.e2e.house import CLIENTS, LAB, build_house, policy_text
from tests.e2e.test_fifty_kills import STEP, Stage

KILLS = 50


class Chaos(Stage):
    """All clients at once, in the roster's order, with rounds that are tried again."""

    def __init__(self, house, folder, policy, epochs, rounds, training) -> None:
        super().__init__(house, folder, policy, epochs)
        job = (folder / "job.toml").read_text().replace("rounds = 1", f"rounds = {rounds}")
        tried = "attempts = 200\nquorum = 3\nstage_seconds = 30.0\nreconnect_seconds = 120.0"
        job = job.replace("stage_seconds = 100.0\nreconnect_seconds = 120.0", tried)
        (folder / "job.toml").write_text(f"{job}\n[training]\nstraggler_seconds = 600.0\n{training}\n")

    def storm(self, total: int, thresholds: list[int], dice: random.Random) -> None:
        """Kill somebody whenever the server has learnt so many steps; then let the run end."""
        for name in ("gpu", *CLIENTS):
            self.start(name)
        deadline = time.monotonic() + 1500
        left = list(thresholds)
        while left:
            assert time.monotonic() < deadline, self.complaints()
            for name, program in self.running.items():
                assert program.process.poll() in {None, 0}, f"{name}: {self.complaints()}"
            if self.taken() >= left[0]:
                left.pop(0)
                time.sleep(dice.random() * 1.5)
                alive = [name for name, program in self.running.items() if program.process.poll() is None]
                victim = dice.choice(alive)
                self.running[victim].kill()
                self.start(victim)
            time.sleep(0.01)
        for name in CLIENTS:
            assert self.running[name].wait(600) == 0, self.complaints()
        while (
            not self.running["gpu"].out.read_text().endswith("\n")
        ):  # Killed at the very end, it may be starting still.
            assert time.monotonic() < deadline, self.complaints()
            time.sleep(0.1)
        assert self.running["gpu"].stop() == 0, self.complaints()
        assert self.taken() == total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "privacy", "kills"),
    [
        ('mode = "splitfed-v2"\norder = "roster"', LAB, KILLS),
        ('mode = "client-batch"', LAB, 10),
        ('mode = "hierarchical"\nevery = 2', LAB, 10),
        ('mode = "splitfed-v2"\norder = "roster"', STEP, 10),
    ],
    ids=["v2", "client-batch", "hierarchical", "noised"],
)
def test_kills_at_any_time_change_no_bit(tmp_path, capsys, training, privacy, kills):
    rounds, epochs, dice = 2, 5, random.Random(17)
    steps = rounds * 2 * epochs  # Of one client: six records of one length, in batches of four.
    total = steps if "client-batch" in training else 3 * steps
    # Every round's end is hit several times; the rest falls where it falls.
    ends = [total // 2 - 1, total // 2, total // 2, total - 4, total - 4]
    other = [dice.randrange(1, total - 4) for _ in range(kills - len(ends))]
    stages = []
    for label, when in (("calm", []), ("killed", sorted([*ends, *other]))):
        house = build_house(tmp_path / f"{label}.house")
        for number, name in enumerate(CLIENTS):
            house.data(f"{name}.jsonl", 8, seed=40 + number)
        stage = Chaos(house, tmp_path / label, policy_text(privacy, buckets=[16]), epochs, rounds, training)
        stages.append(stage)
        try:
            stage.storm(total, when, dice)
        finally:
            stage.end()
    calm, killed = stages
    if privacy is LAB:
        assert killed.adapters() == calm.adapters()
    else:  # Noise is drawn anew in another run; what is paid is the same.
        assert killed.paid() == calm.paid()
    assert sum(killed.lives.values()) == kills + 4
    for name in CLIENTS:
        records = [json.loads((s.folder / name / "run.json").read_text()) for s in stages]
        assert records[0]["steps"] == records[1]["steps"] == steps
        assert len(records[1]["survivors"]) == rounds
    with capsys.disabled():
        print(f"\n{kills} kills, lives {dict(killed.lives)}; {total} steps, each once")
