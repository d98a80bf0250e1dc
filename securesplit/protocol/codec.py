"""Messages to bytes and back.

    | "SS" | version u8 | kind u8 | header length u32 LE | header: msgpack map | tensor bytes, one after another |

The header holds every field; a tensor field holds ``[dtype, shape]`` and its bytes follow in field order. Sizes are
checked against the caps before anything is allocated, and a decoded tensor is a view, not a copy.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import msgpack
from pydantic import ValidationError

from securesplit.errors import RemoteProtocolError
from securesplit.protocol.messages import (
    ITEM_BYTES,
    MESSAGES,
    ROW_TYPES,
    VERSION,
    Blob,
    Forward,
    Gradient,
    Message,
    size_of,
)

_PREFIX = struct.Struct("<2sBBI")
_MAX_HEADER = 1 << 25


@dataclass(frozen=True, slots=True)
class Caps:
    """What one side is willing to receive.

    Attributes:
        message_bytes: largest whole message, in bytes.
        width: D, the only accepted number of columns of a two-dimensional tensor; None before it is known.
        code_width: k, instead of D, for what crosses in front of B (``Forward``, ``Gradient``) when the job has a code.
        dtypes: accepted types of hidden states and gradients; once there is a job, its codec alone.
    """

    message_bytes: int
    width: int | None = None
    code_width: int | None = None
    dtypes: frozenset[str] = frozenset(ROW_TYPES)

    def columns(self, message: type[Message]) -> int | None:
        """The only accepted number of columns of this message's rows; None when any will do."""
        in_front = issubclass(message, Forward | Gradient)
        return self.code_width if in_front and self.code_width is not None else self.width


def encode(message: Message) -> bytes:
    """The message's bytes, as docs/protocol.md lays them out."""
    header: dict[str, object] = {}
    tensors: list[bytes] = []
    for name in type(message).model_fields:
        value = getattr(message, name)
        if isinstance(value, Blob):
            header[name] = [value.dtype, list(value.shape)]
            tensors.append(value.data)
        else:
            header[name] = value
    packed = msgpack.packb(header, use_bin_type=True)
    return b"".join((_PREFIX.pack(b"SS", VERSION, message.KIND, len(packed)), packed, *tensors))


def decode(data: bytes, caps: Caps) -> Message:
    """Parse one whole message.

    Args:
        data: the bytes of exactly one message.
        caps: what is acceptable.

    Raises:
        RemoteProtocolError: SS-4001 not a message, SS-4002 too large, SS-4003 unknown version or kind, SS-4004 fields
            break the message's rules, SS-4005 a tensor of a wrong type, shape or size. Nothing else escapes.
    """
    if len(data) > caps.message_bytes:
        raise RemoteProtocolError("SS-4002", f"a message of {len(data)} bytes is over the cap of {caps.message_bytes}")
    if len(data) < _PREFIX.size:
        raise RemoteProtocolError("SS-4001", "a message ends inside its prefix")
    magic, version, kind, size = _PREFIX.unpack_from(data)
    if magic != b"SS":
        raise RemoteProtocolError("SS-4001", "a message does not start with the magic bytes")
    if version != VERSION or kind not in MESSAGES:
        raise RemoteProtocolError(
            "SS-4003",
            f"unknown version or kind of message: {version}, {kind}",
            hint="Run the same release on both ends.",
        )
    body = _PREFIX.size + size
    if size > _MAX_HEADER or body > len(data):
        raise RemoteProtocolError("SS-4001", "a message ends inside its header")
    return _build(MESSAGES[kind], _unpack(data[_PREFIX.size : body]), memoryview(data)[body:], caps)


def _unpack(packed: bytes) -> dict[str, object]:
    try:
        header = msgpack.unpackb(
            packed, raw=False, use_list=False, strict_map_key=True, object_pairs_hook=_unique,
            max_str_len=1 << 17, max_bin_len=_MAX_HEADER, max_array_len=4096, max_map_len=32, max_ext_len=0,
        )  # fmt: skip
    except (ValueError, msgpack.UnpackException, UnicodeDecodeError, RecursionError):
        raise RemoteProtocolError("SS-4001", "a header is not well-formed msgpack") from None
    if not isinstance(header, dict):
        raise RemoteProtocolError("SS-4001", "a header is not a map")
    return header


def _unique(pairs: Iterable[tuple[object, object]]) -> dict[object, object]:
    found: dict[object, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError("a key stands twice")
        found[key] = value
    return found


def _build(message: type[Message], header: dict[str, object], body: memoryview, caps: Caps) -> Message:
    offset = 0
    for name, field in message.model_fields.items():
        if field.annotation is Blob:
            blob, offset = _blob(header.get(name), body, offset, caps, caps.columns(message))
            header[name] = blob
    if offset != len(body):
        raise RemoteProtocolError("SS-4005", "bytes are left over after the last tensor")
    built = _validated(message, header)
    if isinstance(built, str):
        raise RemoteProtocolError("SS-4004", f"fields of {message.__name__} break its rules: {built}")
    return built


def _validated(message: type[Message], header: dict[str, object]) -> Message | str:
    """The message, or the names of its fields that are wrong.

    What pydantic raises stays in here. It leads back to every frame that called this, through an object that Python's garbage
    collector cannot look into; were it the context of an error that one of those frames, or an object that they hold, has by
    name, neither would ever be freed, nor the bytes of the peer's message.
    """
    try:
        return message.model_validate(header)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=False)
        known = message.model_fields
        return ", ".join(sorted({str(f["loc"][0]) if f["loc"] and f["loc"][0] in known else "?" for f in faults}))


def _blob(described: object, body: memoryview, offset: int, caps: Caps, columns: int | None) -> tuple[Blob, int]:
    match described:
        case (str(dtype), tuple(shape)) if dtype in {*ITEM_BYTES, *ROW_TYPES} and 1 <= len(shape) <= 3:
            pass
        case _:
            raise _unacceptable()
    if not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
        raise _unacceptable()
    size = size_of(dtype, shape)
    if size > len(body) - offset:
        raise _unacceptable()
    if len(shape) == 2 and (dtype not in caps.dtypes or (columns is not None and shape[1] != columns)):
        raise _unacceptable()
    blob = _checked(dtype, shape, bytes(body[offset : offset + size]))
    if blob is None:
        raise _unacceptable()
    return blob, offset + size


def _checked(dtype: str, shape: tuple[int, ...], data: bytes) -> Blob | None:
    """A tensor; None for scales or bytes that no int8 row has. What pydantic raises stays in here, as in :func:`_validated`."""
    try:
        return Blob.model_validate({"dtype": dtype, "shape": shape, "data": data})
    except ValidationError:
        return None


def _unacceptable() -> RemoteProtocolError:
    return RemoteProtocolError("SS-4005", "a tensor's type, shape, size or bytes are not acceptable")
