"""Real handshakes on loopback. The hostile sides use bare `ssl` contexts, none of this package's code."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from securesplit.errors import ConnectionFailed
from securesplit.pki.authority import Authority
from securesplit.pki.identity import Identity
from securesplit.pki.store import KeyFolder
from securesplit.transport.client import WebSocketPipe
from securesplit.transport.record import Record
from securesplit.transport.refresh import Refresher
from securesplit.transport.refusal import Refusal
from securesplit.transport.tls import (
    ContextHolder,
    client_context,
    diagnose,
    folder_of,
    peer_identity,
    server_context,
)

NOT_ASKED = "spiffe://securesplit.local/securesplit/client/bob"


@dataclass
class Met:
    """What both sides saw of one connection."""

    version: str | None = None
    peer: Identity | None = None
    server_saw: list[object] = field(default_factory=list)


async def talk(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> Met:
    """One connection: ping, pong. Raises whatever the client meets."""
    met = Met()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("ssl_object")
        try:
            met.server_saw.append(peer_identity(connection, "client"))
            writer.write(await reader.readexactly(4))
        except (ConnectionFailed, EOFError) as error:
            met.server_saw.append(error)
        finally:
            writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server)
    try:
        port = listener.sockets[0].getsockname()[1]
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname=host)
            try:
                met.version = writer.get_extra_info("ssl_object").version()
                writer.write(b"ping")
                await writer.drain()
                assert await reader.readexactly(4) == b"ping"
                if hasattr(client, "folder"):
                    met.peer = peer_identity(writer.get_extra_info("ssl_object"), "server")
            finally:
                writer.close()
    finally:
        listener.close()
        await asyncio.sleep(0.01)
    return met


def connect(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> Met:
    return asyncio.run(talk(server, client, host))


def fails(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> BaseException:
    with pytest.raises((OSError, EOFError)) as caught:
        connect(server, client, host)
    return caught.value


def bare_client(keys: Path, name: str | None, *, ca: Path | None = None) -> ssl.SSLContext:
    """A client that skips every check on itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=ca or keys / "ca/cert.pem")
    if name:
        context.load_cert_chain(keys / name / "cert.pem", keys / name / "key.pem")
    return context


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def authority(keys: Path) -> Authority:
    made = Authority.create(keys)
    made.issue("gpu", "server")
    made.issue("alice", "client")
    return made


@dataclass
class House:
    keys: Path
    authority: Authority
    server: ssl.SSLContext
    refusals: list[Refusal]

    def refused(self, client: ssl.SSLContext) -> tuple[BaseException, str]:
        """The client's error and the code in the server's audit."""
        error = fails(self.server, client)
        assert len(self.refusals) == 1, self.refusals
        return error, self.refusals.pop().code


@pytest.fixture
def house(keys: Path, authority: Authority) -> House:
    refusals: list[Refusal] = []
    return House(keys, authority, server_context(KeyFolder.open(keys, "server"), on_refusal=refusals.append), refusals)


def forge(
    authority: Authority,
    name: str,
    uris: list[str],
    usage: x509.ObjectIdentifier,
    *,
    key: ec.EllipticCurvePrivateKey | None = None,
) -> None:
    """A folder with the authority's true signature over a profile that it would never issue."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(True, False, False, False, False, False, False, False, False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName([*names, x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.certificate.public_key()),  # type: ignore[arg-type]
            critical=False,
        )
        .sign(authority._key, hashes.SHA256())
    )
    folder = authority.keys / name
    folder.mkdir(mode=0o700)
    pem = leaf.public_bytes(serialization.Encoding.PEM)
    for file in ("cert.pem", "chain.pem"):
        (folder / file).write_bytes(pem)
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (folder / "key.pem").chmod(0o600)
    shutil.copy(authority.path / "cert.pem", folder / "ca.pem")
    shutil.copy(authority.path / "crl.pem", folder / "crl.pem")


# --- accepted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_both_sides_know_each_other_over_tls_1_3(house: House, host: str) -> None:
    met = connect(house.server, client_context(KeyFolder.open(house.keys, "client")), host)
    assert met.version == "TLSv1.3"
    assert met.peer == Identity("securesplit.local", "server", "gpu")
    assert met.server_saw == [Identity("securesplit.local", "client", "alice")]
    assert house.refusals == []


def test_the_settings_that_no_handshake_shows(house: House) -> None:
    client = client_context(KeyFolder.open(house.keys, "client"))
    for context in (house.server, client):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.verify_flags & ssl.VERIFY_X509_STRICT
        assert context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF
        assert len(context.get_ca_certs()) == 1, "the pinned authority and nothing of the system's"
    assert client.check_hostname
    assert house.server.num_tickets == 0


# --- refused by the server --------------------------------------------------------------------------------------------


def test_no_certificate(house: House) -> None:
    error, code = house.refused(bare_client(house.keys, None))
    assert code == "SS-3306"
    assert not isinstance(error, ssl.SSLCertVerificationError), "it is the server that refuses"


def test_another_authority_s_certificate(house: House, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other")
    other.issue("alice", "client")
    error, code = house.refused(bare_client(other.keys, "alice", ca=house.keys / "ca/cert.pem"))
    assert code == "SS-3202"
    # A party of another authority: its own folder is in order, so the diagnosis names what is left.
    told = diagnose(KeyFolder.open(other.keys, "client"), error, datetime.now(UTC))
    assert told.code == "SS-3301"
    assert "another authority or revoked" in told.what


def test_a_server_s_certificate_does_not_make_a_client(house: House) -> None:
    _, code = house.refused(bare_client(house.keys, "gpu"))
    assert code == "SS-3210"
    with pytest.raises(ConnectionFailed) as caught:
        KeyFolder.open(house.keys / "gpu", "client")
    assert caught.value.code == "SS-3210"


def test_tls_1_2(house: House) -> None:
    client = bare_client(house.keys, "alice")
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    _, code = house.refused(client)
    assert code == "SS-3302"


def test_a_party_that_does_not_speak_tls(house: House) -> None:
    async def shout() -> bytes:
        async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            raise AssertionError("a connection without TLS got through")

        listener = await asyncio.start_server(never, "127.0.0.1", 0, ssl=house.server)
        async with listener:
            reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            try:
                return await asyncio.wait_for(reader.read(), 10)
            except ConnectionResetError:
                return b""
            finally:
                writer.close()

    assert b"HTTP" not in asyncio.run(shout())
    assert [refusal.code for refusal in house.refusals] == ["SS-3303"]


def test_a_revoked_client(house: House, tmp_path: Path) -> None:
    shutil.copytree(house.keys / "alice", tmp_path / "alice")
    unaware = KeyFolder.open(tmp_path / "alice", "client")
    house.authority.revoke("alice")
    house.server = server_context(KeyFolder.open(house.keys, "server"), on_refusal=house.refusals.append)
    error, code = house.refused(client_context(unaware))
    assert code == "SS-3205"
    assert diagnose(unaware, error, datetime.now(UTC)).code == "SS-3301", "this machine cannot know more"
    shutil.copy(house.keys / "ca/crl.pem", tmp_path / "alice/crl.pem")
    told = diagnose(unaware, error, datetime.now(UTC))
    assert told.code == "SS-3205"
    assert "revoked" in told.what


def test_an_expired_client(house: House) -> None:
    now = datetime.now(UTC)
    house.authority.issue("bob", "client", now=now - timedelta(days=1, minutes=1), days=1)
    error, code = house.refused(bare_client(house.keys, "bob"))
    assert code == "SS-3203"
    before = KeyFolder.open(house.keys / "bob", "client", now=now - timedelta(minutes=5))
    assert diagnose(before, error, now).code == "SS-3203"


def test_two_identities_in_one_certificate(house: House) -> None:
    alice = "spiffe://securesplit.local/securesplit/client/alice"
    forge(house.authority, "two", [alice, NOT_ASKED], ExtendedKeyUsageOID.CLIENT_AUTH)
    with pytest.raises(EOFError):
        connect(house.server, bare_client(house.keys, "two"))
    with pytest.raises(ConnectionFailed) as caught:
        KeyFolder.open(house.keys / "two", "client")
    assert caught.value.code == "SS-3201"


def test_what_openssl_lets_pass_and_the_identity_check_refuses(house: House) -> None:
    wrong = {
        "two": ["spiffe://securesplit.local/securesplit/client/alice", NOT_ASKED],
        "none": [],
        "role": ["spiffe://securesplit.local/securesplit/server/gpu"],
    }
    codes = {}
    for name, uris in wrong.items():
        forge(house.authority, name, uris, ExtendedKeyUsageOID.CLIENT_AUTH)

        async def meet(name: str = name) -> Met:
            met = Met()
            answered = asyncio.Event()

            async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                try:
                    peer_identity(writer.get_extra_info("ssl_object"), "client")
                except ConnectionFailed as error:
                    met.server_saw.append(error.code)
                writer.close()
                answered.set()

            async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=house.server) as listener:
                port = listener.sockets[0].getsockname()[1]
                client = bare_client(house.keys, name)
                _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="localhost")
                await asyncio.wait_for(answered.wait(), 10)
                writer.close()
            return met

        codes[name] = asyncio.run(meet()).server_saw
    assert codes == {"two": ["SS-3201"], "none": ["SS-3201"], "role": ["SS-3210"]}


def test_another_domain_is_outside_of_what_the_authority_may_certify(house: House) -> None:
    uris = ["spiffe://evil.local/securesplit/client/alice"]
    forge(house.authority, "domain", uris, ExtendedKeyUsageOID.CLIENT_AUTH)
    _, code = house.refused(bare_client(house.keys, "domain"))
    assert code == "SS-3211"


def test_an_outdated_list_refuses_everybody(tmp_path: Path) -> None:
    then = datetime.now(UTC) - timedelta(days=8)
    authority = Authority.create(tmp_path / "old", now=then)
    authority.issue("gpu", "server", now=then)
    authority.issue("alice", "client", now=then)
    refusals: list[Refusal] = []
    server = server_context(KeyFolder.open(authority.keys, "server", now=then), on_refusal=refusals.append)
    fails(server, bare_client(authority.keys, "alice"))
    assert [refusal.code for refusal in refusals] == ["SS-3206"]
    for role in ("server", "client"):
        with pytest.raises(ConnectionFailed) as caught:
            KeyFolder.open(authority.keys, role)  # type: ignore[arg-type]
        assert caught.value.code == "SS-3206"
    authority.write_crl()
    KeyFolder.open(authority.keys, "server")


# --- refused by the client --------------------------------------------------------------------------------------------


def told(house: House, server: ssl.SSLContext, host: str = "localhost") -> ConnectionFailed:
    alice = KeyFolder.open(house.keys / "alice", "client")
    return diagnose(alice, fails(server, client_context(alice), host), datetime.now(UTC))


def test_another_host_name(house: House) -> None:
    for host in ("gpu.example", "127.0.0.2"):
        error = told(house, house.server, host)
        assert error.code == "SS-3212"
        assert "this side refused the server" in error.what


def bare_server(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


def test_a_client_s_certificate_does_not_make_a_server(house: House) -> None:
    uri = "spiffe://securesplit.local/securesplit/client/bob"
    forge(house.authority, "bob", [uri], ExtendedKeyUsageOID.CLIENT_AUTH)
    error = told(house, bare_server(house.keys / "bob/cert.pem", house.keys / "bob/key.pem"))
    assert error.code == "SS-3210"
    with pytest.raises(ConnectionFailed) as caught:
        KeyFolder.open(house.keys / "alice", "server")
    assert caught.value.code == "SS-3210"


def test_a_server_of_another_authority(house: House, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other")
    other.issue("gpu", "server")
    error = told(house, bare_server(other.keys / "gpu/chain.pem", other.keys / "gpu/key.pem"))
    assert error.code == "SS-3202"
    assert "another authority" in error.what


def test_a_revoked_server(house: House) -> None:
    house.authority.revoke("gpu")
    assert told(house, house.server).code == "SS-3205"


def test_a_server_with_the_right_purpose_and_a_client_s_identity(house: House) -> None:
    forge(house.authority, "bob", [NOT_ASKED], ExtendedKeyUsageOID.SERVER_AUTH)
    server = bare_server(house.keys / "bob/cert.pem", house.keys / "bob/key.pem")
    alice = client_context(KeyFolder.open(house.keys / "alice", "client"))
    server.sslobject_class = ssl.SSLObject

    async def meet() -> str:
        async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=server) as listener:
            port = listener.sockets[0].getsockname()[1]
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=alice, server_hostname="localhost")
            try:
                peer_identity(writer.get_extra_info("ssl_object"), "server")
            except ConnectionFailed as error:
                return error.code
            finally:
                writer.close()
        return "accepted"

    assert asyncio.run(meet()) == "SS-3210"


# --- the diagnosis ----------------------------------------------------------------------------------------------------


def test_nobody_listens(house: House) -> None:
    alice = KeyFolder.open(house.keys, "client")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionRefusedError) as caught:
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert diagnose(alice, caught.value).code == "SS-3304"


def test_a_waiting_time_that_a_library_swallowed_is_not_the_cause(house: House) -> None:
    error = EOFError()
    error.__context__ = TimeoutError()
    assert diagnose(KeyFolder.open(house.keys, "client"), error).code == "SS-3301"


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda folder: (folder / "key.pem").chmod(0o644), "SS-3101"),
        (lambda folder: folder.chmod(0o755), "SS-3101"),
        (lambda folder: (folder / "key.pem").write_bytes(b""), "SS-3102"),
        (lambda folder: (folder / "crl.pem").unlink(), "SS-3100"),
        (lambda folder: (folder / "crl.pem").write_bytes(b""), "SS-3206"),
        (lambda folder: (folder / "ca.pem").write_bytes(b""), "SS-3209"),
        (lambda folder: None, "SS-3301"),
    ],
)
def test_a_closed_connection_is_explained_by_what_is_wrong_here(
    house: House, damage: Callable[[Path], object], code: str
) -> None:
    alice = KeyFolder.open(house.keys, "client")
    damage(alice.path)
    error = RuntimeError("did not receive a valid HTTP response")
    error.__cause__ = EOFError()
    found = diagnose(alice, error)
    assert found.code == code
    assert found.hint
    assert "refused" in found.what
    assert "valid HTTP" not in found.what, "nothing of the foreign text is passed on"


@pytest.mark.parametrize(("days", "code"), [(31, "SS-3203"), (-1, "SS-3204")])
def test_a_clock_that_disagrees(house: House, days: int, code: str) -> None:
    alice = KeyFolder.open(house.keys, "client")
    assert diagnose(alice, EOFError(), datetime.now(UTC) + timedelta(days=days)).code == code


def blocking(
    server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> tuple[object, bool]:
    """One connection with blocking sockets, whose server does send alerts: (the client's session, resumed)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            raw, _ = listener.accept()
            try:
                with server.wrap_socket(raw, server_side=True) as connection:
                    connection.sendall(connection.recv(4))
                    connection.recv(1)
            except OSError:
                raw.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            raw = socket.create_connection(listener.getsockname(), timeout=10)
            with client.wrap_socket(raw, server_hostname="localhost", session=session) as connection:
                connection.sendall(b"ping")
                if connection.recv(4) != b"ping":
                    raise EOFError
                return connection.session, bool(connection.session_reused)
        finally:
            thread.join(10)


def test_an_alert_is_understood_when_a_server_sends_one(house: House, tmp_path: Path) -> None:
    shutil.copytree(house.keys / "alice", tmp_path / "alice")
    unaware = KeyFolder.open(tmp_path / "alice", "client")
    house.authority.revoke("alice")
    server = server_context(KeyFolder.open(house.keys, "server"))
    # In memory, because over a socket the end of the file may overtake the alert.
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    refusing = server.wrap_bio(to_server, to_client, server_side=True)
    client = client_context(unaware).wrap_bio(to_client, to_server, server_hostname="localhost")
    for side in (client, refusing, client):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    with pytest.raises(ssl.SSLError):
        refusing.do_handshake()
    with pytest.raises(ssl.SSLError) as caught:
        client.read()
    found = diagnose(unaware, caught.value)
    assert found.code == "SS-3205"
    assert "says the other side" in found.what


def test_a_server_without_tls_1_3(house: House) -> None:
    server = bare_server(house.keys / "gpu/cert.pem", house.keys / "gpu/key.pem")
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    alice = KeyFolder.open(house.keys, "client")
    with pytest.raises(ssl.SSLError) as caught:
        blocking(server, client_context(alice))
    assert diagnose(alice, caught.value).code == "SS-3302"


def test_no_session_can_be_resumed(house: House) -> None:
    client = client_context(KeyFolder.open(house.keys, "client"))
    control = server_context(KeyFolder.open(house.keys, "server"))
    control.num_tickets = 2
    session, _ = blocking(control, client)
    assert isinstance(session, ssl.SSLSession)
    assert session.has_ticket
    assert blocking(control, client, session)[1], "the control resumes, so the test can tell"

    session, _ = blocking(house.server, client)
    assert session is None or not session.has_ticket  # type: ignore[attr-defined]
    assert not blocking(house.server, client, session)[1]  # type: ignore[arg-type]


# --- exchange of a running context ------------------------------------------------------------------------------------


def test_a_revocation_takes_effect_on_a_listening_server(authority: Authority, keys: Path) -> None:
    authority.issue("bob", "client")
    refusals: list[Refusal] = []
    holder = ContextHolder(keys, on_refusal=refusals.append)
    alice, bob = (client_context(KeyFolder.open(keys / name, "client")) for name in ("alice", "bob"))
    leaf = KeyFolder.open(keys / "alice", "client").cert_der
    assert connect(holder.listening, alice).version == "TLSv1.3"
    assert holder.require_valid(leaf).name == "alice"
    assert not holder.changed()
    authority.revoke("alice")
    assert holder.changed()
    assert connect(holder.listening, alice).version == "TLSv1.3", "not before the reload"
    holder.reload()
    assert not holder.changed()
    fails(holder.listening, alice)
    assert [refusal.code for refusal in refusals] == ["SS-3205"]
    assert connect(holder.listening, bob).version == "TLSv1.3"
    with pytest.raises(ConnectionFailed) as caught:
        holder.require_valid(leaf)
    assert caught.value.code == "SS-3205", "a live session of hers has to end"


def test_a_new_server_certificate_is_used_and_each_connection_knows_its_own(authority: Authority, keys: Path) -> None:
    holder = ContextHolder(keys)
    alice = client_context(KeyFolder.open(keys / "alice", "client"))
    seen: list[tuple[bytes, bytes]] = []

    async def meet() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(len(folder_of(writer.get_extra_info("ssl_object")).cert_der).to_bytes(4, "big"))
            writer.write(folder_of(writer.get_extra_info("ssl_object")).cert_der)
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=holder.listening) as listener:
            port = listener.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=alice, server_hostname="localhost")
            said = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
            presented = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            seen.append((said, presented))
            writer.close()

    asyncio.run(meet())
    authority.revoke("gpu")
    authority.issue("gpu", "server")
    holder.reload()
    asyncio.run(meet())
    assert all(said == presented for said, presented in seen)
    assert seen[0] != seen[1]


def swap_key(keys: Path) -> None:
    (keys / "gpu/key.pem").write_bytes((keys / "alice/key.pem").read_bytes())


def send_foreign_chain(keys: Path) -> None:
    (keys / "gpu/chain.pem").write_bytes((keys / "alice/chain.pem").read_bytes())


def send_client_certificate(keys: Path) -> None:
    """What is checked is the server's; what a handshake would send is a client's, with the same key."""
    root = Authority.open(keys)
    key = serialization.load_pem_private_key((keys / "gpu/key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    forge(root, "bad", [NOT_ASKED], ExtendedKeyUsageOID.CLIENT_AUTH, key=key)
    (keys / "gpu/chain.pem").write_bytes((keys / "bad/cert.pem").read_bytes())


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (swap_key, "SS-3102"),
        (lambda keys: (keys / "gpu/key.pem").chmod(0o644), "SS-3101"),
        (lambda keys: (keys / "gpu/cert.pem").unlink(), "SS-3100"),
        (lambda keys: (keys / "gpu/chain.pem").write_bytes(b"junk"), "SS-3305"),
        (send_foreign_chain, "SS-3305"),
        (send_client_certificate, "SS-3305"),
    ],
)
def test_a_broken_folder_leaves_the_old_context_in_force(
    authority: Authority, keys: Path, damage: Callable[[Path], object], code: str
) -> None:
    holder = ContextHolder(keys / "gpu")
    before = holder.current()
    damage(keys)
    with pytest.raises(ConnectionFailed) as caught:
        holder.reload()
    assert caught.value.code == code
    assert holder.current() is before
    assert not holder.changed(), "the same broken files are not tried every second"
    alice = client_context(KeyFolder.open(keys / "alice", "client"))
    assert connect(holder.listening, alice).version == "TLSv1.3"


@pytest.mark.parametrize(
    "damage",
    [
        lambda keys: (keys / "gpu/key.pem").chmod(0o644),
        lambda keys: (keys / "gpu/key.pem").write_bytes(b""),
        lambda keys: (keys / "gpu/ca.pem").write_bytes(b""),
        lambda keys: (keys / "gpu/crl.pem").write_bytes(b"junk"),
    ],
)
def test_a_revocation_counts_whatever_else_is_wrong(
    authority: Authority, keys: Path, damage: Callable[[Path], object]
) -> None:
    authority.issue("bob", "client")
    refusals: list[Refusal] = []
    holder = ContextHolder(keys / "gpu", on_refusal=refusals.append)
    alice, bob = (KeyFolder.open(keys / name, "client") for name in ("alice", "bob"))
    authority.revoke("alice")
    damage(keys)
    with pytest.raises(ConnectionFailed):
        holder.reload()
    with pytest.raises(ConnectionFailed, match="SS-3205"):
        holder.require_valid(alice.cert_der)
    assert holder.require_valid(bob.cert_der).name == "bob"
    fails(holder.listening, client_context(alice))
    assert [refusal.code for refusal in refusals] == ["SS-3205"]
    assert connect(holder.listening, client_context(bob)).version == "TLSv1.3"


def test_a_revocation_counts_when_the_server_s_own_certificate_is_over(
    authority: Authority, keys: Path, later: Callable[[timedelta], None]
) -> None:
    authority.issue("old", "server", now=datetime.now(UTC) - timedelta(hours=23), days=1)
    holder = ContextHolder(keys / "old")
    alice = KeyFolder.open(keys / "alice", "client")
    later(timedelta(hours=1, minutes=1))
    authority.revoke("alice")
    with pytest.raises(ConnectionFailed, match="SS-3203"):
        holder.reload()
    with pytest.raises(ConnectionFailed, match="SS-3205"):
        holder.require_valid(alice.cert_der)


def test_a_forged_or_older_list_is_not_taken(authority: Authority, keys: Path, tmp_path: Path) -> None:
    old = (keys / "ca/crl.pem").read_bytes()
    authority.revoke("alice")
    holder = ContextHolder(keys / "gpu")
    leaf = x509.load_pem_x509_certificate((keys / "alice/cert.pem").read_bytes())
    other = Authority.create(tmp_path / "other")
    for pem in (old, (other.keys / "ca/crl.pem").read_bytes()):
        (keys / "ca/crl.pem").write_bytes(pem)
        (keys / "gpu/crl.pem").write_bytes(pem)
        before = holder.folder
        (keys / "gpu/key.pem").chmod(0o644)
        with pytest.raises(ConnectionFailed):
            holder.reload()
        assert holder.folder is before
        with pytest.raises(ConnectionFailed, match="SS-3205"):
            holder.require_valid(leaf.public_bytes(serialization.Encoding.DER))


def test_everybody_is_looked_at_again_when_the_list_runs_out(
    tmp_path: Path, later: Callable[[timedelta], None]
) -> None:
    keys = tmp_path / "keys"
    then = datetime.now(UTC) - timedelta(days=6, hours=23)
    made = Authority.create(keys, now=then)
    made.issue("gpu", "server")
    made.issue("alice", "client")
    holder = ContextHolder(keys / "gpu")
    looking = Refresher(holder, Record())
    alice, gpu = KeyFolder.open(keys / "alice", "client"), holder.folder
    pipe = live_pipe(alice, gpu)
    assert not looking.look()
    pipe._require_valid()
    later(timedelta(hours=1, minutes=1))
    assert looking.look(), "the list has run out"
    assert not looking.look(), "once"
    for check in (lambda: holder.require_valid(alice.cert_der), pipe._require_valid):
        with pytest.raises(ConnectionFailed, match="SS-3206"):
            check()
    made.write_crl()
    pipe._require_valid()
    assert looking.look()
    assert holder.require_valid(alice.cert_der).name == "alice"


def live_pipe(client: KeyFolder, server: KeyFolder) -> WebSocketPipe:
    """A pipe after its handshake, without a socket."""
    pipe = WebSocketPipe.__new__(WebSocketPipe)
    pipe._folder, pipe._stamps, pipe._looked = client, client.stamps(), time.monotonic() - 100
    pipe.peer, pipe._until = server.cert_der, server.not_after
    return pipe


def test_a_client_stops_for_a_revoked_server_though_its_own_folder_is_broken(authority: Authority, keys: Path) -> None:
    pipe = live_pipe(KeyFolder.open(keys / "alice", "client"), KeyFolder.open(keys / "gpu", "server"))
    (keys / "alice/key.pem").chmod(0o640)
    (keys / "alice/crl.pem").touch()
    pipe._require_valid()
    pipe._looked = time.monotonic() - 100
    authority.revoke("gpu")
    for _ in range(2):
        with pytest.raises(ConnectionFailed, match="SS-3205"):
            pipe._require_valid()
        pipe._looked = time.monotonic() - 100


def test_a_foreign_connection_has_no_identity() -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    connection = bare.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="localhost")
    with pytest.raises(ConnectionFailed) as caught:
        folder_of(connection)
    assert caught.value.code == "SS-3305"
