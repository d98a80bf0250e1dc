"""What a server core asks its shell to do. The core never touches a socket, a thread or a clock.

The same core runs under the TLS shell (securesplit/transport/server.py) and under the in-memory twin
(securesplit/transport/memory.py); both carry out these three actions in order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from securesplit.errors import LocalProtocolError, SecureSplitError
from securesplit.protocol.session import Party

_log = logging.getLogger(__name__)

__all__ = ["Action", "Close", "Core", "Send", "Work"]


@dataclass(frozen=True, slots=True)
class Send:
    """Send one whole message to a connection."""

    connection: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Work:
    """Run ``task`` off the event loop, then hand its result to :meth:`Core.complete`.

    Connection 0 is nobody's: the work is the core's own.

    Attributes:
        apart: whether it only waits for a disk, touches nothing of B's, and need not stand in line behind a computation.
    """

    connection: int
    task: Callable[[], object]
    apart: bool = False

    def run(self) -> object:
        """The task's result, or the error of ours that it raised. A foreign error is logged by its type alone."""
        try:
            return self.task()
        except SecureSplitError as error:
            return error
        except Exception as error:  # noqa: BLE001 (a computation must not take the server down)
            _log.error("a computation failed: %s", type(error).__name__)
            return LocalProtocolError("SS-4190", "the server failed inside a computation", hint="See the server's log.")


@dataclass(frozen=True, slots=True)
class Close:
    """Close a connection after what is queued was sent; ``code`` is an SS code, or empty for an orderly end."""

    connection: int
    code: str = ""


Action = Send | Work | Close


class Core(Protocol):
    """What a shell needs from a server."""

    def welcome(self, name: str) -> None:
        """Whether a client of this name may connect at all.

        Raises:
            ConnectionFailed: SS-3214 when it may not.
        """
        ...

    def connect(self, name: str, party: Party) -> int:
        """A client with a verified certificate has connected; returns the connection's number."""
        ...

    def receive(self, connection: int, data: bytes) -> list[Action]:
        """One whole message has arrived. Never raises for what the peer sent."""
        ...

    def allowance(self, connection: int, start: bytes) -> int:
        """The most bytes that a message which begins like this may have now; asked before the rest of it is kept."""
        ...

    def reject(self, connection: int, error: SecureSplitError) -> list[Action]:
        """The shell has found a reason to end this connection."""
        ...

    def complete(self, connection: int, result: object) -> list[Action]:
        """A :class:`Work` has finished."""
        ...

    def disconnect(self, connection: int) -> list[Action]:
        """The connection is gone."""
        ...

    def tick(self, now: float) -> list[Action]:
        """Called a few times a second with a monotonic clock, in seconds."""
        ...
