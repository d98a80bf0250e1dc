"""The server's TLS websocket shell: it moves bytes between sockets and a core, and does nothing else.

The event loop never computes: :class:`Work` runs in one worker thread (a 4 s computation on the loop was measured to
lose a connection to its own ping timeout). Each connection has a bounded outbox and a writer of its own, so that a slow
peer holds up nobody but itself.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from securesplit.errors import ConnectionFailed
from securesplit.pki.certificate import verify_signature
from securesplit.protocol.session import Party
from securesplit.protocol.transcript import Recorder
from securesplit.transport.actions import Action, Close, Core, Send, Work
from securesplit.transport.client import FRAGMENT, SUBPROTOCOL
from securesplit.transport.silence import PING_SECONDS, PONG_SECONDS, limit
from securesplit.transport.tls import ContextHolder, folder_of, peer_identity

_log = logging.getLogger(__name__)
MOST_PER_CLIENT = 4
"""Connections of one certificate; a lost one may still be counted when its client comes back."""

_OUTBOX = 64
_TICK = 0.25
_FAREWELL = 5.0

CONNECTIONS = 64
"""How many at once, unless it is said otherwise."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Where and within which limits to serve.

    Attributes:
        host, port: address; port 0 picks a free one.
        max_message: largest message accepted, in bytes.
        max_connections: more are answered with HTTP 503.
        record: directory for a transcript, or None.
    """

    host: str
    port: int
    max_message: int
    max_connections: int = CONNECTIONS
    record: Path | None = None


@dataclass(slots=True)
class _Peer:
    name: str
    socket: ServerConnection
    recorder: Recorder | None
    outbox: asyncio.Queue[bytes | Close] = field(default_factory=lambda: asyncio.Queue(_OUTBOX))


class Shell:
    """Runs one core behind one listening socket.

    Args:
        core: the server.
        tls: the server's keys and TLS context, exchanged while it runs when their files change.
        listen: address and limits.
    """

    def __init__(self, core: Core, tls: ContextHolder, listen: Listen) -> None:
        self._core = core
        self._tls = tls
        self._listen = listen
        self._peers: dict[int, _Peer] = {}
        self._ticks: set[asyncio.Task[None]] = set()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="middle")

    async def run(self, stop: asyncio.Event, ready: Callable[[int], None]) -> None:
        """Serve until ``stop`` is set.

        Args:
            stop: set it to end.
            ready: called once with the port.

        Raises:
            ConnectionFailed: SS-3041 when the address cannot be listened on.
        """
        try:
            async with AsyncExitStack() as stack:
                server = await self._open(stack)
                ready(next(iter(server.sockets)).getsockname()[1])
                while not stop.is_set():
                    await self._tick()
                    self._refresh()
                    try:
                        await asyncio.wait_for(stop.wait(), _TICK)
                    except TimeoutError:
                        continue
                await asyncio.gather(*self._ticks)
        finally:
            self._worker.shutdown(wait=True)

    async def _tick(self) -> None:
        """Let the core look at the clock. What that makes it compute must not hold the clock up; what failed is raised."""
        for task in [task for task in self._ticks if task.done()]:
            self._ticks.remove(task)
            await task
        if actions := self._core.tick(time.monotonic()):
            self._ticks.add(asyncio.create_task(self._perform(actions)))

    async def _open(self, stack: AsyncExitStack) -> Server:
        listening = serve(
            self._handle,
            self._listen.host,
            self._listen.port,
            ssl=self._tls.listening,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]  # a NewType over str
            compression=None,
            max_size=(self._listen.max_message, 2 * FRAGMENT),
            max_queue=4,
            write_limit=1 << 20,
            open_timeout=10,
            close_timeout=_FAREWELL,
            ping_interval=PING_SECONDS,
            ping_timeout=PONG_SECONDS,
            backlog=self._listen.max_connections,  # All clients may come back at once.
            process_request=self._admit,
            server_header=None,
        )
        try:
            return await stack.enter_async_context(listening)
        except OSError as error:
            why = "the port is taken" if error.errno == errno.EADDRINUSE else type(error).__name__
            raise ConnectionFailed(
                "SS-3041",
                f"cannot listen on {self._listen.host}, port {self._listen.port}: {why}",
                hint="Choose another port, or an address of this machine; port 0 picks a free one.",
            ) from None

    def _admit(self, socket: ServerConnection, request: Request) -> Response | None:
        del request
        if len(self._peers) < self._listen.max_connections:
            return None
        refusal = socket.respond(
            HTTPStatus.SERVICE_UNAVAILABLE, "SS-3040: the server has no room for another connection\n"
        )
        refusal.headers["X-SecureSplit"] = "SS-3040"
        return refusal

    async def _handle(self, socket: ServerConnection) -> None:
        if socket.subprotocol != SUBPROTOCOL:
            await socket.close(4400, "SS-3031")
            return
        try:
            name, party = self._identify(socket)
        except ConnectionFailed as error:
            _log.warning("refused a connection: %s", error)
            await socket.close(4403, error.code)
            return
        with suppress(OSError):  # It may have gone in the meantime, which the loop below finds out.
            limit(socket.transport.get_extra_info("socket"))
        self._displace(name)
        number = self._core.connect(name, party)
        recorder = Recorder(self._listen.record, peer=name, number=number) if self._listen.record else None
        peer = self._peers[number] = _Peer(name, socket, recorder)
        _log.info("connection %d: %s", number, name)
        writer = asyncio.create_task(self._write(peer))
        try:
            async for data in socket:
                if isinstance(data, str):
                    _log.warning("connection %d (%s) is closed: a text message", number, name)
                    await socket.close(4400, "SS-4001")
                    break
                if recorder:
                    recorder.record(0, time.time_ns(), data)
                await self._perform(self._core.receive(number, data))
        except ConnectionClosed:
            pass
        finally:
            self._peers.pop(number, None)
            writer.cancel()
            if recorder:
                recorder.close()
            await self._perform(self._core.disconnect(number))
            _log.info("connection %d: closed", number)

    def _displace(self, name: str) -> None:
        """Make room for a client's new connection at the cost of its own oldest one, never of another client's."""
        mine = [number for number, peer in self._peers.items() if peer.name == name]
        for number in mine[: max(0, len(mine) - MOST_PER_CLIENT + 1)]:
            _log.warning("connection %d gives way to a newer one of %s", number, name)
            self._peers[number].socket.transport.abort()

    @staticmethod
    def _identify(socket: ServerConnection) -> tuple[str, Party]:
        tls = socket.transport.get_extra_info("ssl_object")
        identity, folder = peer_identity(tls, "client"), folder_of(tls)
        return identity.name, Party(folder.cert_der, tls.getpeercert(binary_form=True), folder.sign, verify_signature)

    def _refresh(self) -> None:
        """Pick up changed certificates and revocations; close who is not valid any more. Nobody else notices."""
        if not self._tls.changed():
            return
        try:
            self._tls.reload()
        except ConnectionFailed as error:
            _log.error("the changed key folder is not usable, the old one stays in force: %s", error)
            return
        _log.info("certificates reloaded")
        for number, peer in self._peers.items():
            leaf = peer.socket.transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
            try:
                self._tls.require_valid(leaf)
            except ConnectionFailed as error:
                _log.warning("connection %d is closed: %s", number, error)
                self._queue(peer, Close(number, error.code))

    async def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            peer = self._peers.get(action.connection)
            if isinstance(action, Work):
                result = await asyncio.get_running_loop().run_in_executor(self._worker, action.run)
                await self._perform(self._core.complete(action.connection, result))
            elif peer is not None:
                self._queue(peer, action)

    @staticmethod
    def _queue(peer: _Peer, action: Send | Close) -> None:
        if isinstance(action, Close):  # One that does not read never takes its farewell; it must be out all the same.
            asyncio.get_running_loop().call_later(_FAREWELL, peer.socket.transport.abort)
        try:
            peer.outbox.put_nowait(action.data if isinstance(action, Send) else action)
        except asyncio.QueueFull:
            _log.warning("connection %d does not read; closing it", action.connection)
            peer.socket.transport.abort()

    async def _write(self, peer: _Peer) -> None:
        try:
            while True:
                item = await peer.outbox.get()
                if isinstance(item, Close):
                    await peer.socket.close(4400 if item.code else 1000, item.code)
                    return
                if peer.recorder:
                    peer.recorder.record(1, time.time_ns(), item)
                view = memoryview(item)
                await peer.socket.send([bytes(view[i : i + FRAGMENT]) for i in range(0, len(view), FRAGMENT)])
        except ConnectionClosed:
            return
