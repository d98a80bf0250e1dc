"""Slow lorises and floods beside an honest client: its steps take no more than twice as long.

Blocks of steps with and without the attack take turns, and medians are compared, because other work on the machine slows
both. The server runs as a process of its own, as it does for a user; the attack comes from a third.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from securesplit.client.dial import dial
from tests.e2e.house import Loopback, batches_of, job_text, policy_of, policy_text, sentences, start_server

POLICY = policy_of()

# 200 connections that send one byte now and then and never finish a handshake, opened anew when they are closed; and a flood of
# connections that send garbage or plain HTTP, at the pace given. All from another address than the honest client's.
ATTACK = """
import socket, sys, time
port, lorises, per_second = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
HELLO = bytes.fromhex("1603010200010001fc0303")
def connect(number):
    wire = socket.socket()
    wire.bind(("127.0.0.%d" % (2 + number % 3), 0))
    wire.setblocking(False)
    try:
        wire.connect(("127.0.0.1", port))
    except BlockingIOError:
        pass
    return wire
held = [(connect(n), 0) for n in range(lorises)]
flood, number, begun = [], 0, time.monotonic()
print("ready", flush=True)
turn = 0
while True:
    turn += 1
    for at, (wire, sent) in enumerate(held):
        if (at + turn) % 20:
            continue
        try:
            wire.send(HELLO[sent:sent + 1] or b"\\0")
            held[at] = (wire, sent + 1)
        except BlockingIOError:
            pass
        except OSError:
            wire.close()
            held[at] = (connect(at), 0)
    while number < per_second * (time.monotonic() - begun):
        number += 1
        wire = connect(number)
        flood.append(wire)
        try:
            wire.send(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n" if number % 2 else bytes(64))
        except OSError:
            pass
        if len(flood) > 64:
            flood.pop(0).close()
    time.sleep(0.05)
"""


@contextmanager
def attacked(port, *, lorises, per_second):
    argv = [sys.executable, "-c", ATTACK, str(port), str(lorises), str(per_second)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as attack:
        try:
            assert attack.stdout.readline() == "ready\n"
            time.sleep(0.3)
            yield attack
            assert attack.poll() is None, "the attack goes on to the end"
        finally:
            attack.kill()


def block(client, batches, steps):
    out = []
    for number in range(steps):
        begun = time.perf_counter()
        client.step(batches[number % len(batches)])
        out.append(time.perf_counter() - begun)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lorises", "per_second"), [(200, 0), (0, 300), (200, 300)], ids=["slow-loris", "flood", "both"]
)
def test_an_honest_client_s_steps_keep_their_pace(house, record_property, lorises, per_second):
    server, url = start_server(house, job_text(house.model), policy_text())
    try:
        with dial(url, keys=house.keys / "alice", policy=POLICY, patience=30) as link:
            client = house.client(link, POLICY)
            client.train("B")
            batches = batches_of(client, sentences(8, seed=5))
            block(client, batches, 20)
            calm, under = [], []
            for _ in range(4):
                calm += block(client, batches, 40)
                with attacked(int(url.rpartition(":")[2]), lorises=lorises, per_second=per_second):
                    under += block(client, batches, 40)
            ratio = statistics.median(under) / statistics.median(calm)
            record_property("pace", ratio)
            print(
                f"median step {1e3 * statistics.median(calm):.1f} ms, attacked {1e3 * statistics.median(under):.1f} ms"
            )
            assert ratio < 2.0
            # Somebody who comes only now gets in, too: the attack has its own addresses.
            with attacked(int(url.rpartition(":")[2]), lorises=lorises, per_second=per_second):
                begun = time.monotonic()
                dial(url, keys=house.keys / "bob", policy=POLICY, patience=30).close()
                assert time.monotonic() - begun < 5
        assert server.stop() == 0
        lines = [
            json.loads(line) for line in (house.keys / "gpu/audit").glob("*.jsonl").__next__().read_text().splitlines()
        ]
        refused = [row for row in lines if row["kind"] == "refused"]
        assert refused, "an attack is on record"
        assert len(refused) < 600, "and does not fill the disk"
        assert sum(row["count"] for row in refused) > (per_second or 10)
    finally:
        server.kill()


def test_many_slow_connections_leave_room_for_an_honest_one(house):
    """The quick twin: 60 connections that never finish a handshake, and a client that dials and steps among them."""
    with Loopback(house.core(house.job(), POLICY), house.keys) as loop, attacked(loop.port, lorises=60, per_second=50):
        with dial(loop.url, keys=house.keys / "alice", policy=POLICY, patience=30) as link:
            client = house.client(link, POLICY)
            client.train("B")
            assert len(block(client, batches_of(client, sentences(8, seed=5)), 5)) == 5
        assert 0 < loop.shell._door.pending <= 200
