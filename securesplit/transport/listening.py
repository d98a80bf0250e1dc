"""The sockets a server listens on: one for each address of its host, all on one port, each behind the door."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from securesplit.errors import ConnectionFailed
from securesplit.transport.door import Door, GuardedSocket
from securesplit.transport.limits import Limits

__all__ = ["CONNECTIONS", "MOST_PER_CLIENT", "Listen", "open_sockets"]

CONNECTIONS = 64
"""How many at once, unless it is said otherwise."""
MOST_PER_CLIENT = 4
"""Connections of one certificate, unless its limits say otherwise; a lost one may still be counted when its client is back."""
_DEFAULTS = Limits()


@dataclass(frozen=True, slots=True)
class Listen:
    """Where and within which limits to serve.

    Attributes:
        host, port: address; port 0 picks a free one.
        max_message: largest message accepted, in bytes.
        max_connections: more are answered with HTTP 503.
        record: directory for a transcript, or None.
        limits: by address and by client.
    """

    host: str
    port: int
    max_message: int
    max_connections: int = CONNECTIONS
    record: Path | None = None
    limits: Limits = _DEFAULTS


async def open_sockets(host: str, port: int, door: Door, backlog: int) -> tuple[GuardedSocket, ...]:
    """Bind and listen.

    Args:
        host, port: where; port 0 takes a free one, the same for all addresses.
        door: decides who gets in.
        backlog: connections that the system keeps waiting.

    Raises:
        ConnectionFailed: SS-3041 when the address cannot be listened on.
    """
    opened: list[GuardedSocket] = []
    asked = port
    with ExitStack() as undo:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, kind, proto, _, address in dict.fromkeys(found):
                try:
                    opened.append(_bound(family, kind, proto, (address[0], port, *address[2:]), backlog))
                except OSError as error:
                    # Of several addresses of one name some may not exist on this machine, such as ::1 in a container.
                    if error.errno == errno.EADDRINUSE and asked:
                        raise
                    continue
                undo.callback(opened[-1].close)
                opened[-1].door = door
                port = port or int(opened[0].getsockname()[1])
            if not opened:
                raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        except OSError as error:
            why = "the port is taken" if error.errno == errno.EADDRINUSE else type(error).__name__
            raise ConnectionFailed(
                "SS-3041",
                f"cannot listen on {host}, port {port}: {why}",
                hint="Choose another port, or an address of this machine; port 0 picks a free one.",
            ) from None
        undo.pop_all()
    return tuple(opened)


def _bound(family: int, kind: int, proto: int, address: tuple[str | int, ...], backlog: int) -> GuardedSocket:
    made = GuardedSocket(family, kind, proto)
    try:
        if os.name == "posix":
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.settimeout(0)
        made.bind(address)
        made.listen(backlog)
    except BaseException:
        made.close()
        raise
    return made
