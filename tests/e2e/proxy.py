"""A TCP proxy that a test can hurt: it cuts, resets, holds and half-closes what goes through it."""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Self

Way = Literal["up", "down"]


@dataclass(frozen=True)
class Limit:
    """Cut a connection once so many bytes have passed; None for no limit."""

    up: int | None = None
    down: int | None = None


class Wire:
    """One connection through the proxy: ``near`` is the client's socket, ``far`` the server's."""

    def __init__(self, near: socket.socket, far: socket.socket, limit: Limit) -> None:
        self.near, self.far = near, far
        self.passed = {"up": 0, "down": 0}
        self._left: dict[Way, int | None] = {"up": limit.up, "down": limit.down}
        self._flow: dict[Way, threading.Event] = {"up": threading.Event(), "down": threading.Event()}
        self._dead = threading.Event()
        self.release()
        self._threads = [
            threading.Thread(target=self._pump, args=(way, source, sink), daemon=True)
            for way, source, sink in (("up", near, far), ("down", far, near))
        ]
        for thread in self._threads:
            thread.start()

    def hold(self, way: Way) -> None:
        """Pass nothing on in this direction, and stop taking it in."""
        self._flow[way].clear()

    def release(self) -> None:
        """Let everything flow again."""
        for flow in self._flow.values():
            flow.set()

    def after(self, way: Way, count: int) -> None:
        """Cut after so many further bytes in this direction."""
        self._left[way] = count

    def cut(self, *, reset: bool = False) -> None:
        """End both sides; what is held is lost."""
        self._dead.set()
        self.release()
        for side in (self.near, self.far):
            self._end(side, reset=reset)

    def cut_near(self) -> None:
        """End the client's side alone; the server goes on believing in the connection."""
        self._dead.set()
        self._end(self.near, reset=True)

    def half_close(self, way: Way) -> None:
        """Say the end of the stream to the receiver of this direction, and go on with the other."""
        (self.far if way == "up" else self.near).shutdown(socket.SHUT_WR)

    @staticmethod
    def _end(side: socket.socket, *, reset: bool) -> None:
        with suppress(OSError):  # It may be closed already, or not connected any more.
            if reset:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                side.shutdown(socket.SHUT_RDWR)
        side.close()

    def _pump(self, way: Way, source: socket.socket, sink: socket.socket) -> None:
        try:
            while not self._dead.is_set():
                if not self._flow[way].wait(0.02) or not select.select([source], [], [], 0.02)[0]:
                    continue
                data = source.recv(1 << 14)
                while not self._flow[way].wait(0.02):
                    if self._dead.is_set():
                        return
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                left = self._left[way]
                if left is not None:
                    data, self._left[way] = data[:left], left - len(data)
                sink.sendall(data)
                self.passed[way] += len(data)
                if left is not None and len(data) == left:
                    self.cut()
        except (OSError, ValueError):  # A socket that was closed under this thread's feet.
            if not self._dead.is_set():
                self.cut()


class Proxy:
    """Listens on a port of its own in front of ``port``."""

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.wires: list[Wire] = []
        self.limits: deque[Limit] = deque()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def url(self) -> str:
        return f"wss://localhost:{self._listening.getsockname()[1]}"

    @property
    def wire(self) -> Wire:
        """The newest connection."""
        return self.wires[-1]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(5)
        for wire in self.wires:
            wire.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.upstream))
            except OSError:
                near.close()
                continue
            self.wires.append(Wire(near, far, self.limits.popleft() if self.limits else Limit()))
