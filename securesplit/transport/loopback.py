"""Sockets of a small HTTP server for programs on this machine: a thread for each connection, and a bound on everything.

It decides nothing: who may go on, what is answered and how a refusal looks is a :class:`Service`'s.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from securesplit.errors import CheckFailed, ConnectionFailed, InputError, SecureSplitError
from securesplit.transport.http import Head, Late, Request, Wire

__all__ = ["Bounds", "Exchange", "Loopback", "Service"]

_log = logging.getLogger(__name__)
Fields = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a peer may use.

    Attributes:
        connections: at once; more are closed at once.
        arriving: seconds for a whole request.
        leaving: seconds for a peer to take one piece of an answer.
        body: bytes of a request.
    """

    connections: int = 32
    arriving: float = 10.0
    leaving: float = 30.0
    body: int = 1 << 20


_DEFAULTS = Bounds()


class Exchange:
    """A request, and the ways to answer it. Whatever is written after the peer went is lost without a word."""

    def __init__(self, sock: socket.socket, wire: Wire, bounds: Bounds) -> None:
        self._socket, self._wire, self._bounds = sock, wire, bounds
        self._lost = False
        self.request: Request | None = None

    def whole(self, status: int, body: bytes, fields: Fields) -> bool:
        """A whole answer; False when the peer is gone."""
        if self._wire.answerable:
            self._send(self._wire.begin(status, fields, length=len(body)) + self._wire.part(body) + self._wire.end())
        return not self._lost

    def begin(self, status: int, fields: Fields) -> bool:
        """The head of an answer that comes in pieces."""
        return self._send(self._wire.begin(status, fields))

    def part(self, data: bytes) -> bool:
        """One piece of it; False when the peer is gone."""
        return self._send(self._wire.part(data))

    def end(self) -> bool:
        """Its end."""
        return self._send(self._wire.end())

    @property
    def begun(self) -> bool:
        """Whether an answer has begun."""
        return not self._wire.answerable

    def gone(self) -> bool:
        """Whether the peer has closed the connection, which is how a program says that it wants no more."""
        if not self._lost:
            try:
                self._socket.settimeout(0)
                self._lost = not self._socket.recv(1, socket.MSG_PEEK)
            except BlockingIOError:  # Nothing to read: it waits.
                pass
            except OSError:
                self._lost = True
        return self._lost

    def arrive(self) -> Request:
        """Read the request.

        Raises:
            Late: SS-1271 when it takes too long. InputError: as :meth:`securesplit.transport.http.Wire.receive`.
            OSError: when the peer is gone.
        """
        deadline = time.monotonic() + self._bounds.arriving
        while self.request is None:
            left = deadline - time.monotonic()
            try:
                if left <= 0:  # Bytes that come one by one are never waited for, and would never be late.
                    raise TimeoutError
                self._socket.settimeout(left)
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                raise Late(
                    "SS-1271",
                    f"the request was not whole after {self._bounds.arriving:g} seconds",
                    hint="Send head and body at once.",
                ) from None
            self.request = self._wire.receive(data)
            if interim := self._wire.interim():
                self._send(interim)
        return self.request

    def close(self) -> None:
        """Close so that the peer reads the answer to its end: with unread bytes about, a plain close would cut it off."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(0.2)
            deadline, unread = time.monotonic() + 1.0, 1 << 20
            while unread > 0 and time.monotonic() < deadline and (data := self._socket.recv(1 << 16)):
                unread -= len(data)
        self._socket.close()

    def _send(self, data: bytes) -> bool:
        if not self._lost:
            try:
                self._socket.settimeout(self._bounds.leaving)
                self._socket.sendall(data)
            except OSError:
                self._lost = True
        return not self._lost


class Service(Protocol):
    """What answers. Its methods run in the connections' threads."""

    def admit(self, head: Head) -> None:
        """Raise for a head that may not go on."""

    def answer(self, exchange: Exchange) -> None:
        """Answer a whole request; what it raises is given to :meth:`refuse`."""

    def refuse(self, exchange: Exchange, error: SecureSplitError) -> None:
        """Answer with a refusal."""


class Loopback:
    """A listening socket.

    Args:
        host, port: a loopback address; port 0 takes a free one.
        beyond: allow an address that other machines reach.
        bounds: what a peer may use.

    Raises:
        InputError: SS-1270 for an address beyond this machine.
        ConnectionFailed: SS-3041 when the address cannot be listened on.
    """

    def __init__(self, host: str, port: int, *, beyond: bool = False, bounds: Bounds = _DEFAULTS) -> None:
        if not (beyond or is_loopback(host)):
            raise InputError(
                "SS-1270",
                "the endpoint listens on this machine's loopback alone: what is asked there is private text, without TLS",
                hint="Use 127.0.0.1 or [::1], and a tunnel for another machine.",
            )
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.create_server(address[:2], family=family, backlog=bounds.connections)
        except OSError as error:
            raise ConnectionFailed(
                "SS-3041",
                f"cannot listen on {host}:{port}: {error.strerror or type(error).__name__}",
                hint="Choose another port.",
            ) from None
        self._bounds = bounds
        self._slots = threading.BoundedSemaphore(bounds.connections)
        self.host, self.port = host, int(self._socket.getsockname()[1])

    def run(self, service: Service, stop: Callable[[], bool]) -> None:
        """Serve until ``stop`` says so; it is asked a few times a second. Requests in progress lose their answer then."""
        self._socket.settimeout(0.2)
        while not stop():
            try:
                peer, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError:  # Too many open files, or a peer that went at once; the next one may do better.
                time.sleep(0.05)
                continue
            if not self._slots.acquire(blocking=False):
                peer.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(peer, service), daemon=True).start()
            except RuntimeError:  # The system has no more threads; those that run give theirs back.
                peer.close()
                self._slots.release()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def _serve(self, peer: socket.socket, service: Service) -> None:
        exchange = Exchange(peer, Wire(service.admit, most_body=self._bounds.body), self._bounds)
        try:
            try:
                exchange.arrive()
                service.answer(exchange)
            except SecureSplitError as error:
                service.refuse(exchange, error)
        except OSError:
            _log.debug("a peer went before it was answered")
        except Exception as error:  # noqa: BLE001 - the text of a foreign error may hold private values, its type cannot
            _log.error("an unexpected %s; this is a defect", type(error).__name__)
            with suppress(Exception):
                defect = "this program has a defect; its log names the kind"
                service.refuse(exchange, CheckFailed("SS-1003", defect, hint="Report it."))
        finally:
            exchange.close()
            self._slots.release()


def is_loopback(host: str) -> bool:
    """Whether a host is this machine and nothing else."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
