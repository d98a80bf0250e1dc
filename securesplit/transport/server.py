"""The server's TLS websocket shell: it moves bytes between sockets and a core, and does nothing else.

The event loop never computes: :class:`Work` runs in one worker thread (a 4 s computation on the loop was measured to
lose a connection to its own ping timeout). Each connection has a bounded outbox and a writer of its own, so that a slow
peer holds up nobody but itself; who does not take its answers is not read either.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import cast

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from securesplit.errors import ConnectionFailed, RemoteProtocolError
from securesplit.pki.certificate import verify_signature
from securesplit.pki.identity import Identity, read_certificate
from securesplit.protocol.session import Party
from securesplit.protocol.transcript import Recorder
from securesplit.transport.actions import Action, Close, Core, Work
from securesplit.transport.buckets import Rates
from securesplit.transport.client import FRAGMENT, SUBPROTOCOL
from securesplit.transport.door import Door
from securesplit.transport.listening import CONNECTIONS, MOST_PER_CLIENT, Listen, open_sockets
from securesplit.transport.peer import FAREWELL, Peer
from securesplit.transport.progress import Wire
from securesplit.transport.record import Record, Stage, stage_of
from securesplit.transport.refresh import Refresher
from securesplit.transport.refusal import Refusal
from securesplit.transport.silence import PING_SECONDS, limit
from securesplit.transport.tls import ContextHolder, folder_of, peer_identity

_log = logging.getLogger(__name__)
__all__ = ["CONNECTIONS", "MOST_PER_CLIENT", "Listen", "Shell"]

_TICK = 0.25
_SYNC = 1.0


class Shell:
    """Runs one core behind one listening socket.

    Args:
        core: the server.
        tls: the server's keys and TLS context, exchanged while it runs when their files change.
        listen: address and limits.
        record: where refusals and connections are written down.
    """

    def __init__(self, core: Core, tls: ContextHolder, listen: Listen, record: Record | None = None) -> None:
        self._core = core
        self._tls = tls
        self._listen = listen
        self._record = record or Record()
        self._peers: dict[int, Peer] = {}
        self._ticks: set[asyncio.Task[None]] = set()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="middle")
        self._door = Door(listen.limits.handshakes, self._turned_away)
        self._refresher = Refresher(tls, self._record)
        self._rates = Rates(listen.limits)
        tls.on_refusal = self._refused

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
                ready(await self._open(stack))
                synced = 0.0
                while not stop.is_set():
                    now = time.monotonic()
                    self._record.tick(now)
                    await self._tick()
                    self._door.sweep()
                    self._inspect()
                    if now - synced > _SYNC:
                        synced = now
                        await asyncio.get_running_loop().run_in_executor(None, self._record.sync)
                    try:
                        await asyncio.wait_for(stop.wait(), _TICK)
                    except TimeoutError:
                        continue
                await asyncio.gather(*self._ticks)
        finally:
            self._record.finish()
            self._door.close()
            self._worker.shutdown(wait=True)

    async def _tick(self) -> None:
        """Let the core look at the clock. What that makes it compute must not hold the clock up; what failed is raised."""
        for task in [task for task in self._ticks if task.done()]:
            self._ticks.remove(task)
            await task
        if actions := self._core.tick(time.monotonic()):
            self._ticks.add(asyncio.create_task(self._perform(actions)))

    async def _open(self, stack: AsyncExitStack) -> int:
        # All clients may come back at once.
        sockets = await open_sockets(self._listen.host, self._listen.port, self._door, self._listen.max_connections)
        port = int(sockets[0].getsockname()[1])
        for listening in sockets:
            await stack.enter_async_context(
                serve(
                    self._handle,  # type: ignore[arg-type]  # its connections are of the class below
                    sock=listening,
                    ssl=self._tls.listening,
                    create_connection=Wire,
                    subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]  # a NewType over str
                    compression=None,
                    max_size=(self._listen.max_message, 2 * FRAGMENT),
                    max_queue=4,
                    write_limit=1 << 20,
                    open_timeout=self._listen.limits.handshakes.seconds,
                    close_timeout=FAREWELL,
                    ping_interval=PING_SECONDS,
                    ping_timeout=None,  # A pong may wait behind a message that moves; Peer.stalled looks at bytes instead.
                    backlog=self._listen.max_connections,
                    process_request=self._admit,
                    server_header=None,
                )
            )
        return port

    def _admit(self, socket: ServerConnection, request: Request) -> Response | None:
        del request
        wire = cast("Wire", socket)
        if wire.visitor is not None:
            self._door.known(wire.visitor)
        if len(self._peers) >= self._listen.max_connections:
            return self._answer(wire, HTTPStatus.SERVICE_UNAVAILABLE, "SS-3040", "http")
        if self._record.fault is not None:
            return self._answer(wire, HTTPStatus.SERVICE_UNAVAILABLE, self._record.fault.code, "http")
        try:
            identity, party = self._identify(wire)
        except ConnectionFailed as error:
            return self._answer(wire, HTTPStatus.FORBIDDEN, error.code, "identity")
        try:
            self._core.welcome(identity.name)
        except ConnectionFailed as error:
            return self._answer(wire, HTTPStatus.FORBIDDEN, error.code, "identity", peer=identity.uri)
        wire.owner = identity, party
        return None

    def _answer(self, wire: Wire, status: HTTPStatus, code: str, stage: Stage, peer: str = "") -> Response:
        self._record.refused(stage, code, wire.address, peer=peer)
        refusal = wire.respond(status, f"{code}: securesplit explain {code}\n")
        refusal.headers["X-SecureSplit"] = code
        return refusal

    async def _handle(self, wire: Wire) -> None:
        if wire.subprotocol != SUBPROTOCOL:
            self._record.refused("http", "SS-3031", wire.address)
            await wire.close(4400, "SS-3031")
            return
        assert wire.owner is not None
        identity, party = wire.owner
        with suppress(OSError):  # It may have gone in the meantime, which the loop below finds out.
            limit(wire.transport.get_extra_info("socket"))
        self._displace(identity.name)
        number = self._core.connect(identity.name, party)
        recorder = Recorder(self._listen.record, peer=identity.name, number=number) if self._listen.record else None
        peer = self._peers[number] = Peer(
            identity.name, identity.uri, wire.address, read_certificate(party.peer).not_valid_after_utc, party.peer, wire,
            recorder, self._listen.limits.progress,
        )  # fmt: skip
        self._record.accepted(number, peer.address, peer.uri, party.peer)
        if folder_of(wire.transport.get_extra_info("ssl_object")) is not self._tls.folder:
            self._revalidate(number, peer)  # The keys were exchanged while the handshake was under way.
        writer = asyncio.create_task(peer.write())
        try:
            while True:
                await self._serve(number, peer)
        except ConnectionClosed:
            pass
        finally:
            self._peers.pop(number, None)
            writer.cancel()
            if recorder:
                recorder.close()
            await self._perform(self._core.disconnect(number))
            self._record.closed(number, peer.uri, peer.code, up=peer.up, down=peer.down)

    async def _serve(self, number: int, peer: Peer) -> None:
        """One message: read it, within what this client may send now; hand it to the core; keep to its pace."""
        parts: list[bytes] = []
        size, most = 0, self._listen.max_message
        async for part in peer.wire.recv_streaming():
            peer.within = True
            if peer.deaf:
                continue
            if isinstance(part, str):
                self._put_out(number, peer, "SS-4001")
                continue
            if not parts:
                most = self._core.allowance(number, part[:8])
            size += len(part)
            if size > most:
                parts.clear()
                self._put_out(number, peer, "SS-4002")
                continue
            parts.append(part)
        peer.within = False
        if peer.deaf:
            return
        peer.up += size
        data = b"".join(parts)
        if peer.recorder:
            peer.recorder.record(0, time.time_ns(), data)
        if not self._record.sound:
            self._put_out(number, peer, "SS-1585")
            return
        await self._perform(self._core.receive(number, data))
        if wait := self._rates.wait(peer.name, size, time.monotonic()):
            await asyncio.sleep(min(wait, 60.0))
        await peer.room()

    def _displace(self, name: str) -> None:
        """Make room for a client's new connection at the cost of its own oldest one, never of another client's."""
        most = self._listen.limits.of(name).connections or self._listen.max_connections
        mine = [number for number, peer in self._peers.items() if peer.name == name]
        for number in mine[: max(0, len(mine) - most + 1)]:
            peer = self._peers[number]
            peer.code = peer.code or "SS-3054"
            self._record.refused("limit", "SS-3054", peer.address, peer=peer.uri, connection=number)
            self._record.quota("SS-3054", most, peer.address, peer=peer.uri, connection=number)
            peer.wire.transport.abort()

    @staticmethod
    def _identify(wire: Wire) -> tuple[Identity, Party]:
        tls = wire.transport.get_extra_info("ssl_object")
        identity, folder = peer_identity(tls, "client"), folder_of(tls)
        return identity, Party(folder.cert_der, tls.getpeercert(binary_form=True), folder.sign, verify_signature)

    def _inspect(self) -> None:
        """Pick up changed keys; put out who is not valid any more, and who stands still. Nobody else notices."""
        reloaded, now, loop_now = self._refresher.look(), datetime.now(UTC), asyncio.get_running_loop().time()
        for number, peer in list(self._peers.items()):
            if peer.deaf:
                continue
            if reloaded or peer.not_after <= now:
                self._revalidate(number, peer)
            elif code := peer.stalled(loop_now):
                self._put_out(number, peer, code)

    def _revalidate(self, number: int, peer: Peer) -> None:
        try:
            self._tls.require_valid(peer.leaf)
        except ConnectionFailed as error:
            self._put_out(number, peer, error.code)

    def _put_out(self, number: int, peer: Peer, code: str) -> None:
        """End a connection from this side, for a reason that the core does not know."""
        for action in self._core.reject(number, RemoteProtocolError(code, "put out by the shell")):
            if not isinstance(action, Work):
                self._queue(peer, action)

    async def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            peer = self._peers.get(action.connection)
            if isinstance(action, Work):
                where = None if action.apart else self._worker
                result = await asyncio.get_running_loop().run_in_executor(where, action.run)
                await self._perform(self._core.complete(action.connection, result))
            elif peer is not None:
                self._queue(peer, action)

    def _queue(self, peer: Peer, action: Action) -> None:
        assert not isinstance(action, Work)
        if isinstance(action, Close) and action.code and not peer.code:
            self._record.refused(
                stage_of(action.code), action.code, peer.address, peer=peer.uri, connection=action.connection
            )
        if not peer.put(action):
            peer.code = peer.code or "SS-4027"
            self._record.refused("limit", "SS-4027", peer.address, peer=peer.uri, connection=action.connection)

    def _refused(self, refusal: Refusal) -> None:
        self._record.refused("tls", refusal.code, refusal.address)

    def _turned_away(self, stage: str, code: str, address: str) -> None:
        self._record.refused(cast("Stage", stage), code, address)
