"""The closed set of messages of ``securesplit.v1``. A message that breaks its own rules cannot be built.

Nothing here names a class of the host language, carries text, or decides what may leave a client: that is the gate's
work (securesplit/privacy/gate.py). docs/protocol.md is the specification; the numbers below are part of it.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from securesplit.protocol import int8

__all__ = [
    "MESSAGES",
    "Backward",
    "Blob",
    "Bye",
    "Confirm",
    "Declined",
    "DropCache",
    "Failure",
    "Forward",
    "Gradient",
    "Handover",
    "Hello",
    "Hidden",
    "Join",
    "KeepAnchor",
    "Mark",
    "Message",
    "RoundBegin",
    "RoundKept",
    "RoundReady",
    "RoundStatus",
    "Run",
    "Seal",
    "Secagg",
    "Welcome",
]

VERSION = 1
ITEM_BYTES = {"f32": 4, "bf16": 2, "u8": 1, "u32": 4, "u64": 8}
"""Types whose tensors are items and nothing else; ``int8`` has scales besides. :func:`size_of` counts both."""
ROW_TYPES = ("f32", "bf16", "int8")
_RINGS = ("u8", "u32", "u64")

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)

Step = Annotated[int, Field(ge=0, lt=1 << 53)]
Round = Annotated[int, Field(ge=0, lt=1 << 31)]
CacheId = Annotated[int, Field(ge=0, lt=1 << 31)]
Nonce = Annotated[bytes, Field(min_length=32, max_length=32)]
SessionId = Annotated[bytes, Field(min_length=16, max_length=16)]
Signature = Annotated[bytes, Field(min_length=8, max_length=1024)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Code = Annotated[str, Field(pattern=r"^SS-[0-9]{4}$")]
Name = Annotated[str, Field(min_length=1, max_length=128)]
Sealed = Annotated[bytes, Field(max_length=256, repr=False)]


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return int8.size(shape) if dtype == "int8" else math.prod(shape) * ITEM_BYTES[dtype]


class Blob(BaseModel):
    """A tensor as bytes: little-endian, C order.

    Attributes:
        dtype: ``f32``, ``bf16`` or ``int8`` for rows; ``u32`` or ``u64`` for words of a ring, ``u8`` for encrypted ones.
        shape: each at least 0, at most 2^31 - 1; one to three of them.
        data: exactly :func:`size_of` bytes; under ``int8`` as securesplit/protocol/int8.py says.
    """

    model_config = _STRICT
    dtype: Literal["f32", "bf16", "int8", "u8", "u32", "u64"]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], Field(min_length=1, max_length=3)]
    data: Annotated[bytes, Field(repr=False)]

    @model_validator(mode="after")
    def _exact(self) -> Blob:
        if size_of(self.dtype, self.shape) != len(self.data):
            msg = "the number of bytes does not match the shape"
            raise ValueError(msg)
        if self.dtype == "int8":
            int8.check(self.data, self.shape)
        return self


def _rows(blob: Blob) -> Blob:
    if len(blob.shape) != 2 or blob.dtype in _RINGS:
        msg = "not a two-dimensional float tensor"
        raise ValueError(msg)
    return blob


def _ring(blob: Blob) -> Blob:
    if len(blob.shape) != 1 or blob.dtype not in _RINGS:
        msg = "not a vector of words"
        raise ValueError(msg)
    return blob


def _sealed(blob: Blob) -> Blob:
    if len(blob.shape) != 1 or blob.dtype != "u8":
        msg = "not a string of bytes"
        raise ValueError(msg)
    return blob


def _one_spelling(value: object) -> object:
    """A double that is not minus zero: an integer, and minus zero, would be other bytes for an equal value."""
    if type(value) is not float or math.copysign(1, value) < 0:
        msg = "not a double, or one below zero"
        raise ValueError(msg)
    return value


Rows = Annotated[Blob, AfterValidator(_rows)]


class Message(BaseModel):
    """Base of all messages. ``KIND`` is the number on the wire."""

    model_config = _STRICT
    KIND: ClassVar[int]


class Hello(Message):
    """C->S, first: what the client speaks and under which policy. Unsigned; :class:`Confirm` signs it all."""

    KIND = 1
    version: Annotated[int, Field(ge=0, lt=1 << 16)]
    nonce: Nonce
    policy: Digest


class Welcome(Message):
    """S->C: the job, the digest of the model's manifest, and a signature over both leaf certificates and all of it.

    Attributes:
        anchor: what this client last asked to keep, or empty; sealed by the client itself, so the signature leaves it out.
        policy: what the server offers, in its canonical form (securesplit/protocol/offer.py); empty when it offers none.
    """

    KIND = 2
    session: SessionId
    nonce: Nonce
    job: Annotated[str, Field(max_length=1 << 16)]
    model: Digest
    signature: Signature
    anchor: Sealed = b""
    policy: Annotated[str, Field(max_length=1 << 15)] = ""


class Confirm(Message):
    """C->S: the client admits the job and signs the same statement. From here on the session is open.

    Attributes:
        policy: digest of what the client enforces in this session, at least as strict as its own and as the offer; signed.
            Empty when the server offered none: then it is that of Hello.
    """

    KIND = 3
    signature: Signature
    policy: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


class Forward(Message):
    """C->S, O1: released rows of a batch.

    Attributes:
        step: the client's step number; a repeated number carries the same bytes and gets the same answer.
        lengths: bucketed number of rows of each sequence; their sum is the number of rows of ``hidden``.
        cache: 0, or the number of a decoding cache that these rows extend.
        learn: whether a :class:`Backward` for this step will follow.
        gain: public factor that B multiplies the rows by before its first layer, so that noised rows have the norm that
            its layers were made for. It follows from the policy and the shape alone, never from the data.
        hidden: (sum(lengths), D).
    """

    KIND = 4
    step: Step
    lengths: Annotated[tuple[Annotated[int, Field(ge=1, lt=1 << 20)], ...], Field(min_length=1, max_length=4096)]
    cache: CacheId = 0
    learn: bool
    gain: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    hidden: Rows

    @model_validator(mode="after")
    def _rows(self) -> Forward:
        if self.hidden.shape[0] != sum(self.lengths):
            msg = "hidden has not one row per position"
            raise ValueError(msg)
        if self.cache and self.learn:
            msg = "a cached step cannot learn"
            raise ValueError(msg)
        return self


class Hidden(Message):
    """S->C, O2: the middle's output for the rows of the same step, (sum(lengths), D)."""

    KIND = 5
    step: Step
    hidden: Rows


class Backward(Message):
    """C->S, O3: released gradient at the middle's output, (sum(lengths), D)."""

    KIND = 6
    step: Step
    gradient: Rows


class Gradient(Message):
    """S->C, O4: gradient at the middle's input, (sum(lengths), D)."""

    KIND = 7
    step: Step
    gradient: Rows


class DropCache(Message):
    """C->S: forget a decoding cache."""

    KIND = 8
    cache: Annotated[int, Field(ge=1, lt=1 << 31)]


class Declined(Message):
    """S->C, instead of :class:`Hidden`: the server has no room for this decoding step now. Nothing was computed; the session
    goes on, and the same step may be sent again.

    Attributes:
        step: the step that was not computed.
        code: why; SS-4017 for a cache that was dropped, and has to be built anew, SS-4040 and SS-4041 for want of room.
    """

    KIND = 16
    step: Step
    code: Literal["SS-4017", "SS-4040", "SS-4041"]


class RoundReady(Message):
    """C->S: local work of this round is done; the secure sum may begin.

    Attributes:
        round: its number.
        dim: number of coordinates of the update.
        frozen: digest of what must be equal at all clients: names, shapes and order, and the frozen factors.
        step: the ring's step in model units where the clients' policy shares the noise of the sum, so that every client's
            noise is made of the ring's own steps; 0 where the job's clip decides.
    """

    KIND = 9
    round: Round
    dim: Annotated[int, Field(ge=1, lt=1 << 28)]
    frozen: Digest
    step: Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_one_spelling)] = 0.0


class KeepAnchor(Message):
    """C->S: keep this for the client and show it in the next Welcome; its ledger's head, sealed, opaque to the server."""

    KIND = 14
    blob: Annotated[bytes, Field(min_length=1, max_length=256, repr=False)]


class Run(Message):
    """C->S: the learning steps that follow on this connection are of this run. It has no answer.

    A run outlives its connections. Its step numbers rise from the first connection to the last; the last learning step may be
    sent again on any of them, byte for byte, and gets the answer that it got. A client learns in one run at a time.

    Attributes:
        run: drawn by the client when it began.
    """

    KIND = 19
    run: SessionId


class Mark(Message):
    """Both ways: a state of B's adapters by its name. The client asks, the server answers in kind (docs/protocol.md, section 6).

    Attributes:
        what: ``now``: keep them as this client computes with them now; ``ended``: as they were for it when the last secure sum
            ended; ``use``: compute what is not learnt from, in this session, with those of this name.
        slot: where they are kept, one state in each of a client's slots; 0 in ``use``.
        name: SHA-256 of the adapters (:mod:`securesplit.server.former`); empty where it is asked for, and where there is none.
        code: why not, in an answer; the session goes on. SS-4095: that state is kept no more; SS-4097: it cannot be kept.
    """

    KIND = 22
    what: Literal["now", "ended", "use"]
    slot: Annotated[int, Field(ge=0, le=256)] = 0
    name: Annotated[bytes, Field(max_length=32)] = b""
    code: Literal["", "SS-4095", "SS-4097"] = ""

    @model_validator(mode="after")
    def _named(self) -> Mark:
        if len(self.name) not in (0, 32) or (self.what == "use" and (self.slot or not self.name)):
            msg = "a state is not named as its kind of mark demands"
            raise ValueError(msg)
        if self.code and self.name and self.what != "use":
            msg = "a state that is not kept has no name"
            raise ValueError(msg)
        return self


class RoundBegin(Message):
    """S->C: enough clients are ready; ``run`` names this sum and has never been used before."""

    KIND = 13
    round: Round
    run: SessionId


class RoundKept(Message):
    """C->S: the sum of this round is on this client's disk; it needs the others' help no more, and may be asked for its own.

    Attributes:
        round: its number.
        run: name of the run that the client has the sum of.
        clients: names of the clients in the sum, so that a server that was restarted learns who may lack it still.
    """

    KIND = 17
    round: Round
    run: SessionId
    clients: Annotated[tuple[Name, ...], Field(min_length=1, max_length=256)]


class RoundStatus(Message):
    """S->C: how a round stands that this client waits in: whether it is closed, and who is waited for.

    Attributes:
        round: its number.
        closed: whether nobody will need help with it any more.
        missing: names from the roster, for people to read; empty when nobody is missing.
    """

    KIND = 18
    round: Round
    closed: bool
    missing: Annotated[tuple[Name, ...], Field(max_length=256)] = ()


class Join(Message):
    """Both ways: a client that was away while rounds went on asks the others for what all of them hold in common. The server
    answers with :class:`RoundStatus` and shows the message to the others (docs/protocol.md, section 11).

    Attributes:
        round: the next round of the client that asks.
        name: whose message it is.
        certificate: its leaf, DER.
        key: X25519, drawn for this message.
        signature: of the certificate's key; see securesplit/aggregate/handover.py.
        whole: towards a client: whether the values are asked of it, or their digest alone.
    """

    KIND = 20
    round: Round
    name: Name
    certificate: Annotated[bytes, Field(min_length=1, max_length=4096)]
    key: Nonce
    signature: Signature
    whole: bool = False


class Handover(Message):
    """Both ways: one client's answer to another's :class:`Join`, sealed for that one alone. The server hands it on.

    Attributes:
        to, of: names of the two.
        asked: the key of the ``Join`` that it answers.
        key: X25519, drawn for this message.
        box: what is handed over, encrypted.
    """

    KIND = 21
    to: Name
    of: Name
    asked: Nonce
    key: Nonce
    box: Annotated[Blob, AfterValidator(_sealed)]


class Secagg(Message):
    """Both ways: one message of a secure-aggregation round (docs/protocol.md, SSA-1).

    Attributes:
        stage: 0 advertise/roster, 1 shares, 2 masked/survivors, 3 consistent, 4 unmask/result, 15 abort.
        body: the stage's own signed encoding (securesplit/aggregate/wire.py).
        vector: the masked vector or the sum, (d + 1,) words of the ring, or a frame of encrypted ones; an empty one where the stage has none.
    """

    KIND = 10
    round: Round
    stage: Annotated[int, Field(ge=0, le=15)]
    body: Annotated[bytes, Field(max_length=1 << 24, repr=False)]
    vector: Annotated[Blob, AfterValidator(_ring)]


class Seal(Message):
    """Both ways: a checkpoint. The client asks, the server answers with the same number; each shows the head of its audit log.

    Attributes:
        number: from 0, rising by one in a session.
        stream: chained SHA-256 of all messages that the sender sent before this one in this session; the receiver compares.
        log, rows, head: name of the sender's audit log, how many rows it has and the last one's hash; all zero without one.
        signature: of the sender's certificate key over the three (docs/audit-log.md).
    """

    KIND = 15
    number: Annotated[int, Field(ge=0, lt=1 << 31)]
    stream: Nonce
    log: SessionId
    rows: Annotated[int, Field(ge=0, lt=1 << 63)]
    head: Nonce
    signature: Signature


class Failure(Message):
    """Both ways: a code, never a text. The sender closes afterwards."""

    KIND = 11
    code: Code


class Bye(Message):
    """Both ways: an orderly end."""

    KIND = 12


MESSAGES: dict[int, type[Message]] = {
    m.KIND: m
    for m in (
        Hello,
        Welcome,
        Confirm,
        Forward,
        Hidden,
        Backward,
        Gradient,
        DropCache,
        RoundReady,
        Secagg,
        Failure,
        Bye,
        RoundBegin,
        KeepAnchor,
        Seal,
        Declined,
        RoundKept,
        RoundStatus,
        Run,
        Join,
        Handover,
        Mark,
    )
}
