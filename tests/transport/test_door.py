"""The door, its buckets, and the pace of a peer: all without a network, under a clock of the test's own."""

from __future__ import annotations

import math
import socket
import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securesplit.errors import InputError
from securesplit.transport.accepted import ACCEPTED, host_key
from securesplit.transport.buckets import Buckets, Rates
from securesplit.transport.door import Door, GuardedSocket
from securesplit.transport.limits import ClientLimits, Handshakes, Limits, Progress, load_limits
from securesplit.transport.progress import Pace
from securesplit.transport.quantum import X25519MLKEM768, chosen_group, group_name, offers_hybrid


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def pair():
    """Sockets in pairs; closed at the end."""
    made = []

    def make() -> socket.socket:
        made.extend(two := socket.socketpair())
        return two[0]

    yield make
    for one in made:
        one.close()


def door_of(**limits):
    told, clock = [], Clock()
    return Door(Handshakes(**limits), lambda *said: told.append(said), clock=clock), told, clock


def test_unfinished_handshakes_of_one_address_are_counted_and_others_get_in(pair):
    door, told, _ = door_of(pending_per_address=2)
    visitors = [door.enter(pair(), "10.0.0.1", 1000 + n) for n in range(3)]
    assert [visitor is not None for visitor in visitors] == [True, True, False]
    assert told == [("tcp", "SS-3051", "10.0.0.1:1002")]
    assert door.enter(pair(), "10.0.0.2", 1) is not None
    door.known(visitors[0])
    assert door.enter(pair(), "10.0.0.1", 1003) is not None


def test_all_together_are_bounded_however_many_addresses_there_are(pair):
    door, told, _ = door_of(pending=3)
    assert sum(door.enter(pair(), f"10.0.0.{n}", 1) is not None for n in range(6)) == 3
    assert {code for _, code, _ in told} == {"SS-3051"}


def test_a_rate_is_kept_and_comes_back_with_time(pair):
    door, told, clock = door_of(per_second_per_address=2.0, burst_per_address=3)
    assert sum(door.enter(pair(), "10.0.0.1", n) is not None for n in range(5)) == 3
    assert [code for _, code, _ in told] == ["SS-3050", "SS-3050"]
    clock.now += 1.0
    assert sum(door.enter(pair(), "10.0.0.1", n) is not None for n in range(5)) == 2


def test_one_customer_s_ipv6_network_is_one_address(pair):
    door, _, _ = door_of(pending_per_address=1)
    assert door.enter(pair(), "2001:db8::1", 1) is not None
    assert door.enter(pair(), "2001:db8::ffff:1", 1) is None
    assert door.enter(pair(), "2001:db8:0:1::1", 1) is not None
    assert host_key("::ffff:10.0.0.1") == host_key("10.0.0.1") == "10.0.0.1"
    assert host_key("fe80::1%eth0") == "fe80::/64"
    assert host_key("not an address") == "not an address"


def test_who_leaves_without_a_word_is_on_record_once_and_gives_its_place_back(pair):
    door, told, _ = door_of(pending=2)
    wire = pair()
    first, second = door.enter(wire, "10.0.0.1", 1), door.enter(second_wire := pair(), "10.0.0.1", 2)
    second.secured = True
    door.sweep()
    assert told == []
    wire.close()
    second_wire.close()
    door.sweep()
    door.sweep()
    assert sorted(told) == [("http", "SS-3052", "10.0.0.1:2"), ("tls", "SS-3052", "10.0.0.1:1")]
    assert door.pending == 0
    assert first.gone


def test_a_farewell_is_read_by_who_has_sent_something_already():
    """The peer's unread request would reset the connection, and the alert with it, were the socket closed at once."""
    door, told, clock = door_of()
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as peer:
        wire, (host, port) = listening.accept()
        visitor = door.enter(wire, host, port)
        peer.sendall(b"x" * 1000)
        visitor.refused = True
        visitor.part(b"alert")
        wire.close()
        door.sweep()
        peer.settimeout(5)
        assert peer.recv(100) == b"alert"
        assert peer.recv(100) == b""
        assert told == []
        assert visitor.lingering is not None
        peer.close()
        clock.now += 10.0
        door.sweep()
        assert visitor.lingering is None


def test_a_listening_socket_hands_on_whom_the_door_lets_in():
    door, told, _ = door_of(pending_per_address=1)
    with GuardedSocket(socket.AF_INET, socket.SOCK_STREAM) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        listening.setblocking(False)
        listening.door = door
        with (
            socket.create_connection(listening.getsockname()) as first,
            socket.create_connection(listening.getsockname()),
        ):
            wire, address = listening.accept()
            assert address == first.getsockname()
            assert ACCEPTED.get().wire is wire
            assert ACCEPTED.get().address == f"127.0.0.1:{address[1]}"
            with pytest.raises(BlockingIOError):
                listening.accept()
            wire.close()
    assert [code for _, code, _ in told] == ["SS-3051"]
    ACCEPTED.set(None)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from("ab")), max_size=60), st.floats(0.1, 20), st.integers(1, 10))
def test_a_bucket_never_gives_more_than_its_rate_and_its_burst(gaps, rate, burst):
    buckets, now, taken = Buckets(rate, burst), 0.0, {"a": 0, "b": 0}
    for gap, key in gaps:
        now += gap
        taken[key] += buckets.take(key, now)
        assert taken[key] <= burst + rate * now + 1e-6


def test_buckets_forget_who_was_not_seen_for_longest():
    buckets = Buckets(1e-9, 1, keys=2)
    assert buckets.take("a", 0)
    assert not buckets.take("a", 0)
    assert buckets.take("b", 0)
    assert buckets.take("c", 0)
    assert buckets.take("a", 0), "forgotten, and so full again"
    assert len(buckets._found) == 2


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=40))
def test_a_client_that_waits_as_it_is_told_keeps_its_rate(sizes):
    rates = Rates(Limits(clients=ClientLimits(bytes_per_second=1000.0)))
    now = 0.0
    for size in sizes:
        now += rates.wait("alice", size, now)
    assert now >= (sum(sizes) - 1000) / 1000 - 1e-6
    assert math.isclose(now, max(0.0, now))


def test_a_slow_peer_that_moves_is_left_alone_and_one_that_stands_still_is_not():
    limits = Progress(seconds=10, bytes=100)
    pace = Pace(limits, 0.0)
    count = 0
    for second in range(1, 3600):  # An hour for one message, at 11 bytes a second.
        count += 11
        assert not pace.stalled(float(second), count, due=True, least=100)
    assert not pace.stalled(3600.0, count, due=True, least=100)
    assert pace.stalled(3621.0, count, due=True, least=100)
    trickle = Pace(limits, 0.0)
    assert not any(trickle.stalled(float(s), s, due=True, least=100) for s in range(1, 10))
    assert trickle.stalled(11.0, 11, due=True, least=100), "a byte a second is a slow loris"
    idle = Pace(limits, 0.0)
    assert not any(idle.stalled(float(s), 0, due=False, least=100) for s in range(1000)), "no message, no hurry"


def test_limits_are_merged_and_all_faults_are_told(tmp_path):
    file = tmp_path / "limits.toml"
    file.write_text('guests = ["dave"]\n[clients]\nsteps = 5\nconnections = 2\n[client.alice]\nsteps = 9\n')
    found = load_limits(file)
    assert found.guests == {"dave"}
    assert (found.of("alice").steps, found.of("alice").connections, found.of("bob").steps) == (9, 2, 5)
    assert found.sized(1000).handshakes.pending_per_address == 1000
    file.write_text('guests = ["Dave"]\nsomething = 1\n[handshakes]\npending = 0\n[client.alice]\nsteps = "many"\n')
    with pytest.raises(InputError) as caught:
        load_limits(file)
    assert caught.value.code == "SS-1142"
    assert len(caught.value.details) == 4
    for text in (b"[", b"\xff"):
        file.write_bytes(text)
        with pytest.raises(InputError, match="SS-1142"):
            load_limits(file)
    with pytest.raises(InputError, match="SS-1142"):
        load_limits(tmp_path / "none")


def test_the_group_is_read_from_real_hellos():
    """Both messages come from OpenSSL; what was negotiated follows from the one curve that is offered."""
    out, into = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ecdh_curve("prime256v1")
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(into, out).do_handshake()
    assert chosen_group(out.read()[5:]) is None, "a ClientHello"
    # RFC 8448, section 3: the ServerHello of a simple 1-RTT handshake, which chose X25519.
    hello = bytes.fromhex(
        "020000560303a6af06a4121860dc5e6e60249cd34c95930c8ac5cb1434dac155772ed3e2692800130100002e00330024001d0020"
        "c9828876112095fe66762bdbf7c672e156d6cc253b833df1dd69b1b04e751f0f002b00020304"
    )
    assert chosen_group(hello) == 0x1D
    assert group_name(0x1D) == "X25519"
    assert offers_hybrid() == (ssl.OPENSSL_VERSION_INFO >= (3, 5))
    assert group_name(X25519MLKEM768) == "X25519MLKEM768"
    assert group_name(0x6399) == "0x6399"


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_a_hello_that_is_none_breaks_nothing(data):
    chosen_group(data)
    chosen_group(b"\x02" + data)
