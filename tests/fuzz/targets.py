"""What is fuzzed: every parser of what a peer, a file or an operator may hand over, each with the errors that it declares.

A target takes bytes and either returns, or raises one of its declared errors; anything else is a finding. Where something was
accepted, it must say the same again when it is written out. The same targets run under hypothesis (test_targets.py, always) and
under atheris (scripts/fuzz, which is guided by coverage). Nothing here needs torch or pytest.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from securesplit.aggregate import wire
from securesplit.aggregate.he import CLIENT, HeScheme, pack_frame, unpack_frame
from securesplit.aggregate.record import decode_record
from securesplit.aggregate.shamir import Share, combine, is_field_element
from securesplit.errors import AggregationAborted, ConnectionFailed, InputError, RemoteProtocolError, SecureSplitError
from securesplit.journal.events import Loaded, Refused
from securesplit.journal.row import RowError, encode_row, parse_row
from securesplit.pki.authority import Authority
from securesplit.pki.identity import Identity, identity_of
from securesplit.pki.past import PastAuthority
from securesplit.pki.profile import Hosts
from securesplit.pki.request import make_request, read_request
from securesplit.pki.store import KeyFolder
from securesplit.policy.load import load_policy, parse_policy
from securesplit.protocol import messages as m
from securesplit.protocol.codec import Caps, decode, encode
from securesplit.protocol.job import load_job, parse_job
from securesplit.protocol.offer import parse_offer
from securesplit.protocol.session import Party, Session
from securesplit.protocol.states import State
from securesplit.protocol.transcript import array_of
from securesplit.transport.http import Head, Request, Wire

ROOT = Path(__file__).parents[2]
CAPS = Caps(message_bytes=1 << 16)
JOB = load_job(ROOT / "examples" / "job.toml")
POLICIES = tuple(sorted((ROOT / "policies").glob("*.toml")))


@dataclass(frozen=True)
class Target:
    """One parser under test.

    Attributes:
        run: takes any bytes.
        declared: errors that it may raise.
        seeds: good inputs to begin with.
        largest: bytes beyond which nothing new can be found.
    """

    run: Callable[[bytes], None]
    declared: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    largest: int = 4096

    def __call__(self, data: bytes) -> None:
        """Run it, and check that a declared error is one that the product documents."""
        code, what = "", ""
        try:
            self.run(data)
        except self.declared as error:
            if isinstance(error, SecureSplitError):
                code, what = error.code, error.what
        assert not code or code in known_codes(), code
        assert len(what) < 2000


@cache
def known_codes() -> frozenset[str]:
    from securesplit.codes import explained_codes

    return frozenset(found.code for found in explained_codes())


# ---- messages --------------------------------------------------------------------------------------------------------


def _rows(count: int, dtype: str = "f32") -> m.Blob:
    item = {"f32": b"\0\0\0\x3f", "bf16": b"\x80\x3f"}
    data = item[dtype] * (3 * count) if dtype in item else struct.pack("<f3b", 0.5, 127, -3, 0) * count
    return m.Blob(dtype=dtype, shape=(count, 3), data=data)  # type: ignore[arg-type]


@cache
def samples() -> tuple[m.Message, ...]:
    """One of every kind, and rows of every type."""
    digest, words = "a" * 64, m.Blob(dtype="u32", shape=(2,), data=bytes(8))
    return (
        m.Hello(version=1, nonce=bytes(32), policy=digest),
        m.Welcome(session=bytes(16), nonce=bytes(32), job=JOB.canonical(), model=digest, signature=bytes(8)),
        m.Confirm(signature=bytes(8)),
        *(m.Forward(step=5, lengths=(1, 1), learn=True, hidden=_rows(2, d)) for d in ("f32", "bf16", "int8")),
        m.Hidden(step=5, hidden=_rows(2)),
        m.Backward(step=5, gradient=_rows(2, "bf16")),
        m.Gradient(step=5, gradient=_rows(2, "int8")),
        m.DropCache(cache=1),
        m.Declined(step=5, code="SS-4040"),
        m.RoundReady(round=0, dim=4, frozen=digest),
        m.Secagg(round=0, stage=0, body=b"x", vector=words),
        m.Failure(code="SS-4001"),
        m.Bye(),
        m.RoundBegin(round=0, run=bytes(16)),
        m.RoundKept(round=0, run=bytes(16), clients=("alice", "bob", "carol")),
        m.RoundStatus(round=0, closed=False, missing=("carol",)),
        m.KeepAnchor(blob=b"sealed"),
        m.Run(run=bytes(16)),
        m.Join(round=0, name="alice", certificate=b"der", key=bytes(32), signature=bytes(8)),
        m.Handover(to="alice", of="bob", asked=bytes(32), key=bytes(32), box=m.Blob(dtype="u8", shape=(1,), data=b"x")),
        m.Mark(what="use", name=bytes(32)),
        m.Seal(number=0, stream=bytes(32), log=bytes(16), rows=0, head=bytes(32), signature=bytes(8)),
    )


def frame(data: bytes) -> None:
    """The decoder of whole messages."""
    message = decode(data, CAPS)
    again = decode(encode(message), CAPS)
    assert again == message


def tensor(data: bytes) -> None:
    """Tensors of every type: a type, up to three sides, and bytes; what is accepted has its values."""
    if len(data) < 8:
        return
    dtype = ("f32", "bf16", "int8", "u8", "u32", "u64")[data[0] % 6]
    sides = struct.unpack("<3H", data[2:8])[: 1 + data[1] % 3]
    try:
        blob = m.Blob(dtype=dtype, shape=sides, data=data[8:])  # type: ignore[arg-type]
    except ValueError:  # pydantic's is one.
        return
    if dtype in m.ROW_TYPES:
        found = array_of(blob)
        assert found.shape == sides
    if len(sides) == 2 and dtype in m.ROW_TYPES and sides[0]:
        sent = m.Hidden(step=0, hidden=blob)
        assert decode(encode(sent), Caps(message_bytes=1 << 20)) == sent


_PARTY = Party(b"own", b"peer", lambda _data: bytes(8), lambda *_: None)


def session(data: bytes) -> None:
    """A session in any state, given any messages of any lengths: byte 0 says which, then each behind its length."""
    if not data:
        return
    state, role = list(State)[(data[0] & 0x7F) % 5], "client" if data[0] & 0x80 else "server"
    end = Session(role, _PARTY, CAPS)  # type: ignore[arg-type]
    hello, welcome, forward, backward = samples()[0], samples()[1], samples()[3], samples()[7]
    end.hello, end.welcome = hello, welcome  # type: ignore[assignment]
    end._steps.note(forward)
    end._steps.note(backward)
    end.state = state
    place = 1
    while place + 2 <= len(data):
        size = int.from_bytes(data[place : place + 2], "little")
        part = data[place + 2 : place + 2 + size]
        place += 2 + size
        assert end.allowance(part[:8]) <= CAPS.message_bytes
        try:
            end.receive(part)
        except RemoteProtocolError:
            assert end.state is State.CLOSED
            sent = end.data_to_send()
            assert not sent or isinstance(decode(sent[-1], CAPS), m.Failure)
            raise


def _session_seeds() -> list[bytes]:
    by = {type(message): message for message in samples()}
    runs: list[tuple[int, list[type[m.Message]]]] = [
        (0, [m.Hello]), (0x81, [m.Welcome]), (2, [m.Confirm, m.DropCache, m.KeepAnchor, m.Forward]), (3, [m.RoundReady, m.Secagg, m.RoundKept, m.Join, m.Handover]),
        (3, [m.Bye]), (0x83, [m.Hidden, m.Declined, m.Gradient, m.RoundBegin, m.Secagg, m.RoundStatus]), (0x83, [m.Failure]), (3, [m.Seal]), (3, list(by)),
        (0x83, list(by)), (4, [m.Hello]),
    ]  # fmt: skip
    return [
        bytes([number]) + b"".join(len(f).to_bytes(2, "little") + f for f in (encode(by[kind]) for kind in kinds))
        for number, kinds in runs
    ]


# ---- policies and jobs -----------------------------------------------------------------------------------------------


def policy(data: bytes) -> None:
    """The policy loader, the policy that a server offers, and the job, by the first byte."""
    text = data[1:].decode("utf-8", errors="replace")
    match data[:1]:
        case b"\1":
            parse_offer(text)
        case b"\2":
            job = parse_job(text)
            assert parse_job(job.canonical()) == job
        case b"\3":
            with tempfile.NamedTemporaryFile(suffix=".toml") as file:
                Path(file.name).write_bytes(data[1:])
                load_policy(file.name)
        case _:
            found = parse_policy(text)
            assert parse_offer(found.canonical().decode()) == found


def _policy_seeds() -> list[bytes]:
    texts = [path.read_bytes() for path in POLICIES]
    offers = [b"\1" + parse_policy(text.decode()).canonical() for text in texts]
    return [*(b"\0" + t for t in texts), *(b"\3" + t for t in texts[:1]), *offers, b"\2" + JOB.canonical().encode()]


# ---- certificates ----------------------------------------------------------------------------------------------------


@cache
def site() -> Path:
    """An authority, a server and a client; the folder lives as long as the process."""
    keys = Path(tempfile.mkdtemp(prefix="securesplit-fuzz-")) / "keys"
    authority = Authority.create(keys)
    authority.issue("gpu", "server")
    authority.issue("alice", "client")
    return keys


@cache
def folder() -> KeyFolder:
    return KeyFolder.open(site() / "gpu", "server")


def certificate(data: bytes) -> None:
    """A leaf as TLS delivers it, an authority's files, a request, by the first byte."""
    ours, rest = folder(), data[1:]
    match data[:1]:
        case b"\1":
            PastAuthority.parse(rest, ours.crl_pem)
        case b"\2":
            PastAuthority.parse(ours.ca_pem, rest)
        case b"\3":
            with tempfile.NamedTemporaryFile(suffix=".pem") as file:
                Path(file.name).write_bytes(rest)
                read_request(Path(file.name))
        case b"\4":
            Identity.parse(rest.decode("utf-8", errors="replace"))
        case _:
            identity_of(rest)
            assert ours.verify_peer(rest, "client").name == "alice"  # Nobody else's was issued.


def _certificate_seeds() -> list[bytes]:
    keys = site()
    asked = make_request(keys / "carol", Identity("securesplit.local", "client", "carol"), Hosts((), ()))
    alice = KeyFolder.open(keys / "alice", "client")
    return [
        b"\0" + alice.cert_der, b"\0" + folder().cert_der, b"\1" + alice.ca_pem, b"\2" + alice.crl_pem,
        b"\3" + asked.path.read_bytes(), b"\4" + alice.identity.uri.encode(),
    ]  # fmt: skip


# ---- secure sums -----------------------------------------------------------------------------------------------------

BODIES: tuple[type[wire.Body], ...] = (
    wire.Advertise, wire.Roster, wire.Shares, wire.Routed, wire.Masked, wire.Survivors, wire.Consistent, wire.Bundle,
    wire.Unmask, wire.Result, wire.Abort,
)  # fmt: skip
SCHEME = HeScheme("bfv", 3)


def share(data: bytes) -> None:
    """Bodies of a secure sum by the first byte, frames of encrypted vectors, shares, records of rounds."""
    kind, rest = data[0] if data else 0, data[1:]
    if kind < len(BODIES):
        body = wire.decode(BODIES[kind], rest)
        assert wire.encode(body) == rest
    elif kind == len(BODIES):
        unpack_frame(SCHEME, CLIENT, 5, bytes(16), rest)
    elif kind == len(BODIES) + 1:
        decode_record(rest)
    else:
        points = [Share(1 + rest[i], rest[i + 1 : i + 33]) for i in range(0, len(rest) - 32, 33)]
        if points and all(is_field_element(p.y) for p in points) and len({p.x for p in points}) == len(points):
            assert len(combine(points)) == 32


def _share_seeds() -> list[bytes]:
    vectors = sorted((ROOT / "tests" / "vectors").glob("*.json"))
    bodies = [bytes.fromhex(text) for path in vectors for text in _hexes(json.loads(path.read_text()))]
    seeds = []
    for number, kind in enumerate(BODIES):
        for body in bodies:
            try:
                wire.decode(kind, body)
            except RemoteProtocolError:
                continue
            seeds.append(bytes([number]) + body)
            break
    least, _ = SCHEME.blob_bytes(CLIENT)
    blob = struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 0, 2, 0, least)
    frame_of = pack_frame(SCHEME, CLIENT, 5, bytes(16), [blob.ljust(least, b"\0")] * SCHEME.count(5))
    return [
        *seeds,
        bytes([len(BODIES)]) + frame_of[:600],
        bytes([len(BODIES) + 2]) + bytes(66),
        bytes([len(BODIES) + 1]),
    ]


def _hexes(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _hexes(item)]
    if isinstance(value, list):
        return [text for item in value for text in _hexes(item)]
    good = (
        isinstance(value, str) and len(value) > 40 and len(value) % 2 == 0 and not set(value) - set("0123456789abcdef")
    )
    return [value] if good and isinstance(value, str) else []


# ---- audit logs ------------------------------------------------------------------------------------------------------

_PREVIOUS = bytes(range(32))


def journal(data: bytes) -> None:
    """Lines of an audit log, one after another, after a first byte that says where the log begins."""
    previous, index = (None, 0) if data[:1] == b"\0" else (_PREVIOUS, 3)
    for line in data[1:].splitlines(keepends=True):
        row = parse_row(line, previous=previous, index=index)
        if previous is not None:
            assert encode_row(previous, index, row.at, row.event)[0] == line
        previous, index = row.hash, index + 1


def _journal_seeds() -> list[bytes]:
    from securesplit.journal.events import Began
    from securesplit.journal.row import genesis

    log, certificate_of = bytes(16), "QUJD"
    began = Began(log=log.hex(), party="spiffe://securesplit.local/securesplit/server/gpu", certificate=certificate_of)
    first, digest = encode_row(genesis(log), 0, 0, began)
    second, _ = encode_row(digest, 1, 10**15, Loaded(what="policy", digest="a" * 64))
    alone, _ = encode_row(_PREVIOUS, 3, 10**18, Refused(stage="tls", code="SS-3205", address="10.0.0.7:1"))
    return [b"\0" + first + second, b"\1" + alone]


def _anybody(_head: Head) -> None:
    """Admits."""


def request(data: bytes) -> None:
    """A request to the endpoint on a client's loopback, in two pieces and whole: the same either way."""
    found: list[Request | str | None] = []
    for cut in (len(data) // 2, len(data)):
        wire = Wire(_anybody, most_body=2048)
        try:
            first = wire.receive(data[:cut]) if cut else None
            found.append(first or (wire.receive(data[cut:]) if cut < len(data) else None))
        except InputError as error:
            found.append(error.code)
    one, other = found
    if isinstance(one, Request):
        assert one == other
        assert len(one.body) <= 2048
        assert one.head.method
    if isinstance(other, str):
        raise InputError(other, "as declared")


def _request_seeds() -> list[bytes]:
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:80\r\nAuthorization: Bearer t\r\n"
    return [
        b"GET /v1/models HTTP/1.1\r\nHost: localhost:80\r\n\r\n",
        head + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        head + b"Transfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n0\r\n\r\n",
    ]


TARGETS: dict[str, Target] = {
    "frame": Target(frame, (RemoteProtocolError,), lambda: [encode(message) for message in samples()]),
    "session": Target(session, (RemoteProtocolError,), _session_seeds),
    "policy": Target(policy, (InputError, RemoteProtocolError), _policy_seeds, 6000),
    "certificate": Target(certificate, (ConnectionFailed, InputError), _certificate_seeds, 3000),
    "share": Target(share, (RemoteProtocolError, AggregationAborted, InputError), _share_seeds),
    "tensor": Target(
        tensor, (), lambda: [bytes([d, 1]) + struct.pack("<3H", 2, 3, 0) + _rows(2, n).data for d, n in enumerate(("f32", "bf16", "int8"))]
    ),
    "journal": Target(journal, (RowError,), _journal_seeds),
    "request": Target(request, (InputError,), _request_seeds),
}  # fmt: skip
