"""A recorded conversation to play again, wrongly: an honest client's messages, and a stage with an honest one beside it.

The server is the real core with a real audit log, in memory. What a hostile client does may end its own session with a
declared code, and nothing else: the honest client beside it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from securesplit.client.link import Link
from securesplit.codes import explained_codes
from securesplit.errors import ConnectionFailed
from securesplit.journal.checkpoint import Checkpoints
from securesplit.journal.events import Event
from securesplit.journal.log import Journal
from securesplit.logged import open_journal
from securesplit.model.lora import adapter_layout, read_adapters
from securesplit.pki.certificate import verify_signature
from securesplit.protocol.codec import Caps, decode, encode
from securesplit.protocol.messages import (
    Backward,
    Blob,
    Bye,
    DropCache,
    Failure,
    Forward,
    Gradient,
    Hidden,
    KeepAnchor,
    Message,
    RoundReady,
    Seal,
)
from securesplit.server.core import ServerCore
from securesplit.transport.memory import MemoryPipe, MemoryServer
from tests.e2e.house import WIDTH, House, policy_of

POLICY = policy_of()
ANY = Caps(message_bytes=1 << 30)
DECLARED = frozenset(found.code for found in explained_codes())


def rows(count: int, seed: int = 0) -> Blob:
    values = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype("<f4")
    return Blob(dtype="f32", shape=(count, WIDTH), data=values.tobytes())


def forward(
    step: int, *, learn: bool = True, lengths: tuple[int, ...] = (2, 1), cache: int = 0, seed: int = 0
) -> Forward:
    return Forward(step=step, lengths=lengths, cache=cache, learn=learn, hidden=rows(sum(lengths), seed))


def conversation() -> tuple[Message, ...]:
    """What an honest client says after its greeting: it learns, evaluates, decodes, keeps an anchor, and gets ready."""
    return (
        forward(0), Backward(step=0, gradient=rows(3, 7)), forward(1, learn=False, seed=1),
        forward(2, learn=False, lengths=(1,), cache=1, seed=2), forward(3, learn=False, lengths=(1,), cache=1, seed=3),
        DropCache(cache=1), KeepAnchor(blob=b"sealed"), forward(4, seed=4), Backward(step=4, gradient=rows(3, 8)),
        RoundReady(round=0, dim=8, frozen="c" * 64), Bye(),
    )  # fmt: skip


@dataclass
class Stage:
    """A served core with its log, and a clock."""

    house: House
    core: ServerCore
    server: MemoryServer
    journal: Journal
    clock: float = 0.0

    def link(self, name: str) -> Link:
        """An honest client of ours, past its greeting."""
        return self.house.link(self.server, POLICY, name)[0]

    def pipe(self, name: str) -> MemoryPipe:
        """A connection and nothing said on it yet."""
        return self.server.connect(name, self.house.parties(name)[1])

    def weights(self) -> np.ndarray:
        """What B has learnt."""
        middle = self.core._engine.middle
        return read_adapters(middle, adapter_layout(middle))

    def step(self, link: Link, number: int) -> None:
        """One honest learning step, there and back. A turn that a hostile client holds is over when its time is."""
        link.tell(forward(number, seed=100 + number))
        self._turn_comes(link)
        link.expect(Hidden)
        link.tell(Backward(step=number, gradient=rows(3, 200 + number)))
        link.expect(Gradient)

    def _turn_comes(self, link: Link) -> None:
        inner = link._pipe.inner
        assert isinstance(inner, MemoryPipe)
        for _ in range(9):
            if inner._inbox:
                return
            self.clock += 125.0  # A little more than a turn may take.
            self.server.tick(self.clock)


@contextmanager
def stage(house: House, root: Path) -> Iterator[Stage]:
    """A served core with its audit log."""
    with open_journal(house.folder("gpu"), path=root / "audit") as journal:

        def note(event: Event) -> None:
            journal.append(event, durable=False)

        core = house.core(house.job(blind=False), POLICY, note=note, checkpoints=Checkpoints(journal, verify_signature))
        yield Stage(house, core, MemoryServer(core), journal)


def ending(pipe: MemoryPipe) -> str | None:
    """The code of the last Failure that the server sent; None while the session goes on."""
    code = None
    while True:
        try:
            message = decode(pipe.receive(0), ANY)
        except ConnectionFailed:
            return code if pipe.closed else None
        if isinstance(message, Failure):
            code = message.code


def greeted(stage: Stage, name: str = "alice") -> MemoryPipe:
    """The bare pipe of a client that has greeted in order; what is said on it now passes no check of ours."""
    pipe = stage.link(name)._pipe.inner
    assert isinstance(pipe, MemoryPipe)
    return pipe


def frames(messages: tuple[Message, ...]) -> tuple[bytes, ...]:
    return tuple(encode(message) for message in messages)


def say(pipe: MemoryPipe, *data: bytes) -> None:
    """Send until the server closes."""
    for part in data:
        if pipe.closed:
            return
        pipe.send(part)


BAD_SEAL = Seal(number=3, stream=bytes(32), log=bytes(16), rows=1, head=bytes(32), signature=bytes(8))
