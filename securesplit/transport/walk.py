"""From an address to a signed Welcome, one step at a time, each with its own answer: where exactly does it end?"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from securesplit.errors import ConnectionFailed, SecureSplitError
from securesplit.pki.certificate import verify_signature
from securesplit.pki.identity import read_certificate
from securesplit.pki.store import KeyFolder
from securesplit.protocol.codec import Caps
from securesplit.protocol.messages import Bye, Failure, Welcome
from securesplit.protocol.session import Party, Session
from securesplit.transport.checkup import Check, failed
from securesplit.transport.client import WebSocketPipe, host_of, open_pipe
from securesplit.transport.quantum import X25519MLKEM768, chosen_group, group_name
from securesplit.transport.tls import client_context

__all__ = ["walk"]

_WELCOME = 1 << 20
_NOBODY = "0" * 64
_SKEW_SECONDS = 60.0


def walk(url: str, folder: KeyFolder, *, timeout: float = 10.0) -> Iterator[Check]:
    """Connect as a client does, and stop at the first step that fails. No job is admitted and nothing private is sent.

    Args:
        url: ``wss://host:port``.
        folder: the client's keys.
        timeout: for each step, in seconds.

    Raises:
        InputError: SS-1140 when the address is not a wss:// URL.
    """
    host, port = host_of(url), urlsplit(url).port or 443
    begun = time.monotonic()
    try:
        wire = socket.create_connection((host, port), timeout)
    except OSError as error:
        what = f"{host}, port {port}: {type(error).__name__}"
        yield Check("tcp", "fail", what, "Check the name, the port, the firewall, and that the server runs.", "SS-3033")
        return
    yield Check("tcp", "ok", f"{host}, port {port} answers in {1000 * (time.monotonic() - begun):.0f} ms")
    groups: list[int] = []
    context = client_context(folder)
    _listen_to(context, groups)
    try:
        pipe = open_pipe(url, folder, max_message=_WELCOME, timeout=timeout, context=context, wire=wire)
    except SecureSplitError as error:
        yield failed(_step_of(error), error)
        return
    try:
        yield from _seen(pipe, groups)
        yield _greeted(pipe, folder, timeout)
    finally:
        pipe.close()


def _seen(pipe: WebSocketPipe, groups: list[int]) -> Iterator[Check]:
    group = groups[-1] if groups else None
    name = "an unknown group" if group is None else group_name(group)
    yield Check("handshake", "ok", f"{pipe.tls_version}, keys exchanged by {name}")
    if group is not None and group != X25519MLKEM768:
        hint = "OpenSSL 3.5 or later is needed on both ends."
        yield Check("key-exchange", "warn", f"{name} does not withstand a quantum computer", hint)
    leaf = read_certificate(pipe.peer)
    left = (leaf.not_valid_after_utc - datetime.now(UTC)).total_seconds() / 86400
    yield Check("server", "ok" if left > 7 else "warn", f"{pipe.identity.uri}, good for {left:.1f} more days")
    try:
        there = parsedate_to_datetime(pipe.date)
    except (TypeError, ValueError):
        return
    skew = (datetime.now(UTC) - there).total_seconds()
    said = f"this clock and the server's differ by {abs(skew):.0f} s"
    if abs(skew) > _SKEW_SECONDS:
        yield Check("clocks", "warn", said, "Set both; certificates are refused when the difference grows.", "SS-3204")
    else:
        yield Check("clocks", "ok", said)


def _greeted(pipe: WebSocketPipe, folder: KeyFolder, timeout: float) -> Check:
    """The application's handshake as far as the server's signature."""
    party = Party(folder.cert_der, pipe.peer, folder.sign, verify_signature)
    session = Session("client", party, Caps(message_bytes=_WELCOME))
    session.hail(nonce=os.urandom(32), policy=_NOBODY)
    try:
        for data in session.data_to_send():
            pipe.send(data)
        answer = session.receive(pipe.receive(timeout))
        if isinstance(answer, Failure):
            raise ConnectionFailed(
                answer.code, "the server ended the session with this code", hint=f"securesplit explain {answer.code}"
            )
        assert isinstance(answer, Welcome)
        assert session.job is not None
        session.send(Bye())
        for data in session.data_to_send():
            pipe.send(data)
    except SecureSplitError as error:
        return failed("hello", error)
    return Check("hello", "ok", f"the server signed its job '{session.job.name}', digest {session.job.digest[:16]}")


def _step_of(error: SecureSplitError) -> str:
    """Which step an error belongs to."""
    if error.code.startswith("SS-32") or error.code in {"SS-3301", "SS-3306"}:
        return "admission"
    return "handshake" if error.code.startswith("SS-33") else "websocket"


def _listen_to(context: ssl.SSLContext, groups: list[int]) -> None:
    """Note the group of each ServerHello. There is no public way before Python 3.15; without this one it stays unknown."""

    def heard(
        _connection: object, direction: str, _version: object, kind: object, _message: object, data: bytes
    ) -> None:
        if direction == "read" and kind == _HANDSHAKE and (group := chosen_group(data)) is not None:
            groups.append(group)

    if hasattr(context, "_msg_callback"):
        context._msg_callback = heard  # noqa: SLF001


_HANDSHAKE = 22
