"""Hostile bytes on real connections: below our messages, where TLS, HTTP and websocket frames are. An honest client goes on.

Slow lorises and floods by the hundred are in tests/e2e/test_flood.py, handshakes with a flaw in tests/transport/test_matrix.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from securesplit.client.dial import dial
from securesplit.logged import open_journal
from securesplit.transport.tls import client_context
from tests.e2e.house import House, Loopback, batches_of, build_house, sentences
from tests.hostile.kit import DECLARED, POLICY

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: securesplit.v1\r\n%s\r\n"
)
DEFLATE = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> House:
    return build_house(tmp_path_factory.mktemp("sockets") / "house")


@pytest.fixture(scope="module")
def loop(house) -> Iterator[Loopback]:
    """One server for all of them: whatever one test does to it, the next still finds it at work."""
    with open_journal(house.folder("gpu")) as journal:
        core = house.core(house.job(blind=False), POLICY, note=lambda event: journal.append(event, durable=False))
        with Loopback(core, house.keys, journal=journal) as made:
            yield made


@pytest.fixture(autouse=True)
def honest(house, loop):
    """Bob learns before and after, on one connection."""
    with dial(loop.url, keys=house.keys / "bob", policy=POLICY, patience=30) as link:
        client = house.client(link, POLICY)
        client.train("B")
        batch = batches_of(client, sentences(2, seed=1), size=2)[0]
        client.step(batch)
        yield
        assert client.step(batch) > 0
    assert loop.alive


def tcp(loop: Loopback) -> socket.socket:
    return socket.create_connection(("127.0.0.1", loop.port), timeout=20)


def secure(house: House, loop: Loopback) -> ssl.SSLSocket:
    """Past TLS as alice, and nothing said yet."""
    return client_context(house.folder("alice")).wrap_socket(tcp(loop), server_hostname="localhost")


def upgraded(house: House, loop: Loopback, extra: bytes = b"") -> tuple[ssl.SSLSocket, bytes]:
    """Past the websocket handshake; and the server's answer to it."""
    wire = secure(house, loop)
    wire.sendall(UPGRADE % extra)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += wire.recv(4096)
    return wire, answer


def until_closed(wire: socket.socket, seconds: float = 20) -> bytes:
    """All that still comes. Fails when the connection stays open."""
    wire.settimeout(seconds)
    came = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while part := wire.recv(1 << 16):
            came += part
            if b"\x88" in part:  # The server has said its last word, and waits for ours.
                wire.sendall(ws(8, b""))
    wire.close()
    return came


def ws(opcode: int, payload: bytes, *, fin: bool = True, rsv: int = 0, length: int | None = None) -> bytes:
    """A masked frame, by RFC 6455; ``length`` is what it says of itself."""
    size = len(payload) if length is None else length
    first = (0x80 if fin else 0) | rsv | opcode
    head = struct.pack("!BB", first, 0x80 | size) if size < 126 else (
        struct.pack("!BBH", first, 0x80 | 126, size) if size < 1 << 16 else struct.pack("!BBQ", first, 0x80 | 127, size)
    )  # fmt: skip
    return head + bytes(4) + payload  # A mask of zeros masks nothing.


def closing_code(came: bytes) -> int:
    """The status in the last close frame of the server's."""
    at = came.rfind(b"\x88")
    return struct.unpack("!H", came[at + 2 : at + 4])[0] if at >= 0 and len(came) >= at + 4 else 0


def refusals(house: House) -> list[dict[str, object]]:
    lines = (house.keys / "gpu/audit/000001.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "refused"]


def test_plain_http_is_refused_and_on_record(house, loop):
    before = len(refusals(house))
    wire = tcp(loop)
    wire.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    until_closed(wire)
    deadline = time.monotonic() + 5
    while len(found := refusals(house)[before:]) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [(row["stage"], row["code"], row["peer"]) for row in found] == [("tls", "SS-3303", "")]


GARBAGE: dict[str, Callable[[], bytes]] = {
    "random bytes": lambda: os.urandom(4096),
    "a record of 64 KiB announced": lambda: b"\x16\x03\x01\xff\xff" + bytes(100),
    "records of nothing": lambda: b"\x16\x03\x03\x00\x00" * 2000,
    "alerts": lambda: b"\x15\x03\x03\x00\x02\x01\x00" * 2000,
    "a hello that ends early": lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_instead_of_tls(loop, what):
    for _ in range(5):
        wire = tcp(loop)
        with contextlib.suppress(ConnectionError):
            wire.sendall(GARBAGE[what]())
            wire.shutdown(socket.SHUT_WR)
        until_closed(wire)


def test_a_compression_bomb_finds_nobody_to_unpack_it(house, loop):
    """Compression is not negotiated when it is offered, so a compressed frame is a protocol error before it is unpacked."""
    wire, answer = upgraded(house, loop, DEFLATE)
    assert answer.startswith(b"HTTP/1.1 101")
    assert b"xtensions" not in answer
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(50 << 20)) + packer.flush(zlib.Z_SYNC_FLUSH)
    assert len(bomb) < 60_000
    wire.sendall(ws(2, bomb, rsv=0x40))
    assert closing_code(until_closed(wire)) == 1002


FRAMES: dict[str, tuple[Callable[[], bytes], set[int]]] = {
    "2^62 bytes announced": (lambda: ws(2, b"x", length=1 << 62), {1009}),
    "2^63 bytes announced, which no frame may": (lambda: ws(2, b"x", length=1 << 63), {1002, 1009}),
    "a fragment that is never the first": (lambda: ws(0, b"x"), {1002}),
    "a message inside a message": (lambda: ws(2, b"x", fin=False) + ws(2, b"y"), {1002}),
    "an unknown opcode": (lambda: ws(11, b""), {1002}),
    "a ping of 126 bytes": (lambda: ws(9, bytes(126)), {1002}),
    "a ping in fragments": (lambda: ws(9, b"", fin=False), {1002}),
    "text that is no text": (lambda: ws(1, b"\xff\xfe"), {1007, 4400}),
    "a frame without a mask": (lambda: b"\x82\x01x", {1002}),
    "a close with one byte": (lambda: ws(8, b"x"), {1002}),
    "a close with no code that exists": (lambda: ws(8, struct.pack("!H", 999)), {1002}),
    "a message of ours that is none": (lambda: ws(2, b"SS\x01\xff\0\0\0\0"), {4400}),
    "endless fragments of nothing, then one too large": (
        lambda: ws(2, b"", fin=False) + ws(0, b"", fin=False) * 5000 + ws(0, bytes(3 << 19)), {4400, 1009}
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FRAMES)
def test_frames_that_no_websocket_has(house, loop, what):
    make, codes = FRAMES[what]
    wire, _ = upgraded(house, loop)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        wire.sendall(make())
    came = until_closed(wire)
    assert closing_code(came) in codes


def test_pings_by_the_ten_thousand_are_answered_or_ended(house, loop):
    wire, _ = upgraded(house, loop)
    wire.settimeout(5)
    with contextlib.suppress(OSError):
        for _ in range(20):
            wire.sendall(ws(9, bytes(100)) * 500)
            wire.recv(1 << 20)
    wire.close()


HEADERS: dict[str, bytes] = {
    "a line of 64 KiB": b"X: " + b"a" * 65536 + b"\r\n",
    "a thousand lines": b"X: y\r\n" * 1000,
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n",
    "another protocol": b"",
}


@pytest.mark.parametrize("what", HEADERS)
def test_requests_that_are_no_handshake(house, loop, what):
    wire = secure(house, loop)
    request = UPGRADE % HEADERS[what]
    if what == "another protocol":
        request = request.replace(b"securesplit.v1", b"chat")
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        wire.sendall(request)
        wire.settimeout(20)
        first = wire.recv(4096)
        assert first[:12] in {b"", b"HTTP/1.1 400", b"HTTP/1.1 431", b"HTTP/1.1 413", b"HTTP/1.1 101"}, first[:80]
        if first.startswith(b"HTTP/1.1 101"):
            assert what in {"two lengths", "another protocol"}
            if what == "another protocol":
                assert closing_code(until_closed(wire)) == 4400
    wire.close()


def test_early_ends_at_every_stage(house, loop):
    """TCP, a piece of TLS, all of TLS, a piece of the request, all of it, a piece of a frame: gone at once, or reset."""
    for reset in (False, True):
        stages: list[Callable[[], socket.socket]] = [
            lambda: tcp(loop),
            lambda: _said(tcp(loop), b"\x16\x03\x01\x02"),
            lambda: secure(house, loop),
            lambda: _said(secure(house, loop), (UPGRADE % b"")[:40]),
            lambda: upgraded(house, loop)[0],
            lambda: _said(upgraded(house, loop)[0], ws(2, bytes(100))[:20]),
        ]
        for make in stages:
            wire = make()
            if reset:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wire.close()


def _said(wire: socket.socket, data: bytes) -> socket.socket:
    wire.sendall(data)
    return wire


def test_every_code_on_record_is_declared_and_no_row_holds_what_was_sent(house, loop):
    secret = b"patient0815"
    wire, _ = upgraded(house, loop)
    wire.sendall(ws(1, secret) + ws(2, b"SS" + secret))
    until_closed(wire)
    wire = tcp(loop)
    wire.sendall(secret)
    until_closed(wire)
    found = refusals(house)
    assert found
    assert {str(row["code"]) for row in found} <= DECLARED
    assert secret not in Path(house.keys / "gpu/audit/000001.jsonl").read_bytes()


def test_a_flood_that_outlasts_the_server_is_counted_to_the_last(tmp_path):
    """The server is stopped in the middle of a second: what it had counted and not written yet is written then."""
    house = build_house(tmp_path / "house")
    with (
        open_journal(house.folder("gpu")) as journal,
        Loopback(house.core(house.job(blind=False), POLICY), house.keys, journal=journal) as loop,
    ):
        for _ in range(20):
            wire = tcp(loop)
            wire.sendall(b"GET / HTTP/1.1\r\n\r\n")
            until_closed(wire)
    assert sum(int(str(row["count"])) for row in refusals(house)) == 20
