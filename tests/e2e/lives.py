"""Clients that are killed and live again, and a server that is killed and starts anew: real ends in threads, without a network.

What a client keeps over its lives is what a disk would: its answers and the round's file, in files; and the sums that are safe.
A kill is an exception that no code of the product catches, raised between two messages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from securesplit.aggregate.answered import AnswerLog
from securesplit.aggregate.fixedpoint import Aggregate
from securesplit.client import attempts
from securesplit.client.dial import greet
from securesplit.client.link import Link
from securesplit.client.pending import Pending, read_pending, write_pending
from securesplit.client.rounds import Brought, close_sum, secure_sum
from securesplit.errors import ConnectionFailed, SecureSplitError
from securesplit.policy.schema import Policy
from securesplit.privacy.gate import Gate, ReleasedUpdate
from securesplit.protocol.codec import decode
from securesplit.protocol.job import Job
from securesplit.protocol.messages import Message
from securesplit.server.closed import ClosedRuns
from securesplit.transport.actions import Work
from securesplit.transport.memory import MemoryPipe, MemoryServer
from tests.e2e.house import ANY, House, policy_of

DIM = 6
LAB = policy_of()
SECONDS = 20.0


class Killed(BaseException):
    """kill -9."""


class Waiting(MemoryPipe):
    """A pipe whose reader waits."""

    def receive(self, timeout: float | None = None) -> bytes:
        with self._server.changed:
            self._server.changed.wait_for(lambda: self._inbox or self.closed, timeout=min(timeout or SECONDS, SECONDS))
            return super().receive(timeout)

    def deliver(self, data: bytes) -> None:
        with self._server.changed:
            super().deliver(data)
            self._server.changed.notify_all()

    def close(self) -> None:
        with self._server.changed:
            super().close()
            self._server.changed.notify_all()


class Shared(MemoryServer):
    """A server for many threads, one at a time. ``dead`` is a server that was killed: whoever speaks to it is alone."""

    def __init__(self, core: object) -> None:
        super().__init__(core)
        self.changed = threading.Condition(threading.RLock())
        self.dead = False
        self.mute = False  # It dies after the next thing that it is told, before it says what follows.

    def connect(self, name: str, party: object) -> Waiting:
        with self.changed:
            if self.dead:
                raise ConnectionFailed("SS-3033", "cannot reach the server")
            self._core.welcome(name)
            number = self._core.connect(name, party)
            self._pipes[number] = Waiting(self, number, None)
            return self._pipes[number]

    def _run(self, actions: list) -> None:
        if self.mute:
            self._swallow(actions)
            return
        super()._run(actions)
        self.changed.notify_all()  # Some pipes may have been closed.

    def _swallow(self, actions: list) -> None:
        """Do what is to be computed, send nothing, and die."""
        for action in actions:
            if isinstance(action, Work):
                self._core.complete(action.connection, action.run())
        self.kill()

    def deliver(self, connection: int, data: bytes) -> None:
        with self.changed:
            if not self.dead:
                super().deliver(connection, data)

    def tick(self, now: float | None = None) -> None:
        with self.changed:
            if not self.dead:
                super().tick(now)

    def drop(self, connection: int) -> None:
        with self.changed:
            if not self.dead:
                super().drop(connection)

    def kill(self) -> None:
        with self.changed:
            self.dead = True
            for pipe in self._pipes.values():
                pipe.closed = True
            self.changed.notify_all()


@dataclass
class Disk:
    """What one client has after a kill."""

    sums: list[Aggregate] = field(default_factory=list)  # Round by round, once it is safe.
    closed: int = 0
    releases: int = 0
    lives: int = 0


@dataclass
class World:
    """A server and its clients, and what is to happen to them.

    Attributes:
        on: called before and after each message of a client, with its name, ``send``, ``sent`` or ``read``, and the message;
            and without one around what is put on disk: ``safe?``, ``written``, ``safe``; may raise :class:`Killed`, or kill the server.
    """

    house: House
    job: Job
    policy: Policy
    folder: Path
    rounds: int = 1
    rate: float = 1.0  # How fast the server's clock runs.
    most_lives: int = 60
    release: Callable[[str, np.ndarray], ReleasedUpdate] = lambda _name, vector: Gate(LAB, None).release_update(vector)
    on: Callable[[str, str, Message | None], None] = lambda *_: None
    disks: dict[str, Disk] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)
    given: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    missing: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)
    core_hook: Callable[[object], None] = lambda _core: None

    def __post_init__(self) -> None:
        self.server = self._start()
        self._over = threading.Event()
        self._now = self._last = 0.0

    def _start(self) -> Shared:
        core = self.house.core(self.job, self.policy, closed=ClosedRuns(self.folder / "closed.json"))
        self.core = core
        self.core_hook(core)
        return Shared(core)

    def restart(self) -> None:
        """kill -9 of the server; :meth:`run` starts a new process on its port, which knows nothing but its files."""
        self.server.kill()

    def dialled(self, name: str) -> Link:
        mine, theirs = self.house.parties(name)
        link = greet(Tapped(self, name, self.server.connect(name, theirs)), mine, self.policy, name=name, server="gpu")
        link.folder = self.house.folder(name)
        link.redial = lambda _within: self.dialled(name)
        return link

    def brought(self, name: str, number: int, answers: AnswerLog) -> Pending:
        """What enters the round: from its file, where an earlier life left one; else released now, once."""
        gate, path = Gate(self.policy, None), self.folder / f"{name}.round"
        like = Brought(self.house.folder(name), self.policy, None, 2, number, "0" * 64, answers, b"start %d" % number)
        pending = read_pending(path, gate, folder=like.folder, policy=self.policy, answers=answers, records=None)
        if pending is None or pending.brought.number != number:
            vector = np.random.default_rng([number, *name.encode()]).normal(scale=0.2, size=DIM)
            self.disks[name].releases += 1
            pending = Pending(replace(like, update=self.release(name, vector)), None)
            write_pending(path, gate, pending.brought)
        return pending

    def life(self, name: str, disk: Disk) -> None:
        """From the disk to the end of the job, as a caller of the rounds does it."""
        with closing(AnswerLog(self.folder / f"{name}.log")) as answers:
            link = self.dialled(name)
            link.sums.waits_for = lambda missing: self.missing.setdefault(name, set()).add(missing)
            try:
                while disk.closed < self.rounds:
                    number = disk.closed
                    pending = self.brought(name, number, answers)
                    b, kept = pending.brought, pending.kept
                    if len(disk.sums) == number:
                        opened = secure_sum(
                            link, b.folder, b.policy, b.update, weight=b.weight, number=number, frozen=b.frozen,
                            answers=answers, origin=b.origin,
                        )  # fmt: skip
                        kept, self.given[name, number] = opened.kept, opened.contribution.copy()
                        self.on(name, "safe?", None)
                        write_pending(self.folder / f"{name}.round", Gate(self.policy, None), b, kept)
                        self.on(name, "written", None)
                        disk.sums.append(opened.aggregate)
                        self.on(name, "safe", None)
                    assert kept is not None
                    close_sum(link, b, kept)
                    disk.closed += 1
            except Killed:
                link._pipe.close()
                raise
            link.close()

    def run(self, *names: str) -> None:
        """All lives of all clients."""

        def lives(name: str) -> None:
            disk = self.disks.setdefault(name, Disk())
            done = False
            while not done and not self._over.is_set() and disk.lives < self.most_lives:
                disk.lives += 1
                try:
                    self.life(name, disk)
                    done = True
                except Killed:
                    pass
                except ConnectionFailed as lost:  # The server was killed while this one was starting.
                    done = lost.code not in {"SS-3020", "SS-3033"}
                    self.errors |= {name: lost} if done else {}
                except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
                    self.errors[name], done = error, True

        threads = [threading.Thread(target=lives, args=(name,), daemon=True) for name in names]
        begin = time.monotonic()
        self._over.clear()
        self._last = begin
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and time.monotonic() - begin < SECONDS:
            if self.server.dead:
                self.server = self._start()
            with suppress(SecureSplitError):
                self.server.tick(self._now)
            time.sleep(0.002)
            last, self._last = self._last, time.monotonic()
            self._now += self.rate * (self._last - last)
        self._over.set()
        assert not any(thread.is_alive() for thread in threads), "somebody hangs"

    def exact(self, *names: str, among: tuple[str, ...] = ()) -> None:
        """Everybody has, for every round, the plain integer sum of what each client gave, each once."""
        among = among or names
        assert self.errors == {}
        assert all(self.disks[name].releases == self.rounds for name in names), "released, and paid for, once a round"
        for number in range(self.rounds):
            total = sum(self.given[name, number].astype(np.uint64) for name in among) % (1 << 32)
            for name in names:
                aggregate = self.disks[name].sums[number]
                assert aggregate.survivors == tuple(sorted(among))
                assert np.array_equal(aggregate.ring_sum, total)


class Tapped:
    """A pipe that tells the world of every message before and after it passes."""

    def __init__(self, world: World, name: str, inner: Waiting) -> None:
        self.world, self.name, self.inner = world, name, inner
        self.tls_version = "memory"

    def send(self, data: bytes) -> None:
        message = decode(data, ANY)
        self.world.on(self.name, "send", message)
        self.inner.send(data)
        self.world.on(self.name, "sent", message)

    def receive(self, timeout: float | None = None) -> bytes:
        data = self.inner.receive(timeout)
        self.world.on(self.name, "read", decode(data, ANY))
        return data

    def close(self) -> None:
        self.inner.close()


def quick(monkeypatch) -> None:
    """Pauses between attempts that a test can wait for."""
    monkeypatch.setattr(attempts, "_FIRST", 0.01)
    monkeypatch.setattr(attempts, "_LONGEST", 0.05)
