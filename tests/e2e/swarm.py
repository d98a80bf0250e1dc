"""Clients of secure sums as processes that die by kill -9 and come back: a script, because it forks.

    python -m tests.e2e.swarm PLAN.json

Every client is a fork of one process that has imported everything, so that ten of them fit a small machine. Each dials the
server over mutual TLS and adds a random vector to one sum after the other. Before its masked vector leaves it writes what
it adds to ``FOLDER/given``, and what a sum gave it to ``FOLDER/got``. Over a pipe it tells the parent how far it is; the
parent kills by the plan, a random while after the moment that the plan names, and forks anew. One JSON object on stdout
says what happened.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import selectors
import signal
import struct
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from securesplit.aggregate.answered import AnswerLog
from securesplit.aggregate.client import ClientRound
from securesplit.aggregate.fixedpoint import Floats, Words
from securesplit.client import rounds
from securesplit.client.dial import dial
from securesplit.client.link import Link
from securesplit.errors import AggregationAborted, SecureSplitError
from securesplit.policy.load import load_policy
from securesplit.privacy.gate import Gate
from securesplit.protocol.messages import Secagg
from securesplit.protocol.states import State

STAGES = ("advertise", "shares", "masked", "consistent", "unmask")
AGAIN = ("never", "at once", "next round")


@dataclass(frozen=True)
class Kill:
    """One kill: ``after`` seconds behind the moment at which ``victim`` reports ``point`` in ``round``.

    Where the victim is ``server``, the first client that reports this decides.
    """

    round: int
    victim: str
    point: str
    after: float
    again: str


@dataclass(frozen=True)
class Plan:
    """A whole run. ``seconds`` bounds it; who is alive then is killed and counted as hung. ``server`` is a process too."""

    url: str
    keys: str
    policy: str
    folder: str
    names: tuple[str, ...]
    rounds: int
    dim: int
    seconds: float
    server: int = 0
    kills: tuple[Kill, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Plan:
        said = json.loads(path.read_text())
        kills = tuple(Kill(**kill) for kill in said.pop("kills"))
        return cls(**{**said, "names": tuple(said["names"]), "kills": kills})

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


def schedule(
    seed: int, names: tuple[str, ...], rounds: int, *, each: tuple[int, ...] = (0, 1, 2), crowd: int = 0
) -> tuple[Kill, ...]:
    """Kills at every point of a round in turns, of random clients in random rounds; the last two rounds are left alone.

    Args:
        seed: of the schedule.
        names, rounds: who and how many.
        each: how many may die in a round.
        crowd: how many die in one round in the middle, too many for a sum.
    """
    chance = random.Random(seed)
    points = ["ready", *(f"{side} {stage}" for stage in STAGES for side in ("saying", "said", "heard"))]
    points.remove("heard unmask")
    chance.shuffle(points)
    kills: list[Kill] = []
    for number in range(1, rounds - 2):
        crowded = crowd and number == rounds // 2
        for victim in chance.sample(names, crowd if crowded else chance.choice(each)):
            point = "said advertise" if crowded else points[len(kills) % len(points)]
            kills.append(Kill(number, victim, point, chance.uniform(0, 0.02), chance.choice(AGAIN[1:])))
    return tuple(kills)


class _Board:
    """The highest number of a round that anybody has begun, in memory that all processes share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4)
        self.note(-1)

    @property
    def begun(self) -> int:
        return int(struct.unpack("<i", self._memory[:4])[0])

    def note(self, number: int) -> None:
        self._memory[:4] = struct.pack("<i", number)


class _Reports:
    """Stands in a client's way: every step of a round is reported, and a contribution is on disk before it leaves."""

    def __init__(self, plan: Plan, name: str, pipe: int, board: _Board) -> None:
        self._given, self._name, self._pipe, self._board = Path(plan.folder, "given"), name, pipe, board
        self._mine: dict[int, tuple[str, Words]] = {}

    def say(self, number: int, what: str) -> None:
        """Tell the parent; a line this short is written whole or not at all."""
        os.write(self._pipe, f"{number} {time.monotonic():.4f} {what}\n".encode())

    def keep(self, number: int) -> None:
        """Write down what is about to leave; said once more after a lost connection, it is the same."""
        session, words = self._mine[number]
        path = self._given / f"{session}.{self._name}.npz"
        if not path.exists():
            _save(path, words=words)

    def listen(self) -> None:
        """For the rest of this process's life."""
        line, contribute = rounds._Line, ClientRound.contribute
        ready, tell, hear = line.ready, line.say, line.hear

        def told_ready(self_: rounds._Line, number: int, *, dim: int, frozen: str, step: float) -> bytes:
            self.say(number, "ready")
            run = ready(self_, number, dim=dim, frozen=frozen, step=step)
            self._board.note(max(self._board.begun, number))
            self.say(number, "begun")
            return run

        def told_contribute(self_: ClientRound, update: Floats, weight: int) -> int:
            clipped = contribute(self_, update, weight)
            assert self_.contribution is not None
            self._mine[self_.config.round] = self_.config.session_id.hex(), self_.contribution.copy()
            return clipped

        def told_say(self_: rounds._Line, message: Secagg) -> None:
            stage = STAGES[message.stage]
            self.say(message.round, f"saying {stage}")
            if stage == "masked":
                self.keep(message.round)
            tell(self_, message)
            self.say(message.round, f"said {stage}")

        def told_hear(self_: rounds._Line, last: Secagg) -> Secagg:
            message = hear(self_, last)
            if message.stage < len(STAGES):
                self.say(message.round, f"heard {STAGES[message.stage]}")
            return message

        line.ready, line.say, line.hear = told_ready, told_say, told_hear  # type: ignore[method-assign]
        ClientRound.contribute = told_contribute  # type: ignore[method-assign]


def _live(plan: Plan, name: str, start: int, pipe: int, board: _Board) -> int:
    """One client until the last round; its exit code."""
    policy, keys = load_policy(Path(plan.policy)), Path(plan.keys, name)
    gate, link, number, reports = Gate(policy, None), None, start, _Reports(plan, name, pipe, board)
    reports.listen()
    random_vector = np.random.default_rng(int.from_bytes(os.urandom(8), "big")).normal
    with closing(AnswerLog(keys / "answered.log")) as answers:
        while number < plan.rounds:
            update = gate.release_update(random_vector(scale=0.2, size=plan.dim))
            # Every update starts from somewhere else, or a sum over other clients would be refused (SS-6030).
            frozen = hashlib.sha256(f"{plan.folder} {number}".encode()).hexdigest()
            try:
                link = _open(link) or dial(plan.url, keys=keys, policy=policy, patience=60)
                assert link.folder is not None
                opened = rounds.secure_sum(
                    link,
                    link.folder,
                    policy,
                    update,
                    weight=3,
                    number=number,
                    frozen=frozen,
                    origin=os.urandom(32),
                    answers=answers,
                ).aggregate
                path = Path(plan.folder, "got", f"{number}.{name}.npz")
                _save(path, words=opened.ring_sum, survivors=np.array(opened.survivors))
                reports.say(number, "done")
                number += 1
            except AggregationAborted as error:
                reports.say(number, f"{error.code} {error.exit_code}")
                number = max(number, board.begun) + 1
            except SecureSplitError as error:
                reports.say(number, f"{error.code} {error.exit_code}")
                return error.exit_code
    if link is not None:
        link.close()
    return 0


def _save(path: Path, **arrays: npt.NDArray[np.generic]) -> None:
    """All of it or nothing, whenever the process dies."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    with unfinished.open("wb") as file:
        np.savez(file, **arrays)
    unfinished.rename(path)


def _open(link: Link | None) -> Link | None:
    """The link, if the server has not ended its session."""
    return link if link is not None and link._session.state is State.OPEN else None


@dataclass
class _Child:
    name: str
    process: int
    pipe: int
    text: bytes = b""
    lines: list[tuple[int, float, str]] = field(default_factory=list)

    def read(self) -> bool:
        """Take in what it has reported; False once it is gone."""
        data = os.read(self.pipe, 1 << 16)
        *whole, self.text = (self.text + data).split(b"\n")
        for line in whole:
            number, at, what = line.decode().split(" ", 2)
            self.lines.append((int(number), float(at), what))
        return bool(data)


class _Parent:
    """Forks, listens, kills and buries."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.board = plan, _Board()
        self.selector = selectors.DefaultSelector()
        self.alive: dict[str, _Child] = {}
        self.dead: list[_Child] = []
        self.pending = list(plan.kills)
        self.due: list[tuple[float, Kill]] = []
        self.reborn: list[tuple[str, int]] = []
        self.killed: list[dict[str, object]] = []
        self.codes: list[tuple[str, int]] = []

    def fork(self, name: str, start: int) -> None:
        out, into = os.pipe()
        if (process := os.fork()) == 0:
            os.close(out)
            code = 70
            try:
                code = _live(self.plan, name, start, into, self.board)
            except BaseException as error:  # noqa: BLE001  # A child must not return into the parent's loop.
                sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n")
                sys.stderr.flush()
            os._exit(code)
        os.close(into)
        self.alive[name] = child = _Child(name, process, out)
        self.selector.register(out, selectors.EVENT_READ, child)

    def run(self) -> dict[str, object]:
        begin = time.monotonic()
        for name in self.plan.names:
            self.fork(name, 0)
        while self.alive and time.monotonic() - begin < self.plan.seconds:
            now = time.monotonic()
            wait = min([0.05, *(max(at - now, 0) for at, _ in self.due)])
            for key, _ in self.selector.select(wait):
                self.listen(key.data)
            self.kill()
            self.revive()
        hung = sorted(self.alive)
        for child in list(self.alive.values()):
            os.kill(child.process, signal.SIGKILL)
            self.bury(child)
        lines = [(child.name, child.process, *line) for child in self.dead for line in child.lines]
        return {
            "seconds": time.monotonic() - begin, "hung": hung, "killed": self.killed, "codes": self.codes,
            "missed": [asdict(kill) for kill in self.pending], "lines": sorted(lines, key=lambda line: line[3]),
        }  # fmt: skip

    def listen(self, child: _Child) -> None:
        known = len(child.lines)
        if not child.read():
            self.bury(child)
            return
        for number, _, what in child.lines[known:]:
            for kill in [
                k for k in self.pending if k.victim in {child.name, "server"} and (k.round, k.point) == (number, what)
            ]:
                self.pending.remove(kill)
                self.due.append((time.monotonic() + kill.after, kill))

    def kill(self) -> None:
        for at, kill in [d for d in self.due if d[0] <= time.monotonic()]:
            self.due.remove((at, kill))
            child = self.alive.get(kill.victim)
            if kill.victim == "server":
                os.kill(self.plan.server, signal.SIGKILL)
                self.killed.append({"name": "server", "round": kill.round, "point": kill.point})
            if child is None:
                continue
            os.kill(child.process, signal.SIGKILL)
            while child.read():
                continue
            number, _, what = child.lines[-1]
            self.killed.append({"name": child.name, "round": number, "point": what})
            self.bury(child)
            if kill.again != "never":
                self.reborn.append((kill.victim, -1 if kill.again == "at once" else number))

    def revive(self) -> None:
        for name, behind in list(self.reborn):
            over = any(c.lines and c.lines[-1][0] > behind for c in self.alive.values())
            if behind < 0 or over:
                self.reborn.remove((name, behind))
                self.fork(name, self.board.begun + 1)

    def bury(self, child: _Child) -> None:
        self.selector.unregister(child.pipe)
        os.close(child.pipe)
        _, status = os.waitpid(child.process, 0)
        self.alive.pop(child.name)
        self.dead.append(child)
        self.codes.append((child.name, os.waitstatus_to_exitcode(status)))


def main(path: Path) -> None:
    """Breed and kill by the plan."""
    plan = Plan.read(path)
    for name in ("given", "got"):
        Path(plan.folder, name).mkdir(parents=True)
    json.dump(_Parent(plan).run(), sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
