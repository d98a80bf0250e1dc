"""The in-memory twin of the TLS shell: the same core, the same bytes, no socket.

For tests, for attacks and for the fuzzer. Work runs inline, so a whole training run is deterministic up to the gate's
own randomness.
"""

from __future__ import annotations

import time
from collections import deque

from securesplit.errors import ConnectionFailed
from securesplit.protocol.session import Party
from securesplit.protocol.transcript import Recorder
from securesplit.transport.actions import Action, Close, Core, Send


class MemoryServer:
    """Connects pipes to a core.

    Args:
        core: the server.
        recorders: transcript recorders by client name; messages of others are not recorded.
    """

    def __init__(self, core: Core, recorders: dict[str, Recorder] | None = None) -> None:
        self._core = core
        self._recorders = recorders or {}
        self._pipes: dict[int, MemoryPipe] = {}

    def connect(self, name: str, party: Party) -> MemoryPipe:
        """Open a pipe for a client whose certificate is taken as verified."""
        self._core.welcome(name)
        number = self._core.connect(name, party)
        pipe = MemoryPipe(self, number, self._recorders.get(name))
        self._pipes[number] = pipe
        return pipe

    def deliver(self, connection: int, data: bytes) -> None:
        """Hand a client's message to the core and carry out what it asks for."""
        self._run(self._core.receive(connection, data))

    def tick(self, now: float | None = None) -> None:
        """Let the core look at the clock."""
        self._run(self._core.tick(time.monotonic() if now is None else now))

    def drop(self, connection: int) -> None:
        """A client is gone without a word."""
        self._pipes.pop(connection, None)
        self._run(self._core.disconnect(connection))

    def _run(self, actions: list[Action]) -> None:
        queue = deque(actions)
        while queue:
            action = queue.popleft()
            pipe = self._pipes.get(action.connection)
            if isinstance(action, Send):
                if pipe is not None:
                    pipe.deliver(action.data)
            elif isinstance(action, Close):
                if pipe is not None:
                    pipe.closed = True
                    self._pipes.pop(action.connection)
                    queue.extend(self._core.disconnect(action.connection))
            else:
                queue.extendleft(reversed(self._core.complete(action.connection, action.run())))


class MemoryPipe:
    """A :class:`securesplit.transport.pipe.Pipe` without a network."""

    def __init__(self, server: MemoryServer, connection: int, recorder: Recorder | None) -> None:
        self.closed = False
        self._server = server
        self._connection = connection
        self._recorder = recorder
        self._inbox: deque[bytes] = deque()

    def send(self, data: bytes) -> None:
        """See :class:`Pipe`."""
        if self.closed:
            raise ConnectionFailed("SS-3020", "the connection is closed")
        if self._recorder is not None:
            self._recorder.record(0, time.time_ns(), data)
        self._server.deliver(self._connection, data)

    def receive(self, timeout: float | None = None) -> bytes:
        """See :class:`Pipe`. Nothing can arrive later in memory, so an empty inbox is a timeout at once."""
        if not self._inbox:
            code, what = (
                ("SS-3020", "the connection is closed")
                if self.closed
                else ("SS-3021", f"nothing arrived within {timeout or 0:.0f} s")
            )
            raise ConnectionFailed(code, what)
        return self._inbox.popleft()

    def deliver(self, data: bytes) -> None:
        """Put a message of the server's into the inbox."""
        if self._recorder is not None:
            self._recorder.record(1, time.time_ns(), data)
        self._inbox.append(data)

    def close(self) -> None:
        """See :class:`Pipe`."""
        if not self.closed:
            self.closed = True
            self._server.drop(self._connection)
