"""One client's connection as the shell sees it: who it is, what waits for it, and whether it moves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from websockets.exceptions import ConnectionClosed

from securesplit.protocol.transcript import Recorder
from securesplit.transport.actions import Close, Send
from securesplit.transport.client import FRAGMENT
from securesplit.transport.limits import Progress
from securesplit.transport.progress import Pace, Wire

__all__ = ["FAREWELL", "OUTBOX", "Peer"]

OUTBOX = 64
_FULL = 8
"""Messages that wait for a peer before no more of its own are read."""
FAREWELL = 5.0


@dataclass(slots=True)
class Peer:
    """A connection.

    Attributes:
        name, uri: whose it is.
        address: numeric, with the port.
        not_after: when its certificate expires.
        wire: the websocket.
        recorder: of the transcript, or None.
        code: why it was put out, once it was.
        within: whether a message of its has begun and not ended.
        up, down: bytes of messages.
    """

    name: str
    uri: str
    address: str
    not_after: datetime
    leaf: bytes = field(repr=False)
    wire: Wire = field(repr=False)
    recorder: Recorder | None = field(repr=False)
    progress: Progress = field(repr=False)
    code: str = ""
    within: bool = False
    up: int = 0
    down: int = 0
    outbox: asyncio.Queue[bytes | Close] = field(default_factory=lambda: asyncio.Queue(OUTBOX), repr=False)
    _room: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    _inward: Pace = field(init=False, repr=False)
    _outward: Pace = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._room.set()
        now = self.wire.loop.time()
        self._inward, self._outward = Pace(self.progress, now), Pace(self.progress, now)

    @property
    def deaf(self) -> bool:
        """Whether it is being put out; nothing that it sends counts any more."""
        return bool(self.code)

    def put(self, action: Send | Close) -> bool:
        """Queue something for it; False, and the connection dropped, when it reads nothing."""
        if isinstance(action, Close):  # One that does not read never takes its farewell; it must be out all the same.
            self.code = self.code or action.code
            asyncio.get_running_loop().call_later(FAREWELL, self.wire.transport.abort)
        try:
            self.outbox.put_nowait(action.data if isinstance(action, Send) else action)
        except asyncio.QueueFull:
            self.wire.transport.abort()
            return False
        if self.outbox.qsize() >= _FULL:
            self._room.clear()
        return True

    async def room(self) -> None:
        """Wait while too much waits for it: who does not read is not read."""
        await self._room.wait()

    async def write(self) -> None:
        """Send what is queued until the connection ends."""
        try:
            while True:
                item = await self.outbox.get()
                if isinstance(item, Close):
                    await self.wire.close(4400 if item.code else 1000, item.code)
                    return
                if self.recorder:
                    self.recorder.record(1, time.time_ns(), item)
                await self.wire.send(self._parts(item))
                if self.outbox.qsize() < _FULL:
                    self._room.set()
        except ConnectionClosed:
            return
        finally:
            self._room.set()

    def stalled(self, now: float) -> str:
        """The code to put it out with, when it stands still; empty when it moves."""
        wire, least = self.wire, self.progress.bytes
        if self._inward.stalled(now, wire.arrived, due=wire.listening and (self.within or wire.half), least=least):
            return "SS-4026"
        # The operating system takes bytes in large pieces, so that any movement counts.
        if self._outward.stalled(now, self.down - wire.untaken, due=wire.untaken > 0, least=1):
            return "SS-4027"
        if wire.listening and now - wire.heard > self.progress.silence:
            return "SS-4027"
        return ""

    def _parts(self, data: bytes) -> Iterator[bytes]:
        view = memoryview(data)
        for start in range(0, len(view), FRAGMENT):
            part = bytes(view[start : start + FRAGMENT])
            self.down += len(part)
            yield part
