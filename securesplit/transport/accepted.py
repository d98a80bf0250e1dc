"""One TCP connection from its acceptance until its owner is known, and the farewell of one that is refused.

Python's event loop closes a refused TLS connection without the alert that says why. The alert is there, in OpenSSL's
outgoing buffer, and nobody sends it; :meth:`Accepted.part` does. The peer would still often lose it: it has sent its first
request by then, and a socket that is closed with unread bytes in it resets the connection, which throws away what the
peer has not read. So a copy of the socket stays open for a moment, and what arrives there is read and forgotten.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address

__all__ = ["ACCEPTED", "Accepted", "host_key"]


@dataclass(slots=True, eq=False)
class Accepted:
    """A connection whose owner is not known yet.

    Attributes:
        wire: the socket that the event loop reads.
        host: numeric address of the peer.
        port: its port.
        since: monotonic clock.
        secured: whether its TLS handshake is done.
        refused: whether somebody has said already why it ended.
    """

    wire: socket.socket = field(repr=False)
    host: str
    port: int
    since: float
    secured: bool = False
    refused: bool = False
    lingering: socket.socket | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """``host:port``, IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def gone(self) -> bool:
        """Whether the event loop has closed the socket."""
        return self.wire.fileno() < 0

    def part(self, alert: bytes) -> None:
        """Send a last TLS record past the event loop, and keep the connection open until the peer can have read it."""
        with suppress(OSError):
            self.wire.send(alert, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            self.lingering = self.wire.dup()
            self.lingering.settimeout(0)
            self.lingering.shutdown(socket.SHUT_WR)

    def heard_out(self) -> bool:
        """Throw away what a refused peer still sends; True when it has closed, too."""
        if self.lingering is None:
            return True
        try:
            for _ in range(16):
                if not self.lingering.recv(1 << 16):
                    break
            else:
                return False
        except BlockingIOError:
            return False
        except OSError:
            pass
        self.let_go()
        return True

    def let_go(self) -> None:
        """Close what is still open of it."""
        if self.lingering is not None:
            self.lingering.close()
            self.lingering = None


ACCEPTED: ContextVar[Accepted | None] = ContextVar("securesplit.accepted", default=None)
"""Whose callback runs. The loop copies the context of an accepted connection into all that follows from it."""


def host_key(host: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 of an IPv6 one, which one customer has all of."""
    try:
        found: IPv4Address | IPv6Address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(IPv6Address(int(found) >> 64 << 64)) + "/64"
    return str(found)
