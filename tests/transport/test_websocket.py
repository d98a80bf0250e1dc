"""The shell on loopback with real certificates: hostile peers, limits, revocation, and compute beside the event loop."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from contextlib import suppress

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import connect

import securesplit.transport.peer as peer_module
import securesplit.transport.server as shell_module
from securesplit.client.dial import dial
from securesplit.errors import ConnectionFailed, InputError, PolicyDenied, RemoteProtocolError
from securesplit.pki.authority import Authority
from securesplit.protocol.codec import decode, encode
from securesplit.protocol.messages import Backward, Blob, Failure, Forward
from securesplit.protocol.transcript import Transcript
from securesplit.transport.client import SUBPROTOCOL, open_pipe
from securesplit.transport.limits import Limits, Progress
from securesplit.transport.record import Record
from securesplit.transport.tls import ContextHolder, client_context
from tests.e2e.house import ANY, FROZEN, WIDTH, Loopback, SpyPipe, batches_of, policy_of, sentences

LAB_POLICY = policy_of()


@pytest.fixture
def core(house):
    return house.core(house.job(), LAB_POLICY)


@pytest.fixture
def loop(house, core):
    with Loopback(core, house.keys) as running:
        yield running


def dialled(house, loop, name="alice"):
    return dial(loop.url, keys=house.keys / name, policy=LAB_POLICY, patience=20)


def raw(link):
    """The library's own connection below an open link; what is sent here passes no check of ours."""
    return link._pipe._socket


def bare(house, loop, name="alice", **options):
    """A websocket without our client: a valid certificate and nothing else."""
    websocket = connect(
        loop.url,
        ssl=client_context(house.folder(name)),
        **{"subprotocols": [SUBPROTOCOL], "compression": None, "proxy": None, **options},
    )
    return websocket.__enter__()


def step_of(house, link) -> float:
    client = house.client(link, LAB_POLICY)
    client.train("B")
    return client.step(batches_of(client, sentences(2, seed=1))[0])


def forward(**changes):
    hidden = Blob(dtype="f32", shape=(4, WIDTH), data=bytes(4 * WIDTH * 4))
    return Forward(**{"step": 0, "lengths": (4,), "cache": 0, "learn": True, "hidden": hidden, **changes})


def ending(websocket) -> tuple[list[bytes], int, str]:
    """What still came, and how the connection was closed."""
    came = []
    while True:
        try:
            came.append(websocket.recv(10))
        except ConnectionClosed as closed:
            return came, getattr(closed.rcvd, "code", 0), getattr(closed.rcvd, "reason", "")


HOSTILE = {
    "truncated": (lambda: encode(forward())[:-7], 4400, "SS-4005"),
    "truncated in the prefix": (lambda: b"SS\x01", 4400, "SS-4001"),
    "wrong type": (lambda: encode(forward()).replace(b"\xa3f32", b"\xa3u32"), 4400, "SS-4005"),
    "wrong width": (
        lambda: encode(forward(hidden=Blob(dtype="f32", shape=(4, 8), data=bytes(128)))), 4400, "SS-4005",
    ),
    "random bytes": (lambda: bytes(range(256)) * 9, 4400, "SS-4001"),
    "a gradient without a forward": (
        lambda: encode(Backward(step=0, gradient=Blob(dtype="f32", shape=(4, WIDTH), data=bytes(4 * WIDTH * 4)))),
        4400, "SS-4013",
    ),
    "text": (lambda: "hello", 4400, "SS-4001"),
    "oversized": (lambda: bytes((1 << 20) + 1), 1009, ""),
    "oversized in fragments": (lambda: [bytes(1 << 19)] * 3, 4400, "SS-4002"),
}  # fmt: skip


def test_hostile_messages_close_their_own_connection_with_a_code(house, loop, core):
    """One good client stays connected all the while, and makes a step before, between and after."""
    good = dialled(house, loop, "bob")
    losses = [step_of(house, good)]
    for case, (make, code, reason) in HOSTILE.items():
        link = dialled(house, loop)
        with suppress(ConnectionClosed):  # An oversized message may be refused while it is being sent.
            raw(link).send(make())
        came, got, why = ending(raw(link))
        if not reason and got == 0:
            continue  # The farewell can be lost when the peer is still sending; it is closed all the same.
        assert (got, why if reason else "") == (code, reason), case
        if isinstance(make(), bytes) and reason:
            assert decode(came[-1], ANY) == Failure(code=reason), case
        link.close()
    losses.append(step_of(house, good))
    with dialled(house, loop, "carol") as other:
        losses.append(step_of(house, other))
    good.close()
    assert len(losses) == 3
    assert loop.alive


def test_before_a_greeting_nothing_is_served(house, loop):
    for message, reason in ((encode(forward()), "SS-4010"), (b"\x00", "SS-4001")):
        websocket = bare(house, loop)
        websocket.send(message)
        came, code, why = ending(websocket)
        assert (code, why) == (4400, reason)
        assert [decode(c, ANY) for c in came] == [Failure(code=reason)]
    for offered in (None, ["securesplit.v0"]):
        with pytest.raises(InvalidStatus) as caught:
            bare(house, loop, subprotocols=offered)
        assert caught.value.response.status_code == 400
    with dialled(house, loop, "bob") as link:
        step_of(house, link)


def test_a_peer_that_is_told_too_much_names_the_cause(house, loop):
    """The library closes an oversized message without one of our codes; the client names one all the same."""
    told = ""
    for _ in range(4):
        with dialled(house, loop) as link:
            # The header of a frame of 16 MiB is enough; the server does not wait for the rest. This write goes past the library,
            # whose other thread may read the answer at the same time; OpenSSL then tells one of the two of the other's end.
            with suppress(OSError):
                raw(link).socket.sendall(b"\x82\xff" + (1 << 24).to_bytes(8, "big") + bytes(4))
            with pytest.raises(ConnectionFailed) as caught:
                link.next()
            told = str(caught.value)
        if "SS-3020" in told and "SS-4002" in told:
            return
    pytest.fail(f"the cause is not named: {told}")


def test_early_ends_hurt_nobody(house, loop, core, monkeypatch):
    """Gone in the middle of a computation, without a farewell; gone before a greeting; gone in the TLS handshake."""
    started, original = threading.Event(), core._engine.forward

    def slow(*args, **options):
        started.set()
        time.sleep(0.3)
        return original(*args, **options)

    monkeypatch.setattr(core._engine, "forward", slow)
    link = dialled(house, loop)
    link.tell(forward())
    assert started.wait(5)
    raw(link).socket.shutdown(socket.SHUT_RDWR)
    bare(house, loop).socket.shutdown(socket.SHUT_RDWR)
    with socket.create_connection(("127.0.0.1", loop.port)) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
    monkeypatch.setattr(core._engine, "forward", original)
    with dialled(house, loop, "bob") as other:
        step_of(house, other)
    deadline = time.monotonic() + 5
    while core.names and time.monotonic() < deadline:
        time.sleep(0.02)
    assert core.names == ()
    assert core._engine.fleet.common.waits_for == ()


def test_half_a_frame_and_silence_is_ended_by_the_servers_patience(house, core):
    with Loopback(core, house.keys, limits=Limits(progress=Progress(seconds=0.5))) as loop:
        link = dialled(house, loop)
        # A masked binary frame that announces 4096 bytes and brings ten.
        raw(link).socket.sendall(b"\x82\xfe\x10\x00" + bytes(4) + bytes(10))
        with dialled(house, loop, "bob") as good:
            step_of(house, good)
            deadline = time.monotonic() + 8
            while "alice" in core.names and time.monotonic() < deadline:
                time.sleep(0.05)
            assert core.names == ("bob",)
            step_of(house, good)
        raw(link).socket.close()


def test_one_connection_too_many_is_told_503_and_the_code(house, core):
    with Loopback(core, house.keys, max_connections=2) as loop:
        first, second = dialled(house, loop), dialled(house, loop, "bob")
        with pytest.raises(ConnectionFailed, match=r"SS-3030.*503.*SS-3040") as caught:
            dialled(house, loop, "carol")
        assert caught.value.exit_code == 4
        second.close()
        deadline = time.monotonic() + 5
        while len(core.names) > 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        with dialled(house, loop, "carol") as third:
            step_of(house, third)
        first.close()


def test_one_client_cannot_take_the_room_of_all(house, core):
    """Its newest connections displace its oldest; another client's are not touched."""
    with Loopback(core, house.keys, max_connections=6) as loop:
        other = dialled(house, loop, "bob")
        many = [dialled(house, loop) for _ in range(7)]
        deadline = time.monotonic() + 5
        while core.names.count("alice") > 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert core.names.count("alice") == 4
        step_of(house, other)
        with pytest.raises(ConnectionFailed):
            step_of(house, many[0])
        for link in (*many[1:], other):
            link.close()


def test_the_recording_is_what_the_client_saw_byte_for_byte(house, core, tmp_path):
    with Loopback(core, house.keys, record=tmp_path / "record") as loop:
        with dialled(house, loop, "bob") as other:
            step_of(house, other)
        pipe = SpyPipe(open_pipe(loop.url, house.folder("alice"), max_message=1 << 20))
        from securesplit.client.dial import greet

        mine, _ = house.parties("alice")
        assert pipe.inner.peer == mine.peer
        link = greet(pipe, mine, LAB_POLICY, name="alice", server="gpu")
        assert link.tls_version == "TLSv1.3"
        assert pipe.inner.identity.name == "gpu"
        step_of(house, link)
        link.close()
        up = sum(len(data) for data in pipe.sent)
        assert link.bytes_up + sum(map(len, pipe.sent[:2])) == up
    (tmp_path / "record" / "transcript.json").write_text("{}")
    transcript = Transcript.load(tmp_path / "record")
    assert transcript.peers == ((1, "bob"), (2, "alice"))
    frames = list(transcript.frames(2))
    assert [data for direction, data in frames if direction == 0] == pipe.sent
    assert [data for direction, data in frames if direction == 1] == pipe.received


def test_while_the_server_computes_others_are_answered(house, loop, core, monkeypatch):
    seconds, original, started = 3.0, core._engine.forward, threading.Event()

    def slow(*args, **options):
        started.set()
        time.sleep(seconds)
        return original(*args, **options)

    monkeypatch.setattr(core._engine, "forward", slow)
    with dialled(house, loop) as busy, dialled(house, loop, "bob") as other:
        busy.tell(forward())
        assert started.wait(5)
        begun = time.monotonic()
        for _ in range(5):
            assert raw(other).ping().wait(0.5)
            time.sleep(0.1)
        dialled(house, loop, "carol").close()
        assert time.monotonic() - begun < seconds - 0.5
        busy.next()
        assert time.monotonic() - begun > seconds - 1.5


def test_a_revoked_client_is_put_out_at_once_and_cannot_return(house, loop):
    with dialled(house, loop) as link, dialled(house, loop, "bob") as other:
        begun = time.monotonic()
        Authority.open(house.keys).revoke("alice")
        with pytest.raises(ConnectionFailed, match=r"SS-3205"):
            link.next()
        assert time.monotonic() - begun < 5
        with pytest.raises(ConnectionFailed) as caught:
            dialled(house, loop)
        assert caught.value.code == "SS-3205"
        step_of(house, other)


def test_a_revoked_client_that_does_not_read_is_put_out_too(house, core, monkeypatch):
    """Its outbox is full, so the farewell finds no room; the server goes on without it."""
    import asyncio

    async def stuck(peer):
        while not peer.outbox.full():
            peer.outbox.put_nowait(b"x")
        await asyncio.sleep(3600)

    with Loopback(core, house.keys) as loop:
        with monkeypatch.context() as patched:
            patched.setattr(peer_module.Peer, "write", stuck)
            websocket = bare(house, loop)
            deadline = time.monotonic() + 5
            while not any(p.outbox.full() for p in loop.shell._peers.values()) and time.monotonic() < deadline:
                time.sleep(0.02)
        Authority.open(house.keys).revoke("alice")
        with pytest.raises(ConnectionClosed):
            websocket.recv(6)
        assert loop.alive
        with dialled(house, loop, "bob") as other:
            step_of(house, other)


def test_a_broken_key_folder_leaves_the_old_keys_in_force(house, loop):
    (house.keys / "gpu" / "crl.pem").write_text("nonsense")
    (house.keys / "ca" / "crl.pem").unlink()
    time.sleep(0.6)
    with dialled(house, loop) as link:
        step_of(house, link)


@pytest.mark.parametrize(
    ("url", "kind", "code"),
    [
        ("ws://localhost:1", InputError, "SS-1140"),
        ("https://localhost:1", InputError, "SS-1140"),
        ("localhost:1", InputError, "SS-1140"),
        ("wss://", InputError, "SS-1140"),
        ("wss://localhost:99999", InputError, "SS-1140"),
        ("wss://localhost:port", InputError, "SS-1140"),
        ("wss://[::1", InputError, "SS-1140"),
        ("wss://localhost:1", ConnectionFailed, "SS-3033"),
    ],
)
def test_addresses_that_cannot_be_dialled(house, url, kind, code):
    for privacy in (policy_of(FROZEN, loopback=False), LAB_POLICY):
        with pytest.raises((kind, PolicyDenied)) as caught:
            dial(url, keys=house.keys / "alice", policy=privacy)
        if not privacy.unsafe or kind is ConnectionFailed:
            assert caught.value.code == code


def test_an_unsafe_policy_does_not_leave_the_machine(house):
    for url in ("wss://gpu.example:8443", "wss://192.0.2.1:8443", "wss://localhost.example:1"):
        with pytest.raises(PolicyDenied, match="SS-2003"):
            dial(url, keys=house.keys / "alice", policy=LAB_POLICY)


def test_a_port_that_is_taken_is_named(house, core):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        loop = Loopback(core, house.keys)
        loop.shell._listen = shell_module.Listen("127.0.0.1", taken.getsockname()[1], 1 << 20)
        with pytest.raises(ConnectionFailed, match="SS-3041"):
            loop.__enter__()


def test_a_server_that_speaks_something_else(house):
    """TLS with the right certificate, and no websocket behind it; and a websocket of another protocol."""
    context = ContextHolder(house.keys / "gpu").listening
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            for _ in range(1):
                client, _ = listening.accept()
                with context.wrap_socket(client, server_side=True) as tls:
                    tls.recv(4096)
                    tls.sendall(b"220 mail.example ready\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConnectionFailed) as caught:
            dial(f"wss://localhost:{listening.getsockname()[1]}", keys=house.keys / "alice", policy=LAB_POLICY)
        thread.join()
    assert caught.value.exit_code == 4


def test_a_client_without_a_certificate_meets_a_closed_door(house, loop):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=house.keys / "ca/cert.pem")
    with pytest.raises((OSError, EOFError, WebSocketException)):
        connect(loop.url, ssl=context, subprotocols=[SUBPROTOCOL], proxy=None)
    with dialled(house, loop) as link:
        step_of(house, link)


def test_the_servers_code_reaches_the_caller(house, loop):
    with dialled(house, loop) as link:
        raw(link).send(b"garbage")
        with pytest.raises(RemoteProtocolError, match="SS-4001") as caught:
            link.next()
        assert caught.value.exit_code == 5
        with pytest.raises(ConnectionFailed, match=r"SS-3020.*SS-4001"):
            link.next()


def test_what_cannot_be_recorded_costs_no_place(house, core, monkeypatch):
    """Whatever fails between the welcome and the first message: the place is given back, and others get in."""

    def refuse(self, *args):
        raise ValueError("no such row")

    with Loopback(core, house.keys) as loop:
        with monkeypatch.context() as patched:
            patched.setattr(Record, "accepted", refuse)
            for _ in range(2):
                with pytest.raises((ConnectionFailed, ConnectionClosed)):
                    bare(house, loop).recv(5)
        deadline = time.monotonic() + 5
        while loop.shell._peers and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not loop.shell._peers
        with dialled(house, loop, "bob") as other:
            step_of(house, other)


def test_a_live_client_is_put_out_though_the_server_s_folder_is_broken(house, loop):
    with dialled(house, loop) as link, dialled(house, loop, "bob") as other:
        (house.keys / "gpu/key.pem").chmod(0o644)
        Authority.open(house.keys).revoke("alice")
        with pytest.raises(ConnectionFailed, match=r"SS-3205"):
            link.next()
        step_of(house, other)
