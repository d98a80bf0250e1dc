"""The client's TLS websocket: blocking calls over websockets' threaded client.

A background thread of the library answers pings, so a long computation in the caller's thread does not lose the
connection. No proxy is taken from the environment, nothing is compressed, and only the pinned CA is trusted.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from http import HTTPStatus
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus, InvalidURI
from websockets.frames import CloseCode
from websockets.sync.client import ClientConnection, connect

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.identity import Identity, read_certificate
from securesplit.pki.store import KeyFolder
from securesplit.transport.refusal import diagnose, hearing
from securesplit.transport.silence import PING_SECONDS, PONG_SECONDS, limit
from securesplit.transport.tls import client_context, peer_identity

SUBPROTOCOL = "securesplit.v1"
FRAGMENT = 1 << 20
_LOOK = 2.0
_CODE = re.compile(r"SS-3[0-9]{3}")


class WebSocketPipe:
    """One connection. See :class:`securesplit.transport.pipe.Pipe`.

    Attributes:
        date: what the server's clock said, as HTTP writes it; empty when it said nothing.
        peer: the server's leaf certificate, DER, verified by TLS.
        identity: what that certificate says, verified to be a server of our own trust domain.
        tls_version: as negotiated, such as ``TLSv1.3``.
    """

    def __init__(self, socket: ClientConnection, closing: ExitStack, folder: KeyFolder) -> None:
        self._socket = socket
        self._closing = closing
        self._folder = folder
        self._stamps, self._looked = folder.stamps(), time.monotonic()
        self.date = "" if socket.response is None else socket.response.headers.get("Date", "")
        wire = socket.socket
        assert isinstance(wire, ssl.SSLSocket)
        try:
            leaf = wire.getpeercert(binary_form=True)
            self.identity: Identity = peer_identity(wire, "server")
            limit(wire)
        except (OSError, ValueError, AttributeError):  # What a socket raises that another thread has closed meanwhile.
            leaf = None
        if leaf is None:
            raise ConnectionFailed("SS-3020", "the connection was closed", hint="See the server's log.")
        self.peer = leaf
        self._until = read_certificate(leaf).not_valid_after_utc
        self.tls_version = wire.version() or "none"

    def send(self, data: bytes) -> None:
        """Send one message in fragments of at most 1 MiB, so that pings pass between them."""
        self._require_valid()
        view = memoryview(data)
        try:
            self._socket.send(view[i : i + FRAGMENT] for i in range(0, len(view), FRAGMENT))
        except ConnectionClosed as error:
            raise _gone(error) from None

    def receive(self, timeout: float | None = None) -> bytes:
        """Wait for one message."""
        try:
            data = self._socket.recv(timeout)
        except TimeoutError:
            raise ConnectionFailed(
                "SS-3021", f"nothing arrived within {timeout or 0:.0f} s", hint="The server may be busy; see its log."
            ) from None
        except ConnectionClosed as error:
            raise _gone(error) from None
        if isinstance(data, str):
            raise ConnectionFailed("SS-3022", "the server sent a text message, which this protocol does not have")
        return data

    def close(self) -> None:
        """Close in order."""
        self._closing.close()

    def _require_valid(self) -> None:
        """Send nothing to a server whose certificate ran out, or was revoked, since the handshake.

        A revocation counts once the list in this client's folder, or beside it, names the server.
        """
        now = time.monotonic()
        if datetime.now(UTC) > self._until:
            raise ConnectionFailed(
                "SS-3203",
                "the server's certificate has expired during the session",
                hint="Its operator has to renew it.",
            )
        if now - self._looked < _LOOK or (stamps := self._folder.stamps()) == self._stamps:
            return
        self._looked = now
        try:
            folder = self._folder.reopen()
        except ConnectionFailed:
            return  # Half exchanged; it is looked at again. The session stands on what was checked when it began.
        folder.verify_peer(self.peer, "server")
        self._folder, self._stamps = folder, stamps


def open_pipe(
    url: str, folder: KeyFolder, *, max_message: int, timeout: float = 20.0, context: ssl.SSLContext | None = None,
    wire: socket.socket | None = None,
) -> WebSocketPipe:  # fmt: skip
    """Connect, verify the server, and say why when that fails.

    Args:
        url: ``wss://host:port``.
        folder: the client's keys.
        max_message: largest message to accept, in bytes.
        timeout: for TCP, TLS and the websocket handshake together, in seconds.
        context: from :func:`securesplit.transport.tls.client_context`, when the caller wants to listen in.
        wire: a TCP connection to the server, when there is one already.

    Raises:
        InputError: SS-1140 for a URL that is not wss.
        ConnectionFailed: SS-30xx, or the cause that the server's alert or its answer, and local checks, can name.
    """
    host_of(url)
    closing = ExitStack()
    alerts: list[ssl.SSLError] = []
    context = context or client_context(folder)
    context.sslsocket_class = hearing(alerts)
    try:
        opened = closing.enter_context(
            connect(
                url,
                sock=wire,
                ssl=context,
                subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]  # a NewType over str
                compression=None,
                proxy=None,
                user_agent_header=None,
                open_timeout=timeout,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                max_size=(max_message, 2 * FRAGMENT),
            )
        )
    except InvalidStatus as error:
        reason = error.response.headers.get("X-SecureSplit", "")
        if error.response.status_code == HTTPStatus.FORBIDDEN and _CODE.fullmatch(reason):
            raise ConnectionFailed(
                reason, "the server refused this client with this code", hint=f"securesplit explain {reason}"
            ) from None
        raise ConnectionFailed(
            "SS-3030",
            f"the server refused the connection (HTTP {error.response.status_code}{': ' + reason if reason.startswith('SS-') else ''})",
        ) from None
    except (ssl.SSLError, InvalidMessage, ConnectionClosed, EOFError, ConnectionResetError, BrokenPipeError) as error:
        raise diagnose(folder, alerts[0] if alerts else error) from None
    except InvalidURI:
        raise InputError("SS-1140", "the server's address is not a wss:// URL", hint="Use wss://host:port.") from None
    except InvalidHandshake:
        raise ConnectionFailed(
            "SS-3031", "the server does not speak securesplit.v1", hint="Check the address and the port."
        ) from None
    except TimeoutError:
        raise ConnectionFailed(
            "SS-3032", f"the server did not answer within {timeout:.0f} s", hint="Check the address and the firewall."
        ) from None
    except OSError as error:
        raise ConnectionFailed(
            "SS-3033", f"cannot reach the server: {type(error).__name__}", hint="Is it running, and on this port?"
        ) from None
    return _admitted(opened, closing, folder)


def host_of(url: str) -> str:
    """The host of a server's address.

    Raises:
        InputError: SS-1140 when it is not ``wss://host`` or ``wss://host:port``.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        # Brackets that do not match, or a port that is no number up to 65535.
        host, port = None, None
    if not host or parts.scheme != "wss" or port == 0:
        raise InputError(
            "SS-1140", "the server's address is not a wss:// URL", hint="Plaintext is not offered: use wss://host:port."
        )
    return host


def _admitted(socket: ClientConnection, closing: ExitStack, folder: KeyFolder) -> WebSocketPipe:
    if socket.subprotocol != SUBPROTOCOL:
        closing.close()
        raise ConnectionFailed(
            "SS-3031", "the server does not speak securesplit.v1", hint="Check the address and the port."
        )
    try:
        return WebSocketPipe(socket, closing, folder)
    except ConnectionFailed:
        closing.close()
        raise


def _gone(error: ConnectionClosed) -> ConnectionFailed:
    close = error.rcvd
    reason = close.reason if close is not None and close.reason.startswith("SS-") else ""
    if close is not None and close.code == CloseCode.MESSAGE_TOO_BIG:
        # The library itself ends such a connection, and knows none of our codes.
        reason = "SS-4002"
    because = f" ({reason})" if reason else ""
    return ConnectionFailed(
        "SS-3020",
        f"the connection was closed{because}",
        hint=f"securesplit explain {reason}" if reason else "See the server's log.",
    )
