"""The client's view of a connection: whole messages out and in, blocking. Two kinds exist, TLS and memory."""

from __future__ import annotations

from typing import Protocol


class Pipe(Protocol):
    """A connection that carries whole messages."""

    def send(self, data: bytes) -> None:
        """Send one message.

        Raises:
            ConnectionFailed: SS-3020 when the connection is gone.
        """
        ...

    def receive(self, timeout: float | None = None) -> bytes:
        """Wait for one message.

        Raises:
            ConnectionFailed: SS-3020 when the connection is gone, SS-3021 after ``timeout`` seconds.
        """
        ...

    def close(self) -> None:
        """Close. May be called more than once."""
        ...
