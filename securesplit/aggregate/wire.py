"""The stage bodies of SSA-1: strict msgpack maps, one canonical encoding each.

| stage | client to server | server to client |
|-------|------------------|------------------|
| 0     | Advertise        | Roster           |
| 1     | Shares           | Routed           |
| 2     | Masked + vector  | Survivors        |
| 3     | Consistent       | Bundle           |
| 4     | Unmask           | Result + vector  |
| 15    | Abort            | Abort            |

A body that does not re-encode to the very bytes that came is refused, so that a signature or a hash over a body has one
meaning. Nothing here checks signatures or sets; client.py and server.py do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, NamedTuple, TypeVar

import msgpack
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from securesplit.aggregate.config import MAX_CLIENTS, RoundConfig
from securesplit.aggregate.fixedpoint import Words
from securesplit.errors import RemoteProtocolError

__all__ = [
    "ABORT", "ADVERTISE", "CONSISTENT", "MASKED", "MAX_BODY", "SHARED_BOX", "SHARES", "STAGES", "UNMASK", "Abort", "Advertise", "Body",
    "Bundle", "Consistent", "Delivery", "Masked", "Outgoing", "Result", "Roster", "Routed", "Shares", "Survivors",
    "Unmask", "Vector", "decode", "encode", "read", "unsigned",
]  # fmt: skip

ADVERTISE, SHARES, MASKED, CONSISTENT, UNMASK, ABORT = 0, 1, 2, 3, 4, 15
STAGES = ("advertise", "shares", "masked", "consistent", "unmask")
MAX_BODY = 1 << 22
SHARED_BOX = 16 + 64  # A sealed box with two shares in it; one without has at most a part of the blind key.

Name = Annotated[str, Field(min_length=1, max_length=128)]
Key = Annotated[bytes, Field(min_length=32, max_length=32)]
Signature = Annotated[bytes, Field(min_length=8, max_length=1024)]
Names = Annotated[tuple[Name, ...], Field(max_length=MAX_CLIENTS)]
Keyed = Annotated[tuple[tuple[Name, Key], ...], Field(max_length=MAX_CLIENTS)]
Sealed = Annotated[
    tuple[tuple[Name, Annotated[bytes, Field(min_length=48, max_length=112)]], ...], Field(max_length=MAX_CLIENTS)
]


class Body(BaseModel):
    """Base of all bodies: which round, of which session, under which configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    session: Annotated[bytes, Field(min_length=16, max_length=16)]
    round: Annotated[int, Field(ge=0, lt=1 << 53)]
    cfg: Key

    def __repr_args__(self) -> Iterable[tuple[str | None, object]]:
        """Shares and keys never reach a log by way of a repr."""
        yield "round", self.round


class Advertise(Body):
    """Stage 0, C->S: fresh public keys, commitments, and the certificate whose key signs everything that follows.

    Attributes:
        commit_self: ``H("ssa-1/cb|", b)``; checked when the sum is opened.
        commit_group: ``H("ssa-1/cg|", g)`` in blind rounds, else empty; peers check it when g arrives.
    """

    name: Name
    certificate: Annotated[bytes, Field(min_length=1, max_length=8192)]
    mask_key: Key
    share_key: Key
    commit_self: Key
    commit_group: Annotated[bytes, Field(max_length=32)]
    signature: Signature


class Roster(Body):
    """Stage 0, S->C: the adverts of U1, as they came, by name."""

    adverts: Annotated[tuple[Annotated[bytes, Field(max_length=16384)], ...], Field(max_length=MAX_CLIENTS)]


class Shares(Body):
    """Stage 1, C->S: by receiver, one sealed box for each that holds shares, and in blind rounds for all others too."""

    sealed: Sealed
    signature: Signature


class Routed(Body):
    """Stage 1, S->C: U2, and the boxes for this client, by sender."""

    members: Names
    sealed: Sealed


class Masked(Body):
    """Stage 2, C->S: what is said of the masked vector that travels beside the body.

    Attributes:
        vector_digest: SHA-256 of the vector, or of its encryption.
        public: the public part of the round's key, in rounds with homomorphic encryption; else empty.
    """

    vector_digest: Key
    signature: Signature
    public: Annotated[bytes, Field(max_length=64)] = b""


class Survivors(Body):
    """Stage 2, S->C: U3, U2 without U3, and in the sparse graph proof of what the survivors masked under.

    Attributes:
        masked: what each survivor whose shares the receiver holds has said in stage 2, by name: its body as it came. Without it a server could let a client mask under another U2, with nobody who holds its
            shares in it, and have its shares opened under this one.
    """

    survivors: Names
    dropped: Names
    masked: Annotated[
        tuple[tuple[Name, Annotated[bytes, Field(max_length=2048)]], ...], Field(max_length=MAX_CLIENTS)
    ] = ()


class Consistent(Body):
    """Stage 3, C->S: the client's signature over U3, all that led to it and, in blind rounds, what all hold alike."""

    signature: Signature


class Bundle(Body):
    """Stage 3, S->C: the signatures of those who sent one, by name."""

    signatures: Annotated[tuple[tuple[Name, Signature], ...], Field(max_length=MAX_CLIENTS)]


class Unmask(Body):
    """Stage 4, C->S: shares of b of the survivors and of s of the dropped; never both of one client.

    Not encrypted for the server, which is the one that combines them; TLS keeps them from others.
    """

    self_shares: Keyed
    seed_shares: Keyed
    signature: Signature


class Result(Body):
    """Stage 4, S->C: the survivors; the sum travels beside it, blinded in blind rounds."""

    survivors: Names


class Abort(Body):
    """Stage 15, both ways: the round is over for the receiver or the sender. A code, never a text."""

    code: Annotated[str, Field(pattern=r"^SS-60[0-9]{2}$")]


Vector = Words | npt.NDArray[np.uint8]
"""Words of the ring, or a frame of encrypted ones."""


class Outgoing(NamedTuple):
    """What a client sends next: stage, body, and a vector where the stage has one."""

    stage: int
    body: bytes
    vector: Vector | None


class Delivery(NamedTuple):
    """What the server sends next, and to whom."""

    to: str
    stage: int
    body: bytes
    vector: Vector | None


B = TypeVar("B", bound=Body)


def encode(body: Body) -> bytes:
    """The one encoding of a body: its fields in the order of the class, as a msgpack map."""
    return _pack(body, type(body).model_fields)


def unsigned(body: Body) -> bytes:
    """The encoding without the field ``signature``: what a signature is over."""
    return _pack(body, [name for name in type(body).model_fields if name != "signature"])


def _pack(body: Body, names: Iterable[str]) -> bytes:
    packed: bytes = msgpack.packb({name: getattr(body, name) for name in names}, use_bin_type=True)
    return packed


def decode(kind: type[B], data: bytes) -> B:
    """Parse a body.

    Raises:
        RemoteProtocolError: SS-6014 when it is too large, not msgpack, breaks the rules of its fields, or is not in
            the one encoding. Nothing else escapes.
    """
    hint = "The other side speaks another release or is broken."
    if len(data) > MAX_BODY:
        raise RemoteProtocolError(
            "SS-6014", f"an aggregation body of {len(data)} bytes is over the cap of {MAX_BODY}", hint=hint
        )
    try:
        raw = msgpack.unpackb(
            data, raw=False, use_list=False, strict_map_key=True,
            max_str_len=512, max_bin_len=16384, max_array_len=MAX_CLIENTS, max_map_len=16, max_ext_len=0,
        )  # fmt: skip
        body = kind.model_validate(raw)
        canonical = encode(body) == data
    except (ValueError, msgpack.UnpackException, ValidationError, RecursionError):
        raise RemoteProtocolError(
            "SS-6014", f"an aggregation body is no well-formed {kind.__name__}", hint=hint
        ) from None
    if not canonical:
        raise RemoteProtocolError("SS-6014", f"a {kind.__name__} body is not in its one encoding", hint=hint)
    return body


def read(kind: type[B], data: bytes, config: RoundConfig) -> B:
    """Parse a body and check that it belongs to this round under this configuration.

    Raises:
        RemoteProtocolError: SS-6014 as :func:`decode`; SS-6006 another session or round; SS-6004 the same round under
            another configuration, model or frozen factor.
    """
    body = decode(kind, data)
    if (body.session, body.round) != (config.session_id, config.round):
        raise RemoteProtocolError(
            "SS-6006",
            f"a {kind.__name__} body belongs to another session or round",
            hint="Replayed or late; start a new round.",
        )
    if body.cfg != config.digest:
        raise RemoteProtocolError(
            "SS-6004", "the other side has another configuration, model or frozen factor",
            hint="Compare job, roster and model manifest on both ends.",
        )  # fmt: skip
    return body
