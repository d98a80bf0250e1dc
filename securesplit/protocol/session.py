"""The protocol without a network: bytes in, messages out.

    session.send(message)          queue a message; LocalProtocolError when it is not ours to send now
    session.data_to_send()         take the queued bytes, one item per websocket message
    session.receive(data)          one websocket message in, the parsed message out; RemoteProtocolError when it breaks
                                   the rules, and then only a Failure code is queued and the session is closed

No clock, no socket, no randomness, no torch: nonces, certificates and the signing key are passed in. The same object
runs under TLS, in memory, and under the fuzzer.

The handshake binds the session to both leaf certificates, both nonces, the policy, the job and the model, by a signature
of each certificate's key, so that a TLS-terminating middle box is noticed. It proves nothing about what the server
computes: a malicious server keeps the protocol and still lies in its tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from securesplit.errors import LocalProtocolError, RemoteProtocolError
from securesplit.policy.schema import Policy
from securesplit.protocol.codec import Caps, decode, encode
from securesplit.protocol.job import Job, parse_job
from securesplit.protocol.messages import (
    MESSAGES,
    VERSION,
    Backward,
    Confirm,
    Declined,
    Failure,
    Forward,
    Gradient,
    Hello,
    Hidden,
    Message,
    Seal,
    Secagg,
    Welcome,
)
from securesplit.protocol.offer import parse_offer
from securesplit.protocol.seals import Seals
from securesplit.protocol.states import TRANSITIONS, Role, State

_SMALL = 1 << 17
"""Bytes that any message may have; a Welcome with its job fits, and so does all that has no tensor."""
_LARGE = frozenset({Forward, Hidden, Backward, Gradient, Secagg})


@dataclass(frozen=True, slots=True)
class Party:
    """What a side needs to prove who it is and to check the other.

    Attributes:
        certificate: own leaf, DER.
        peer: the other side's leaf, DER, as TLS delivered it.
        sign: signs bytes with the own leaf's key.
        verify: ``verify(certificate, signature, data)``; raises when the signature is not good.
    """

    certificate: bytes
    peer: bytes
    sign: Callable[[bytes], bytes]
    verify: Callable[[bytes, bytes, bytes], None]


def statement(role: Role, hello: Hello, welcome: Welcome, *, client: bytes, server: bytes, agreed: str = "") -> bytes:
    """The 32 bytes that ``role`` signs. Every field is length-prefixed, so no two handshakes share a statement.

    Args:
        role: who signs.
        hello, welcome: what was said; the signature in ``welcome`` is left out.
        client, server: both leaf certificates, DER.
        agreed: digest of the policy that the client enforces; empty in what a server signs, which does not know it yet.
    """
    digest = hashlib.sha256()
    for part in (
        b"securesplit.v1 handshake", role.encode(), server, client, hello.version.to_bytes(2, "little"), hello.nonce,
        welcome.nonce, welcome.session, hello.policy.encode(), welcome.model.encode(), welcome.job.encode(),
        welcome.policy.encode(), agreed.encode(),
    ):  # fmt: skip
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


class Session:
    """One end of one connection.

    Args:
        role: ``client`` or ``server``.
        party: certificates and keys.
        caps: what this side accepts; ``width`` is usually set later with :meth:`narrow`. Rows are of the job's codec and no
            other type, as soon as there is a job.

    Attributes:
        offered: the server's policy, at the client, once it has said so.
        agreed: digest of the policy that the client enforces, as soon as it has confirmed; both ends know the same one.
    """

    def __init__(self, role: Role, party: Party, caps: Caps) -> None:
        self.role: Role = role
        self.state = State.NEW
        self.job: Job | None = None
        self.offered: Policy | None = None
        self.agreed = ""
        self.hello: Hello | None = None
        self.welcome: Welcome | None = None
        self._party = party
        self._caps = caps
        self._out: list[bytes] = []
        self._steps = _Steps()
        self._seals = Seals(role)

    def narrow(self, width: int, code_width: int | None = None) -> None:
        """From now on accept only hidden states of this many columns; see :class:`Caps` for ``code_width``."""
        self._caps = replace(self._caps, width=width, code_width=code_width)

    def allowance(self, start: bytes) -> int:
        """The most bytes that the peer's next message may have, seen from its first ones; before it is kept in memory.

        A message that the table does not allow now is refused when it is parsed; until then it may take no room.
        """
        kind = MESSAGES.get(start[3]) if len(start) > 3 else None
        peer: Role = "server" if self.role == "client" else "client"
        if kind is None or kind not in TRANSITIONS[self.state][peer]:
            return min(_SMALL, self._caps.message_bytes)
        return self._caps.message_bytes if kind in _LARGE else min(_SMALL, self._caps.message_bytes)

    def data_to_send(self) -> list[bytes]:
        """Take what is queued."""
        out, self._out = self._out, []
        return out

    def send(self, message: Message) -> None:
        """Queue a message.

        Raises:
            LocalProtocolError: SS-4101 when the table does not allow it now.
        """
        following = TRANSITIONS[self.state][self.role].get(type(message))
        if following is None:
            raise LocalProtocolError(
                "SS-4101", f"a {self.role} may not send {type(message).__name__} in state {self.state.value}"
            )
        self._note(message)
        data = encode(message)
        self._seals.sent(data)
        self._out.append(data)
        self.state = following

    def seal(self, *, log: bytes, rows: int, head: bytes, signature: bytes) -> Seal:
        """Client: ask for a checkpoint. Server: answer the last one. The arguments are those of :class:`Seal`.

        Raises:
            LocalProtocolError: SS-4101 when it is not ours to send now.
        """
        message = self._seals.make(log=log, rows=rows, head=head, signature=signature)
        self.send(message)
        return message

    def hail(self, *, nonce: bytes, policy: str) -> None:
        """Client: open the handshake."""
        self.send(Hello(version=VERSION, nonce=nonce, policy=policy))

    def offer(
        self, *, session: bytes, nonce: bytes, job: Job, model: str, anchor: bytes = b"", policy: Policy | None = None
    ) -> None:
        """Server: answer a Hello with the job and, if it has one, its policy, signed."""
        assert self.hello is not None
        unsigned = Welcome(
            session=session, nonce=nonce, job=job.canonical(), model=model, signature=bytes(8), anchor=anchor,
            policy="" if policy is None else policy.canonical().decode(),
        )  # fmt: skip
        signed = self._party.sign(
            statement("server", self.hello, unsigned, client=self._party.peer, server=self._party.certificate)
        )
        self.send(unsigned.model_copy(update={"signature": signed}))
        self._caps = replace(self._caps, dtypes=frozenset({job.codec}))

    def confirm(self, agreed: str = "") -> None:
        """Client: admit the job, under the policy of this digest; its own when none is named. Not said without an offer."""
        assert self.hello is not None
        assert self.welcome is not None
        agreed = (agreed or self.hello.policy) if self.welcome.policy else ""
        own = statement(
            "client", self.hello, self.welcome, client=self._party.certificate, server=self._party.peer, agreed=agreed
        )
        self.send(Confirm(signature=self._party.sign(own), policy=agreed))

    def fail(self, code: str) -> None:
        """Queue a code for the peer and close. Safe in every state."""
        if self.state is not State.CLOSED:
            self._out.append(encode(Failure(code=code)))
            self.state = State.CLOSED

    def receive(self, data: bytes) -> Message:
        """Take one whole message from the peer.

        Raises:
            RemoteProtocolError: SS-40xx; a Failure with that code is queued and the session is closed.
        """
        try:
            message = decode(data, self._caps)
            peer: Role = "server" if self.role == "client" else "client"
            following = TRANSITIONS[self.state][peer].get(type(message))
            if following is None:
                raise RemoteProtocolError(
                    "SS-4010", f"a {peer} may not send {type(message).__name__} in state {self.state.value}"
                )
            self._check(message)
        except RemoteProtocolError as error:
            self.fail(error.code)
            raise
        self._note(message)
        self._seals.heard(data)
        self.state = following
        return message

    def _check(self, message: Message) -> None:
        party = self._party
        match message:
            case Hello() if message.version != VERSION:
                raise RemoteProtocolError(
                    "SS-4003", f"the peer speaks version {message.version}", hint="Run the same release on both ends."
                )
            case Welcome():
                assert self.hello is not None
                self._verify(
                    message.signature,
                    statement("server", self.hello, message, client=party.certificate, server=party.peer),
                )
                self.job, self.offered = parse_job(message.job), parse_offer(message.policy)
                self._caps = replace(self._caps, dtypes=frozenset({self.job.codec}))
            case Confirm():
                assert self.hello is not None
                assert self.welcome is not None
                own = statement(
                    "client",
                    self.hello,
                    self.welcome,
                    client=party.peer,
                    server=party.certificate,
                    agreed=message.policy,
                )
                self._verify(message.signature, own)
                if bool(message.policy) != bool(self.welcome.policy):
                    raise RemoteProtocolError("SS-4030", "the client does not say which policy it enforces")
            case Forward() | Backward() | Hidden() | Declined() | Gradient():
                self._steps.check(message)
            case Seal():
                self._seals.check(message)
            case _:
                pass

    def _verify(self, signature: bytes, data: bytes) -> None:
        try:
            self._party.verify(self._party.peer, signature, data)
        except Exception:  # noqa: BLE001 (whatever a verifier raises means no)
            raise RemoteProtocolError(
                "SS-4012",
                "the handshake signature does not match both certificates",
                hint="Something between the two ends terminates TLS.",
            ) from None

    def _note(self, message: Message) -> None:
        match message:
            case Hello():
                self.hello = message
            case Welcome():
                self.welcome = message
            case Confirm():
                assert self.hello is not None
                self.agreed = message.policy or self.hello.policy
            case Forward() | Backward() | Hidden() | Gradient():
                self._steps.note(message)
            case Seal():
                self._seals.note(message)
            case _:
                pass


class _Steps:
    """Step numbers: rising from the client, answered once each, repeated only as the very last one."""

    def __init__(self) -> None:
        self._last = -1
        self._rows = 0
        self._learns = False
        self._asked = False  # Whether the client has sent this step's Backward.

    def note(self, message: Message) -> None:
        if isinstance(message, Forward):
            self._asked = self._asked and message.step == self._last
            self._last, self._rows, self._learns = message.step, message.hidden.shape[0], message.learn
        elif isinstance(message, Backward):
            self._asked = True

    def check(self, message: Message) -> None:
        match message:
            case Forward(step=step):
                good = step >= self._last
            case Hidden(step=step, hidden=blob):
                good = step == self._last and blob.shape[0] == self._rows
            case Declined(step=step):
                good = step == self._last
            case Backward(step=step, gradient=blob):
                good = step == self._last and self._learns and blob.shape[0] == self._rows
            case Gradient(step=step, gradient=blob):
                good = step == self._last and self._asked and blob.shape[0] == self._rows
            case _:
                good = True
        if not good:
            raise RemoteProtocolError("SS-4013", f"{type(message).__name__} does not belong to the current step")
