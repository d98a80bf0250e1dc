"""Two ends of the protocol in memory, with real keys and self-signed certificates, and one sample of every message."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from securesplit.errors import RemoteProtocolError
from securesplit.protocol.codec import Caps, encode
from securesplit.protocol.job import load_job
from securesplit.protocol.messages import (
    Backward,
    Blob,
    Bye,
    Confirm,
    Declined,
    DropCache,
    Failure,
    Forward,
    Gradient,
    Handover,
    Hello,
    Hidden,
    Join,
    KeepAnchor,
    Mark,
    RoundBegin,
    RoundKept,
    RoundReady,
    RoundStatus,
    Run,
    Seal,
    Secagg,
    Welcome,
)
from securesplit.protocol.session import Party, Session
from securesplit.protocol.states import State

ROOT = Path(__file__).parents[2]
JOB = load_job(ROOT / "examples" / "job.toml")
CAPS = Caps(message_bytes=1 << 20)
POLICY, MODEL = "a" * 64, "b" * 64


@dataclass
class Holder:
    """A key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: bytes

    @classmethod
    def make(cls, name: str) -> Holder:
        key = ec.generate_private_key(ec.SECP256R1())
        subject_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = (
            x509.CertificateBuilder()
            .subject_name(subject_name)
            .issuer_name(subject_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
            .not_valid_after(datetime(2050, 1, 1, tzinfo=UTC))
            .sign(key, hashes.SHA256())
        )
        return cls(key, made.public_bytes(serialization.Encoding.DER))

    def sign(self, data: bytes) -> bytes:
        return self.key.sign(data, ec.ECDSA(hashes.SHA256()))


def verify(certificate: bytes, signature: bytes, data: bytes) -> None:
    x509.load_der_x509_certificate(certificate).public_key().verify(signature, data, ec.ECDSA(hashes.SHA256()))


ALICE, GPU, MALLORY = Holder.make("alice"), Holder.make("gpu"), Holder.make("mallory")


def pair(
    client: Holder = ALICE,
    server: Holder = GPU,
    *,
    client_sees: Holder | None = None,
    server_sees: Holder | None = None,
):
    """Two ends; by default each sees the other's own certificate, as TLS without a middle box shows it."""
    seen_server, seen_client = (client_sees or server).certificate, (server_sees or client).certificate
    return (
        Session("client", Party(client.certificate, seen_server, client.sign, verify), CAPS),
        Session("server", Party(server.certificate, seen_client, server.sign, verify), CAPS),
    )


def carry(source: Session, target: Session) -> list:
    return [target.receive(data) for data in source.data_to_send()]


def hail(client: Session, server: Session, policy: str = POLICY) -> None:
    client.hail(nonce=os.urandom(32), policy=policy)
    carry(client, server)


def offer(server: Session) -> None:
    server.offer(session=os.urandom(16), nonce=os.urandom(32), job=JOB, model=MODEL)


def opened(**ends) -> tuple[Session, Session]:
    client, server = pair(**ends)
    hail(client, server)
    offer(server)
    carry(server, client)
    client.confirm()
    carry(client, server)
    return client, server


def refused(session: Session, data: bytes) -> str:
    """The code with which it refuses; checks that it told the peer so and closed."""
    session.data_to_send()
    with pytest.raises(RemoteProtocolError) as caught:
        session.receive(data)
    assert session.state is State.CLOSED
    assert session.data_to_send() == [encode(Failure(code=caught.value.code))]
    return caught.value.code


def blob(rows: int = 2, width: int = 3) -> Blob:
    return Blob(dtype="f32", shape=(rows, width), data=bytes(4 * rows * width))


def forward(step: int = 0, rows: int = 2, *, learn: bool = True) -> Forward:
    return Forward(step=step, lengths=(rows,), learn=learn, hidden=blob(rows))


SAMPLES = {
    Hello: Hello(version=1, nonce=bytes(32), policy=POLICY),
    Welcome: Welcome(session=bytes(16), nonce=bytes(32), job=JOB.canonical(), model=MODEL, signature=bytes(8)),
    Confirm: Confirm(signature=bytes(8)),
    Forward: forward(5),
    Hidden: Hidden(step=5, hidden=blob()),
    Backward: Backward(step=5, gradient=blob()),
    Gradient: Gradient(step=5, gradient=blob()),
    DropCache: DropCache(cache=1),
    Declined: Declined(step=5, code="SS-4040"),
    KeepAnchor: KeepAnchor(blob=b"sealed"),
    Mark: Mark(what="use", name=bytes(32)),
    Seal: Seal(number=0, stream=hashlib.sha256().digest(), log=bytes(16), rows=0, head=bytes(32), signature=bytes(8)),
    RoundReady: RoundReady(round=0, dim=4, frozen="c" * 64),
    Run: Run(run=bytes(16)),
    Join: Join(round=0, name="alice", certificate=b"der", key=bytes(32), signature=bytes(8)),
    Handover: Handover(to="alice", of="bob", asked=bytes(32), key=bytes(32), box=Blob(dtype="u8", shape=(1,), data=b"x")),
    RoundBegin: RoundBegin(round=0, run=bytes(16)),
    RoundKept: RoundKept(round=0, run=bytes(16), clients=("alice", "bob", "carol")),
    RoundStatus: RoundStatus(round=0, closed=False, missing=("carol",)),
    Secagg: Secagg(round=0, stage=0, body=b"", vector=Blob(dtype="u32", shape=(0,), data=b"")),
    Failure: Failure(code="SS-4001"),
    Bye: Bye(),
}  # fmt: skip


def in_state(state: State, role: str) -> Session:
    """A session placed in a state, with a learning step 5 of two rows under way; every signature is good to it."""
    own, peer = (ALICE, GPU) if role == "client" else (GPU, ALICE)
    session = Session(role, Party(own.certificate, peer.certificate, own.sign, lambda *_: None), CAPS)
    session.hello, session.welcome = SAMPLES[Hello], SAMPLES[Welcome]
    session._steps.note(SAMPLES[Forward])
    session._steps.note(SAMPLES[Backward])
    if role == "client":
        session._seals.note(SAMPLES[Seal])  # It has asked for a checkpoint.
    session.state = state
    return session
