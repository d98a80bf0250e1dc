"""Whose learning step it is. One at a time: forward, the client's loss, backward, then the next client's.

Interleaving two of them would change B's weights under a pending graph. Evaluation and decoding do not wait.
"""

from __future__ import annotations

from collections import deque

from securesplit.errors import RemoteProtocolError
from securesplit.protocol.messages import Forward


class Turns:
    """A queue of learning steps.

    Args:
        patience: seconds that a client may hold its turn before it loses the connection.
    """

    def __init__(self, patience: float = 120.0) -> None:
        self._patience = patience
        self._holder: int | None = None
        self._since = 0.0
        self._waiting: deque[tuple[int, Forward]] = deque()

    @property
    def holder(self) -> int | None:
        """The connection whose turn it is."""
        return self._holder

    def take(self, connection: int, message: Forward, now: float) -> bool:
        """Whether the step may run now; otherwise it is queued.

        Another step of the holder's own does not give it more time: it has its turn until its backward, or its patience ends.

        Raises:
            RemoteProtocolError: SS-4025 when this connection has a step in the queue already.
        """
        if self._holder == connection:
            return True
        if self._holder is None:
            self._holder, self._since = connection, now
            return True
        if any(waiting == connection for waiting, _ in self._waiting):
            raise RemoteProtocolError("SS-4025", "a client sent a learning step while another of its own waits")
        self._waiting.append((connection, message))
        return False

    def release(self, connection: int, now: float) -> tuple[int, Forward] | None:
        """The holder is done or gone: whose step runs next, if anybody's."""
        if self._holder != connection:
            return None
        self._holder = None
        if not self._waiting:
            return None
        following, message = self._waiting.popleft()
        self._holder, self._since = following, now
        return following, message

    def forget(self, connection: int, now: float) -> tuple[int, Forward] | None:
        """The connection is gone: drop what it queued, and release its turn."""
        self._waiting = deque((c, m) for c, m in self._waiting if c != connection)
        return self.release(connection, now)

    def move(self, old: int, new: int) -> None:
        """A client has come back over another connection: what it held it holds; what it had queued it will say again."""
        self._waiting = deque((c, m) for c, m in self._waiting if c != old)
        if self._holder == old:
            self._holder = new

    def hold(self, connection: int, now: float) -> None:
        """Give the turn to a client that had it before the server was started again, or begin its patience anew."""
        self._holder, self._since = connection, now

    def overdue(self, now: float) -> int | None:
        """The connection that has held its turn too long, or None."""
        return self._holder if self._holder is not None and now - self._since > self._patience else None
