"""A peer that takes no bytes: when the kernel gives it up.

Pings do not help there. A ping waits behind what is being sent, on both ends of the library, so a connection into which
nothing fits any more (a host without power, a network that swallows packets, a program that does not read) would be held,
and a sending client would hang, for a quarter of an hour or for ever.
"""

from __future__ import annotations

import socket
from asyncio.trsock import TransportSocket

PING_SECONDS = 20
PONG_SECONDS = 60

UNTAKEN_SECONDS: float = PING_SECONDS + PONG_SECONDS
"""How long sent bytes may lie without one of them being taken. A slow network is not meant: there some are."""


def limit(wire: socket.socket | TransportSocket) -> None:
    """Let the kernel end a connection whose peer takes nothing for ``UNTAKEN_SECONDS``.

    Where the system has no such option (it is Linux's), its own patience stands: about 15 minutes without an
    acknowledgement, and no end to a peer that acknowledges and does not read.
    """
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNTAKEN_SECONDS * 1000))
