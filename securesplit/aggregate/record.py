"""What one party keeps of a round, so that somebody who trusts none of them can check it later: verify.py.

A record holds public things only: the configuration, the signed adverts, the names of U2 and U3, the signatures over U3,
and the SHA-256 of the opened sum. It holds no share, key, seed, count, update or loss. Its maker seals it with the key
of its certificate, so that what the round's own signatures do not cover (the time, the sum, why a round ended) can be
held against somebody.

    file = msgpack map with the fields in the order of the class | SHA-256("ssa-1/file|" map)

The hash at the end finds damage. It stops nobody who alters the file on purpose; seal and signatures do.

What this does not protect: the digest of a sum confirms a guess of the whole sum, so a sum of few coordinates without
noise could be searched for. A record says who took part and when; keep it as private as that is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgpack
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from securesplit.aggregate.config import MAX_CLIENTS, RoundConfig
from securesplit.aggregate.keys import statement
from securesplit.aggregate.roster import Peers
from securesplit.aggregate.wire import Name, Names, Signature, encode
from securesplit.errors import InputError

__all__ = [
    "MAX_RECORD",
    "RoundRecord",
    "decode_record",
    "encode_record",
    "parse_config",
    "read_record",
    "record_name",
    "record_round",
    "seal",
    "sealed_statement",
]

_MAX_CONFIG = 1 << 19
_MAX_ADVERT = 16384
MAX_RECORD = (1 << 20) + MAX_CLIENTS * (_MAX_ADVERT + 4096)
"""Largest file that is read, bytes."""

_SUM = 32
_NEVER = 1 << 37  # Later than any calendar here can express is no time.
_HINT = "Name a file that `securesplit train` or `serve` wrote for one round; copy it again if it was damaged."


class RoundRecord(BaseModel):
    """One round as one party saw it.

    Attributes:
        format: version of this layout.
        config: ``RoundConfig.canonical()``, as bytes, so that a record of a configuration that is illegal can be read.
        role, maker: who made the record: a client by its name in the roster, or the server.
        made: when, seconds since 1970 by the maker's clock.
        adverts: the signed adverts of U1 in the order of names, as they came.
        members, survivors: U2 and U3; empty when the round did not get there.
        signatures: over T3, by name, as the server bundled them.
        alike: what enters the signed statement besides T3 in blind rounds (``keys.alike_tag``), 32 bytes. A server
            does not know it. Empty when absent.
        sum_digest: SHA-256 of the opened ring sum; empty when the maker opened none.
        aborted: the code that ended the round without a sum at the maker; empty when there was a sum.
        certificate, seal: the maker's certificate, DER, and its signature over all that stands before; both empty when a
            server did not sign.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    format: Literal[1] = 1
    config: Annotated[bytes, Field(min_length=2, max_length=_MAX_CONFIG)]
    role: Literal["client", "server"]
    maker: Name
    made: Annotated[int, Field(ge=0, lt=_NEVER)]
    adverts: Annotated[tuple[Annotated[bytes, Field(max_length=_MAX_ADVERT)], ...], Field(max_length=MAX_CLIENTS)]
    members: Names
    survivors: Names
    signatures: Annotated[tuple[tuple[Name, Signature], ...], Field(max_length=MAX_CLIENTS)]
    alike: Annotated[bytes, Field(max_length=32)]
    sum_digest: Annotated[bytes, Field(max_length=_SUM)]
    aborted: Annotated[str, Field(pattern=r"^(SS-[0-9]{4})?$")]
    certificate: Annotated[bytes, Field(max_length=8192)] = b""
    seal: Annotated[bytes, Field(max_length=1024)] = b""

    def __repr_args__(self) -> Iterable[tuple[str | None, object]]:
        """A short repr: signatures in a log help nobody."""
        yield "maker", self.maker
        yield "made", self.made


def record_name(config: RoundConfig) -> str:
    """The name of a round's file; a round that is tried again is another session and gets another file."""
    return f"round-{config.round}-{config.session_id[:4].hex()}.record"


def record_round(
    config: RoundConfig,
    peers: Peers,
    *,
    role: Literal["client", "server"],
    maker: str,
    made: int,
    members: Sequence[str] = (),
    survivors: Sequence[str] = (),
    signatures: Sequence[tuple[str, bytes]] = (),
    alike: bytes = b"",
    sum_digest: bytes = b"",
    aborted: str | None = None,
) -> RoundRecord:
    """A record, not yet sealed; the arguments are the attributes of :class:`RoundRecord`.

    Args:
        config, peers: the round, and U1 as far as it is known (``Peers((), b"")`` before that).
    """
    return RoundRecord(
        config=config.canonical(), role=role, maker=maker, made=made,
        # A body has one encoding, so this gives the very bytes that came.
        adverts=tuple(encode(advert) for advert in peers.adverts),
        members=tuple(members), survivors=tuple(survivors), signatures=tuple(signatures),
        alike=alike, sum_digest=sum_digest, aborted=aborted or "",
    )  # fmt: skip


def seal(record: RoundRecord, certificate: bytes, sign: Callable[[bytes], bytes]) -> RoundRecord:
    """The record with its maker's certificate (DER) and signature; ``sign`` is the one that signed in the round."""
    draft = record.model_copy(update={"certificate": certificate, "seal": b""})
    return draft.model_copy(update={"seal": sign(sealed_statement(draft))})


def sealed_statement(record: RoundRecord) -> bytes:
    """What a seal is over: every field but itself, under a label that no message of a round has."""
    cfg = hashlib.sha256(b"ssa-1/cfg|" + record.config).digest()
    return statement("record", cfg, _pack(record, [name for name in RoundRecord.model_fields if name != "seal"]))


def encode_record(record: RoundRecord) -> bytes:
    """The content of a record's file. Write it with mode 0600, in one step."""
    packed = _pack(record, RoundRecord.model_fields)
    return packed + _checksum(packed)


def decode_record(data: bytes) -> RoundRecord:
    """Parse a record's file; nothing about the round is checked here.

    Raises:
        InputError: SS-1620 when it is too large, damaged, no such file, or not in the one encoding. Nothing else escapes.
    """
    if len(data) > MAX_RECORD:
        raise InputError("SS-1620", f"the record has more than {MAX_RECORD} bytes", hint=_HINT)
    packed, checksum = data[:-_SUM], data[-_SUM:]
    if checksum != _checksum(packed):
        raise InputError("SS-1620", "the record is damaged, or is no record of a round", hint=_HINT)
    try:
        raw = msgpack.unpackb(
            packed, raw=False, use_list=False, strict_map_key=True,
            max_str_len=512, max_bin_len=_MAX_CONFIG, max_array_len=MAX_CLIENTS, max_map_len=16, max_ext_len=0,
        )  # fmt: skip
        record = RoundRecord.model_validate(raw)
        canonical = _pack(record, RoundRecord.model_fields) == packed
    except (ValueError, msgpack.UnpackException, ValidationError, RecursionError):
        raise InputError("SS-1620", "this is no record of a round that this release can read", hint=_HINT) from None
    if not canonical:
        raise InputError("SS-1620", "the record is not in its one encoding", hint=_HINT)
    return record


def read_record(path: Path) -> RoundRecord:
    """Read and parse a record's file.

    Raises:
        InputError: SS-1620 when it cannot be read, or as :func:`decode_record`; the message names the file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORD + 1)
    except OSError as error:
        raise InputError("SS-1620", f"{path} cannot be read ({type(error).__name__})", hint=_HINT) from None
    try:
        return decode_record(data)
    except InputError as error:
        raise InputError("SS-1620", f"{path}: {error.what}", hint=error.hint) from None


def parse_config(text: bytes) -> RoundConfig:
    """The configuration from its canonical bytes: the inverse of ``RoundConfig.canonical``, with no second spelling.

    Raises:
        InputError: SS-1601 when its numbers are illegal; SS-1620 when the bytes are not the one encoding of a
            configuration of this release.
    """
    hint = "The record is altered, or comes from another release."
    try:
        raw = json.loads(text.decode("ascii"))
        if not isinstance(raw, dict):
            raise TypeError
        hints = get_type_hints(RoundConfig)
        known = {field.name: _value(raw[field.name], hints[field.name]) for field in fields(RoundConfig)}
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
        raise InputError("SS-1620", "the recorded configuration is none of this release", hint=hint) from None
    config = RoundConfig(**known)  # type: ignore[arg-type]
    if config.canonical() != text:
        raise InputError("SS-1620", "the recorded configuration is not in its one encoding", hint=hint)
    return config


def _value(raw: object, kind: Any) -> object:
    """One field of the JSON as the type that the class declares; a Boolean is no number, a number no text."""
    if kind is bytes and isinstance(raw, str):
        return bytes.fromhex(raw)
    if isinstance(raw, list):
        raw = tuple(raw)
    return TypeAdapter(kind).validate_python(raw, strict=True)


def _pack(record: RoundRecord, names: Iterable[str]) -> bytes:
    packed: bytes = msgpack.packb({name: getattr(record, name) for name in names}, use_bin_type=True)
    return packed


def _checksum(packed: bytes) -> bytes:
    return hashlib.sha256(b"ssa-1/file|" + packed).digest()
