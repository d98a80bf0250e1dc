"""A site and a server in memory that die at chosen moments and are built again from what lies on disk.

A moment is one of: before or after a write to a state folder, a commit of the ledger, a message that is sent, a step of an
optimiser. Whoever was at work then dies: the server while it handles a message, else the client. Nothing here is an oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path

import pytest
import torch

import securesplit.client.train as train_module
from securesplit.aggregate.fixedpoint import Aggregate, quantise
from securesplit.client.client import Client
from securesplit.client.memory import Remembered
from securesplit.client.rounds import Opened
from securesplit.client.train import Trained, Trainer
from securesplit.errors import ConnectionFailed
from securesplit.kept.folder import Kept
from securesplit.model.descent import Descent
from securesplit.model.lora import adapter_layout, read_adapters
from securesplit.policy.schema import Policy
from securesplit.privacy.ledger import Ledger
from securesplit.protocol.codec import decode
from securesplit.protocol.job import Job
from securesplit.protocol.messages import Backward, Forward
from securesplit.runs.metrics import Metrics, Reading, read_metrics
from securesplit.server.core import ServerCore
from securesplit.server.serve import state_facts
from securesplit.transport.memory import MemoryPipe, MemoryServer
from tests.e2e.house import ANY, House, batches_of


class Dies(BaseException):
    """kill -9: nothing catches it, nothing is said."""


class Wreck:
    """One run of one client.

    Args:
        house, job, policy: of the run.
        texts: training data and, of the last two, held-out data.
        folder: for everything that survives a death.
        crashes: whether somebody dies at the n-th moment.
        every: steps between snapshots, of both.
        records: folder for the run's checkpoints, if it leaves any.
    """

    def __init__(
        self, house: House, job: Job, policy: Policy, texts: tuple[str, ...], folder: Path,
        crashes: Callable[[int], bool] = lambda _n: False, *, every: int = 2, records: Path | None = None,
    ) -> None:  # fmt: skip
        self.house, self.job, self.policy, self.texts, self.folder = house, job, policy, texts, folder
        self.every, self.records = every, records
        self.crashes = crashes
        self.moments = self.deaths = self.server_deaths = 0
        self.arrived: list[bytes] = []  # Every message that reached the server whole.
        self.core: ServerCore
        self.given: list[object] = []
        self._kept: Kept | None = None
        self._start()

    def moment(self) -> None:
        """Somebody may die now."""
        self.moments += 1
        if self.crashes(self.moments):
            raise Dies

    def _start(self) -> None:
        while True:
            if self._kept is not None:
                self._kept.close()
            self._kept = Kept.open(self.folder / "server", state_facts(self.job, self.policy, self.house.digest))
            try:
                self.core = self.house.core(self.job, self.policy, state=self._kept, every=self.every)
            except Dies:  # While it reads its journal.
                self.server_deaths += 1
                continue
            self.server = MemoryServer(self.core)
            return

    def link(self):
        mine, theirs = self.house.parties("alice")
        from securesplit.client.dial import greet

        pipe = _Pipe(self, self.server.connect("alice", theirs))
        made = greet(pipe, mine, self.policy, name="alice", server="gpu")
        made.redial = lambda _within: self.link()
        return made

    def run(self) -> tuple[Trained, Client]:
        """Until the client's run is over, however often somebody dies."""
        while True:
            ledger = kept = link = metrics = None
            try:
                if not self.policy.unsafe:
                    ledger = Ledger(self.folder / "ledger", anchors=self.folder / "anchors")
                link = self.link()
                link.lasting = 8.0
                link.folder = self.house.folder("alice")
                client = self.house.client(link, self.policy, ledger)
                batches, held = batches_of(client, self.texts[:-2], size=2), batches_of(client, self.texts[-2:], size=2)
                kept = Kept.open(self.folder / "client", Remembered.facts(client, batches, held))
                memory = Remembered(kept, every=self.every)
                self.client = client
                metrics = Metrics(self.folder, lambda: Reading(0, 0, None), after=memory.resumes_at, looks=memory.looks)
                trained = Trainer(
                    client, batches, held, answers=None, progress=lambda *_: None, memory=memory, records=self.records,
                    metrics=metrics,
                ).run()  # fmt: skip
            except Dies:
                self.deaths += 1
            except ConnectionFailed:  # The server died during the greeting; whoever started the client starts it again.
                assert link is None
            else:
                return trained, client
            finally:
                for opened in (metrics, kept, ledger):
                    if opened is not None:
                        opened.close()

    def rows(self) -> list[tuple[object, ...]]:
        """What the run wrote down of its steps and evaluations, in order."""
        return [(row.kind, row.step, row.round, row.loss) for row in read_metrics(self.folder).rows]

    def adapters(self) -> dict[str, bytes]:
        """A, B and C, to the bit."""
        parts = {"a": self.client.front, "b": self.core._engine.middle, "c": self.client.back}
        return {name: read_adapters(part, adapter_layout(part)).tobytes() for name, part in parts.items()}

    def blocks(self) -> list[bytes]:
        """Every record's rows that reached the server, each time that they did."""
        out: list[bytes] = []
        for data in self.arrived:
            message = decode(data, ANY)
            if isinstance(message, Forward):
                lengths = message.lengths
            if isinstance(message, Forward | Backward):
                rows = message.hidden if isinstance(message, Forward) else message.gradient
                width, at = len(rows.data) // rows.shape[0], 0
                for length in lengths:
                    out.append(rows.data[at : at + length * width])
                    at += length * width
        return out

    def releases(self) -> dict[tuple[int, str], set[bytes]]:
        """The payloads that reached the server in learning steps, by step and channel."""
        seen: dict[tuple[int, str], set[bytes]] = {}
        for data in self.arrived:
            message = decode(data, ANY)
            if isinstance(message, Forward) and message.learn:
                seen.setdefault((message.step, "cut"), set()).add(message.hidden.data)
            elif isinstance(message, Backward):
                seen.setdefault((message.step, "gradient"), set()).add(message.gradient.data)
        return seen


@dataclass
class _Pipe:
    wreck: Wreck
    inner: MemoryPipe
    tls_version: str = "memory"
    server: MemoryServer = field(init=False)

    def __post_init__(self) -> None:
        self.server = self.wreck.server

    def send(self, data: bytes) -> None:
        self._alive()
        self.wreck.moment()
        self._alive()
        try:
            self.wreck.moment()
            self.wreck.arrived.append(data)
            self.inner.send(data)
            self.wreck.moment()
        except Dies:
            self.wreck.server_deaths += 1
            self.wreck._start()
        self._alive()
        self.wreck.moment()

    def receive(self, timeout: float | None = None) -> bytes:
        self._alive()
        data = self.inner.receive(timeout)
        self.wreck.moment()
        return data

    def close(self) -> None:
        if self.server is self.wreck.server:
            self.inner.close()

    def _alive(self) -> None:
        if self.server is not self.wreck.server:
            raise ConnectionFailed("SS-3020", "the server was killed")


@contextmanager
def dangerous(patch: pytest.MonkeyPatch, wreck: Callable[[], Wreck]) -> Iterator[None]:
    """Put moments before and after everything that lasts; a sum is a sum of one, which opens at once."""

    def around(kind, name):
        inner = getattr(kind, name)

        @wraps(inner)
        def both(*args, **kwargs):
            wreck().moment()
            result = inner(*args, **kwargs)
            wreck().moment()
            return result

        patch.setattr(kind, name, both)

    for kind, name in ((Kept, "append"), (Kept, "commit"), (Ledger, "charge"), (Descent, "step")):
        around(kind, name)

    def one(link, folder, policy, update, **_):
        wreck().given.append(update.vector.tobytes())
        scale = 1 << 40
        words, _ = quantise(update.vector, 1, scale=scale, clip=64.0, w_max=1, bits=64)
        return Opened(Aggregate(words, ("alice",), scale, 64.0), bytes(32), words)

    patch.setattr(train_module, "secure_sum", one)
    with torch.random.fork_rng():
        yield
