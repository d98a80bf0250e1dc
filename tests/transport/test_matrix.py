"""Every kind of bad handshake: the code that the client prints, and the row in the server's audit log.

The bad certificates are forged without our code (tests/pki/forge.py). A client of ours checks its own folder before it dials,
and is refused there; so each row is also dialled by one that skips those checks, which the server has to stop.
"""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from securesplit.client.dial import dial
from securesplit.codes import explain_code
from securesplit.errors import ConnectionFailed, SecureSplitError
from securesplit.logged import open_journal
from securesplit.pki.authority import Authority
from securesplit.pki.store import KeyFolder
from securesplit.transport.client import open_pipe
from securesplit.transport.limits import ClientLimits, Limits
from securesplit.transport.tls import ContextHolder, client_context, diagnose, server_context
from tests.e2e.house import House, Loopback, batches_of, build_house, policy_of, sentences
from tests.pki import forge

POLICY = policy_of()
ALICE = "spiffe://securesplit.local/securesplit/client/alice"
MALLORY = "spiffe://securesplit.local/securesplit/client/mallory"


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> House:
    return build_house(tmp_path_factory.mktemp("template") / "house")


@pytest.fixture
def house(template, tmp_path) -> House:
    """Keys of its own for every test; the model is everybody's."""
    shutil.copytree(template.keys, tmp_path / "keys")
    return House(tmp_path, tmp_path / "keys", template.model)


def rows(folder: Path, *kinds: str) -> list[dict[str, object]]:
    """What stands in the log, read as any auditor's script would."""
    lines = [line for file in sorted((folder / "audit").glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [row for row in map(json.loads, lines) if row["kind"] in kinds]


@dataclass
class Watched:
    house: object
    loop: Loopback

    def present(self, folder: KeyFolder) -> None:
        """From now on the server shows this, and holds its clients to it, whatever it is."""
        held = self.loop.shell._tls
        held._current = server_context(folder, on_refusal=held._refused)

    def refusals(self) -> list[tuple[str, str, str]]:
        """Stage, code and verified identity of everybody who was refused, once the server has noticed."""
        deadline = time.monotonic() + 3
        while not (found := rows(self.house.keys / "gpu", "refused")) and time.monotonic() < deadline:
            time.sleep(0.02)
        for row in found:
            assert row["address"].startswith("127.0.0.1:") or row["address"].startswith("[::1]:"), row
            assert explain_code(str(row["code"])).meaning
        return [(str(row["stage"]), str(row["code"]), str(row["peer"])) for row in found]


@contextmanager
def watched(house, limits: Limits | None = None) -> Iterator[Watched]:
    with open_journal(house.folder("gpu")) as journal:

        def note(event) -> None:
            journal.append(event, durable=False)

        core = house.core(house.job(), POLICY, limits=limits, note=note)
        with Loopback(core, house.keys, journal=journal, limits=limits or Limits()) as loop:
            yield Watched(house, loop)


def careless(house, forged: forge.Forged) -> KeyFolder:
    """A folder as our client would hold it had it not looked at the certificate."""
    key = serialization.load_pem_private_key((forged.folder / "key.pem").read_bytes(), None)
    good = house.folder("alice")
    return replace(
        good, path=forged.folder, cert_der=forged.der, key_path=forged.folder / "key.pem", crl_path=forged.folder / "crl.pem",
        _key=key,
    )  # fmt: skip


def opened(url: str, folder: KeyFolder, context: ssl.SSLContext | None = None) -> str:
    """The code that a client prints which dials with this folder; empty when it gets in."""
    try:
        open_pipe(url, folder, max_message=1 << 20, timeout=10, context=context).close()
    except ConnectionFailed as error:
        caught = error
    else:
        return ""
    assert caught.exit_code == 4
    assert caught.hint
    assert explain_code(caught.code).exit == 4
    return caught.code


# flaw: what our client says before it dials, what a careless one is told, the server's row.
CLIENTS = {
    "none": ("", "", None),
    "ed25519": ("", "", None),
    "wrong-ca": ("SS-3202", "SS-3202", ("tls", "SS-3202", "")),
    "impostor-ca": ("SS-3202", "SS-3202", ("tls", "SS-3202", "")),
    "wrong-eku": ("SS-3210", "SS-3210", ("tls", "SS-3210", "")),
    "no-eku": ("SS-3210", "SS-3210", ("identity", "SS-3210", "")),
    "expired": ("SS-3203", "SS-3203", ("tls", "SS-3203", "")),
    "not-yet-valid": ("SS-3204", "SS-3204", ("tls", "SS-3204", "")),
    "two-uris": ("SS-3201", "SS-3201", ("identity", "SS-3201", "")),
    "foreign-uri": ("SS-3201", "SS-3201", ("tls", "SS-3211", "")),
    "cn-only": ("SS-3201", "SS-3201", ("identity", "SS-3201", "")),
    "other-domain": ("SS-3211", "SS-3211", ("tls", "SS-3211", "")),
    "wrong-role": ("SS-3210", "SS-3210", ("identity", "SS-3210", "")),
    "unknown-identity": ("", "SS-3214", ("identity", "SS-3214", MALLORY)),
    "rsa-1024": ("SS-3215", "SS-3215", ("tls", "SS-3215", "")),
}


@pytest.mark.parametrize("flaw", CLIENTS)
def test_a_client_with_a_flaw(house, flaw):
    local, told, row = CLIENTS[flaw]
    forged = forge.forge(house.keys, flaw, role="client")
    try:
        KeyFolder.open(forged.folder, "client")
        found = ""
    except ConnectionFailed as error:
        found = error.code
    assert found == local
    with watched(house) as server:
        # Only a bare context presents a weak key, and only ours goes on when the server lets it in.
        raw = forge.context(forged.folder, "client", ca=house.keys / "ca/cert.pem") if row else None
        assert opened(server.loop.url, careless(house, forged), raw) == told
        if row is None:
            assert [r["peer"] for r in rows(house.keys / "gpu", "accepted")] == [ALICE]
        else:
            assert server.refusals() == [row]
            assert rows(house.keys / "gpu", "accepted") == []


def test_tls_1_2_and_no_certificate(house):
    alice, ca = house.folder("alice"), house.keys / "ca/cert.pem"
    old = forge.context(house.keys / "alice", "client", ca=ca, newest=ssl.TLSVersion.TLSv1_2)
    with watched(house) as server:
        assert opened(server.loop.url, alice, old) == "SS-3302"
        assert server.refusals() == [("tls", "SS-3302", "")]
    shutil.rmtree(house.keys / "gpu/audit")
    with watched(house) as server:
        assert opened(server.loop.url, alice, forge.context(None, "client", ca=ca)) == "SS-3306"
        assert server.refusals() == [("tls", "SS-3306", "")]


def test_a_key_that_others_may_read(house):
    """Refused before anything is sent, on both sides; the server has nobody to write about, and does not start."""
    for name, role in (("alice", "client"), ("gpu", "server")):
        (house.keys / name / "key.pem").chmod(0o644)
        with pytest.raises(ConnectionFailed) as caught:
            KeyFolder.open(house.keys / name, role)
        assert caught.value.code == "SS-3101"
        assert "chmod 600" in caught.value.hint
    with pytest.raises(ConnectionFailed) as caught:
        ContextHolder(house.keys / "gpu")
    assert caught.value.code == "SS-3101"
    with pytest.raises(ConnectionFailed) as caught:
        dial("wss://localhost:1", keys=house.keys / "alice", policy=POLICY)
    assert caught.value.code == "SS-3101"
    (house.keys / "gpu/key.pem").chmod(0o600)
    with watched(house) as server:  # While it runs, too: the old keys stay, and the log says why.
        (house.keys / "gpu/key.pem").chmod(0o644)
        (house.keys / "gpu/cert.pem").touch()
        deadline = time.monotonic() + 3
        while not (found := rows(house.keys / "gpu", "reloaded")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [row["code"] for row in found] == ["SS-3101"]
        assert server.loop.alive


def test_revoked_before(house):
    kept = replace(house.folder("alice"))
    Authority.open(house.keys).revoke("alice")
    with watched(house) as server:
        assert opened(server.loop.url, kept) == "SS-3205"
        assert server.refusals() == [("tls", "SS-3205", "")]


def test_a_revoked_client_that_cannot_know_is_told_by_the_alert(house, tmp_path):
    """Its folder on another machine still has the old list, so only the server knows."""
    shutil.copytree(house.keys / "alice", tmp_path / "alice")
    shutil.copytree(house.keys / "bob", tmp_path / "bob")
    far = KeyFolder.open(tmp_path / "alice", "client")
    Authority.open(house.keys).revoke("alice")
    with watched(house) as server:
        for _ in range(5):  # The alert must not lose a race against the reset of the connection.
            assert opened(server.loop.url, far) == "SS-3205"
        assert opened(server.loop.url, KeyFolder.open(tmp_path / "bob", "client")) == ""
        assert server.refusals()[0] == ("tls", "SS-3205", "")


def test_revoked_during_a_session(house):
    with watched(house) as server, dial(server.loop.url, keys=house.keys / "alice", policy=POLICY, patience=20) as link:
        begun = time.monotonic()
        Authority.open(house.keys).revoke("alice")
        with pytest.raises(ConnectionFailed) as caught:
            link.next()
        assert (caught.value.code, caught.value.exit_code) == ("SS-3205", 4)
        assert time.monotonic() - begun < 5
        assert server.refusals() == [("identity", "SS-3205", ALICE)]
        assert next(row["what"] for row in rows(house.keys / "gpu", "reloaded")) == "crl"
        while not (closed := rows(house.keys / "gpu", "closed")):
            time.sleep(0.02)
        assert [(row["peer"], row["code"]) for row in closed] == [(ALICE, "SS-3205")]


def test_expired_during_a_session(house, tmp_path, later):
    leaf = forge.Leaf(role="client", name="alice", ends=timedelta(hours=1))
    made = forge.write(tmp_path / "brief", leaf, forge.Signer.of(house.keys), house.keys)
    with watched(house) as server, dial(server.loop.url, keys=made.folder, policy=POLICY, patience=20) as link:
        begun = time.monotonic()
        later(timedelta(hours=1, minutes=1))
        with pytest.raises(ConnectionFailed) as caught:
            link.next()
        assert caught.value.code == "SS-3203"
        assert time.monotonic() - begun < 5
        assert server.refusals() == [("identity", "SS-3203", ALICE)]


def test_revoked_while_the_handshake_is_under_way(house):
    """TCP and the first TLS record before the revocation, the certificate after it."""
    with watched(house) as server:
        out, into = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_context(house.folder("alice")).wrap_bio(into, out, server_hostname="localhost")
        with socket.create_connection(("127.0.0.1", server.loop.port), timeout=5) as wire:
            with pytest.raises(ssl.SSLWantReadError):
                tls.do_handshake()
            wire.sendall(out.read())
            into.write(wire.recv(1 << 16))
            Authority.open(house.keys).revoke("alice")
            while not rows(house.keys / "gpu", "reloaded"):
                time.sleep(0.02)
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    into.write(wire.recv(1 << 16))
            tls.write(
                b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
                b"Sec-WebSocket-Protocol: securesplit.v1\r\n\r\n"
            )
            wire.sendall(out.read())
            assert [code for _, code, _ in server.refusals()] == ["SS-3205"]


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage", "expired", "foreign", "impostor"])
def test_a_revocation_list_that_cannot_be_used(house, kind):
    """Neither side opens its folder; a running server keeps the list it has and says so."""
    with watched(house) as server:
        for folder in ("gpu", "ca"):
            forge.put_crl(house.keys / folder, house.keys, kind)
        forge.put_crl(house.keys / "alice", house.keys, kind)
        with pytest.raises(ConnectionFailed) as caught:
            dial(server.loop.url, keys=house.keys / "alice", policy=POLICY)
        assert caught.value.code in {"SS-3206", "SS-3100"}
        deadline = time.monotonic() + 3
        while not (found := rows(house.keys / "gpu", "reloaded")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert {row["code"] for row in found} <= {"SS-3206", "SS-3100"}
        assert found
    with pytest.raises(ConnectionFailed) as caught:
        ContextHolder(house.keys / "gpu")
    assert caught.value.code in {"SS-3206", "SS-3100"}


def test_a_server_whose_list_ran_out_refuses_everybody_and_the_client_names_it(house):
    """The alert says `expired`; the client's certificate is not, so the list is."""
    outdated = replace(house.folder("gpu"), crl_pem=forge.crl(house.keys, "expired"))
    with watched(house) as server:
        server.present(outdated)
        assert opened(server.loop.url, house.folder("alice")) == "SS-3206"
        assert server.refusals() == [("tls", "SS-3206", "")]


def test_a_server_whose_clock_is_behind(house, tmp_path):
    """For it the certificate is not valid yet, and the alert says no more than `bad`."""
    leaf = forge.Leaf(role="client", name="alice", begins=timedelta(hours=2))
    made = forge.write(tmp_path / "early", leaf, forge.Signer.of(house.keys), house.keys)
    error = ssl.SSLError(1, "x")
    error.reason = "SSLV3_ALERT_BAD_CERTIFICATE"
    early = careless(house, made)
    found = diagnose(early, error, now=datetime.now(UTC) + timedelta(hours=3))
    assert found.code == "SS-3204"
    assert "clock" in found.what


# flaw: what a client says of a server with it, the server's row about the client's alert, the host that is dialled.
SERVERS = {
    "none": ("", None, "localhost"),
    "ip-only": ("", None, "127.0.0.1"),
    "dns-only": ("SS-3212", "SS-3301", "127.0.0.1"),
    "other-host": ("SS-3212", "SS-3301", "localhost"),
    "other-ip": ("SS-3212", "SS-3301", "127.0.0.1"),
    "wrong-eku": ("SS-3210", "SS-3210", "localhost"),
    "wrong-ca": ("SS-3202", "SS-3202", "localhost"),
    "expired": ("SS-3203", "SS-3203", "localhost"),
    "not-yet-valid": ("SS-3204", "SS-3301", "localhost"),
    "wrong-role": ("SS-3210", None, "localhost"),
    "two-uris": ("SS-3201", None, "localhost"),
}


@pytest.mark.parametrize("flaw", SERVERS)
def test_a_server_with_a_flaw(house, flaw, monkeypatch):
    """A server of ours would not start with it; this one skips its own checks. The client refuses it."""
    told, row, host = SERVERS[flaw]
    forged = forge.forge(house.keys, flaw, role="server")
    good = house.folder("gpu")
    key = serialization.load_pem_private_key((forged.folder / "key.pem").read_bytes(), None)
    bad = replace(good, path=forged.folder, cert_der=forged.der, key_path=forged.folder / "key.pem", _key=key)
    if told not in {"", "SS-3212"}:
        with pytest.raises(ConnectionFailed):
            ContextHolder(forged.folder)
    with watched(house) as server:
        server.present(bad)
        url = f"wss://{host}:{server.loop.port}"
        assert opened(url, house.folder("alice")) == told
        if row is not None:
            assert server.refusals() == [("tls", row, "")]


def test_a_session_cannot_be_resumed(house):
    """A client that asks for its old session gets a whole handshake, with its certificate and the list."""
    context = client_context(house.folder("alice"))
    with watched(house) as server:
        session = None
        for _ in range(2):
            with (
                socket.create_connection(("127.0.0.1", server.loop.port), timeout=5) as wire,
                context.wrap_socket(wire, server_hostname="localhost", session=session) as tls,
            ):
                assert not tls.session_reused
                tls.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                while tls.recv(4096):
                    pass
                session = tls.session
                assert session is None or not session.has_ticket


def test_who_is_not_on_the_roster_and_what_a_guest_may_do(house):
    Authority.open(house.keys).issue("dave", "client")
    with watched(house) as server:
        with pytest.raises(ConnectionFailed) as caught:
            dial(server.loop.url, keys=house.keys / "dave", policy=POLICY)
        assert (caught.value.code, caught.value.exit_code) == ("SS-3214", 4)
        assert server.refusals() == [("identity", "SS-3214", ALICE.replace("alice", "dave"))]
    shutil.rmtree(house.keys / "gpu/audit")
    with watched(house, Limits(guests=frozenset({"dave"}))) as server:
        with pytest.raises(SecureSplitError) as refused:
            steps(house, server, "dave", 1)
        assert (refused.value.code, refused.value.exit_code) == ("SS-2041", 3)
        assert server.refusals() == [("policy", "SS-2041", ALICE.replace("alice", "dave"))]


def steps(house, server, name: str, count: int) -> None:
    """One learning step in each of some sessions."""
    for _ in range(count):
        with dial(server.loop.url, keys=house.keys / name, policy=POLICY, patience=20) as link:
            client = house.client(link, POLICY)
            client.train("B")
            client.step(batches_of(client, sentences(2, seed=1))[0])


@pytest.mark.parametrize(("quota", "limit"), [("steps", 2), ("tokens", 40), ("bytes", 12_000)])
def test_a_quota_that_is_used_up(house, quota, limit):
    """It counts over all connections of the client, and no other client's."""
    limits = Limits(client={"alice": ClientLimits(**{quota: limit})})
    with watched(house, limits) as server:
        with pytest.raises(SecureSplitError) as refused:
            steps(house, server, "alice", 4)
        assert (refused.value.code, refused.value.exit_code) == ("SS-2040", 3)
        assert server.refusals() == [("limit", "SS-2040", ALICE)]
        over = [(row["quota"], row["limit"], row["peer"]) for row in rows(house.keys / "gpu", "quota")]
        assert over == [(quota, limit, ALICE)]
        steps(house, server, "bob", 1)
