"""The door: who may begin a handshake. It counts connections before TLS costs anything, and hears how each one ended.

A connection over a limit is closed without a byte: to tell it a reason would cost the handshake that the limit saves.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable

from securesplit.transport.accepted import ACCEPTED, Accepted, host_key
from securesplit.transport.buckets import Buckets
from securesplit.transport.limits import Handshakes

__all__ = ["Door", "GuardedSocket"]

_LINGER = 2.0
_MOST_LINGERING = 128
_AT_ONCE = 64
"""How many connections over a limit are closed before the loop gets its turn again."""


class Door:
    """Counts connections that have not said who they are.

    Args:
        limits: how many.
        refused: told the stage, code and address of each one that came to nothing and has no other reason on record.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        limits: Handshakes,
        refused: Callable[[str, str, str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._refused = refused
        self._clock = clock
        self._buckets = Buckets(limits.per_second_per_address, limits.burst_per_address)
        self._pending: dict[Accepted, str] = {}
        self._per_host: Counter[str] = Counter()
        self._parting: dict[Accepted, float] = {}

    @property
    def pending(self) -> int:
        """Connections that have not said who they are."""
        return len(self._pending)

    def enter(self, wire: socket.socket, host: str, port: int) -> Accepted | None:
        """A connection was accepted: it may go on, or None."""
        now, key = self._clock(), host_key(host)
        visitor = Accepted(wire, host, port, now)
        if not self._buckets.take(key, now):
            self._refused("tcp", "SS-3050", visitor.address)
            return None
        if len(self._pending) >= self._limits.pending or self._per_host[key] >= self._limits.pending_per_address:
            self.sweep()  # What has ended since the last look does not count.
        if len(self._pending) >= self._limits.pending or self._per_host[key] >= self._limits.pending_per_address:
            self._refused("tcp", "SS-3051", visitor.address)
            return None
        self._pending[visitor] = key
        self._per_host[key] += 1
        return visitor

    def known(self, visitor: Accepted) -> None:
        """Its owner is known, or it was told why not: it counts no longer here."""
        visitor.refused = True
        self._forget(visitor)

    def sweep(self) -> None:
        """Call it a few times a second: what ended without a word is put on record, farewells are ended."""
        now = self._clock()
        for visitor in [visitor for visitor in self._pending if visitor.gone]:
            self._forget(visitor)
            if not visitor.refused:
                self._refused("http" if visitor.secured else "tls", "SS-3052", visitor.address)
            elif visitor.lingering is not None:
                self._parting[visitor] = now + _LINGER
        for visitor, until in list(self._parting.items()):
            if visitor.heard_out() or now > until or len(self._parting) > _MOST_LINGERING:
                visitor.let_go()
                del self._parting[visitor]

    def close(self) -> None:
        """Let everybody go."""
        for visitor in (*self._pending, *self._parting):
            visitor.let_go()
        self._parting.clear()

    def _forget(self, visitor: Accepted) -> None:
        key = self._pending.pop(visitor, None)
        if key is not None:
            self._per_host[key] -= 1
            if not self._per_host[key]:
                del self._per_host[key]


class GuardedSocket(socket.socket):
    """A listening socket whose door decides. The event loop calls :meth:`accept`; whom the door turns away it never sees.

    The visitor stands in :data:`ACCEPTED` when the loop makes the connection's task, which copies it into all callbacks.
    """

    door: Door | None = None

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        """The next connection that the door lets in; BlockingIOError when there is none now."""
        for _ in range(_AT_ONCE):
            wire, address = super().accept()
            visitor = self.door.enter(wire, address[0], address[1]) if self.door is not None else None
            if visitor is not None or self.door is None:
                ACCEPTED.set(visitor)
                return wire, address
            wire.close()
        raise BlockingIOError
