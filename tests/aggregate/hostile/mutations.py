"""Every way to alter a message, field by field: what is generated is a list, not a sample.

A mutation is a name and what it makes of one encoded body. The same name means the same change in every client's body, so
one lie can be told to all. Nothing here knows what a message means, only of what its fields are made: maps, lists, names,
numbers and bytes, and bytes that are bodies themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

__all__ = ["Mutant", "flips", "mutants"]

STRANGERS: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    "",
    "x",
    b"",
    b"x",
    [],
    [[]],
    {},
    {"a": 1},
    1 << 63,
    "\u00e9\x00",
)
NUMBERS = (0, -1, 1, 2**31, 2**53 - 1, 2**53, 2**63, 2**64 - 1)


@dataclass(frozen=True, slots=True)
class Mutant:
    """A changed body; ``name`` begins with the field."""

    name: str
    data: bytes


def pack(value: object) -> bytes:
    """Without complaint about what it packs."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def mutants(body: bytes, others: Sequence[tuple[str, bytes]], names: Sequence[str]) -> list[Mutant]:
    """All single changes of a body.

    Args:
        body: an honest body.
        others: bodies of the same kind from elsewhere, with what they are: their fields are put in this one's places.
        names: some names to put in, of which the last should be unknown.
    """
    raw = msgpack.unpackb(body, use_list=True)
    replays = [(label, msgpack.unpackb(data, use_list=True)) for label, data in others]
    made = [Mutant(f"whole: {label}", data) for label, data in replay_whole(others)]
    made += [Mutant(f"whole: {label}", data) for label, data in _encodings(body, raw)]
    for field in raw:
        made += [Mutant(f"{field}: left out", pack({k: v for k, v in raw.items() if k != field}))]
        made += [Mutant(f"{field}: renamed", pack({k + "x" * (k == field): v for k, v in raw.items()}))]
        changes = [*_changes(raw[field], names)]
        changes += [(f"of {label}", there[field]) for label, there in replays if there.get(field) != raw[field]]
        made += [Mutant(f"{field}: {label}", pack({**raw, field: value})) for label, value in changes]
    unique = {m.name: m for m in made if m.data != body}
    return list(unique.values())


def replay_whole(others: Sequence[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    for label, data in others:
        yield f"of {label}", data


def flips(body: bytes) -> Iterator[Mutant]:
    """One bit of every byte, the eight of them in turns."""
    for at in range(len(body)):
        yield Mutant(f"bit {at % 8} of byte {at}", body[:at] + bytes([body[at] ^ (1 << at % 8)]) + body[at + 1 :])


def _encodings(body: bytes, raw: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The same content in other bytes, and bytes without any."""
    yield "empty", b""
    yield "nil", b"\xc0"
    yield "a list", pack(list(raw.values()))
    yield "in a list", pack([raw])
    yield "fields the other way round", pack(dict(reversed(raw.items())))
    yield "a field more", pack({**raw, "more": 1})
    yield "a field twice", bytes([body[0] + 1]) + body[1:] + pack("round") + pack(raw.get("round"))
    yield "a longer map head", b"\xde\x00" + bytes([body[0] & 0x0F]) + body[1:]
    yield "a key in bytes", body.replace(b"\xa5round", b"\xc4\x05round", 1)
    yield "a longer string head", body.replace(b"\xa5round", b"\xd9\x05round", 1)
    yield (
        "a longer number",
        body.replace(b"\xa5round" + pack(raw["round"]), b"\xa5round\xcf" + raw["round"].to_bytes(8, "big"), 1),
    )
    yield "an extension", b"\xc7\x00\x01"
    yield "a timestamp", b"\xd6\xff" + bytes(4)
    yield "a byte more", body + b"\x00"
    yield "itself once more", body + body
    for left in (1, len(body) // 2, len(body) - 1):
        yield f"its first {'byte' if left == 1 else 'half' if left < len(body) - 1 else 'bytes but one'}", body[:left]
    yield "deep nesting", b"\x91" * 2000 + b"\xc0"
    yield "a huge length", b"\xdd\xff\xff\xff\xff"


def _changes(value: object, names: Sequence[str]) -> Iterator[tuple[str, object]]:
    yield from (
        (f"{thing!r} instead", thing) for thing in STRANGERS if thing != value or type(thing) is not type(value)
    )
    match value:
        case bytes():
            yield from _bytes(value, names)
        case str():
            yield from _text(value, names)
        case bool():
            return
        case int():
            yield from ((f"{n} instead", n) for n in (*NUMBERS, value + 1, abs(value - 1)) if n != value)
            yield "as a float", float(value)
            yield "as text", str(value)
        case list():
            yield from _items(value, names)


def _bytes(value: bytes, names: Sequence[str]) -> Iterator[tuple[str, object]]:
    size = len(value)
    for label, at in (("first", 0), ("middle", size // 2), ("last", size - 1)):
        if size:
            yield f"a bit of the {label} byte", value[:at] + bytes([value[at] ^ 0x80]) + value[at + 1 :]
    yield "a byte less", value[:-1]
    yield "its first byte less", value[1:]
    yield "a byte more", value + b"\x00"
    yield "a byte before", b"\x00" + value
    yield "twice", value + value
    yield "zeros", bytes(size)
    yield "ones", b"\xff" * size
    yield "as text", value.hex()
    yield "more than any field holds", bytes(20_000)
    inner = _inner(value)
    if inner:
        yield "inner: a field more", pack({**inner, "more": 1})
    for field in inner:
        yield f"inner {field}: left out", pack({k: v for k, v in inner.items() if k != field})
        for label, changed in _changes(inner[field], names):
            yield f"inner {field}: {label}", pack({**inner, field: changed})


def _inner(value: bytes) -> dict[str, Any]:
    """The fields of a body inside a body."""
    if value[1:9] != b"\xa7session":
        return {}
    try:
        found = msgpack.unpackb(value, use_list=True)
    except ValueError:  # It was altered before.
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: str, names: Sequence[str]) -> Iterator[tuple[str, object]]:
    yield from ((f"name {at} instead", name) for at, name in enumerate(names) if name != value)
    yield "a letter more", value + "a"
    yield "a letter less", value[:-1]
    yield "a letter as another looks", "\u0430" + value[1:]
    yield "in capitals", value.upper()
    yield "128 letters", "n" * 128
    yield "129 letters", "n" * 129
    yield "600 letters", "n" * 600
    yield "a line break", value + "\n"
    yield "in bytes", value.encode()


def _items(value: list[Any], names: Sequence[str]) -> Iterator[tuple[str, object]]:
    size = len(value)
    yield "257 of them", (value or ["x"]) * 257
    yield "nested", [value]
    yield "as a map", {str(at): item for at, item in enumerate(value)}
    if not value:
        yield "one name", [names[0]]
        yield "one pair", [[names[0], bytes(64)]]
        yield "all names", sorted(names)
        return
    yield "none", []
    yield "the other way round", value[::-1]
    yield "rotated", value[1:] + value[:1]
    yield "all twice", value + value
    for label, at in (("first", 0), ("second", 1), ("middle", size // 2), ("last", size - 1)):
        if at < size:
            yield f"without the {label}", value[:at] + value[at + 1 :]
            yield f"the {label} twice", value[: at + 1] + value[at:]
            yield f"only the {label}", [value[at]]
            yield f"the {label} exchanged with the next", _exchanged(value, at)
    for label, at in (("first", 0), ("last", size - 1)):
        for inner, changed in _changes(value[at], names) if not _pair(value[at]) else _pairs(value[at], names):
            yield f"{label}, {inner}", [*value[:at], changed, *value[at + 1 :]]
    if all(_pair(item) for item in value) and size > 1:
        (one, this), (two, that) = value[:2]
        yield "names of the first two exchanged", [[two, this], [one, that], *value[2:]]
        yield "all under one name", [[one, content] for _, content in value]
        yield "all with one content", [[name, this] for name, _ in value]
        yield "contents rotated", [[name, value[at - 1][1]] for at, (name, _) in enumerate(value)]
        yield "one more from a stranger", [*value, [names[-1], that]]
    if all(isinstance(item, str) for item in value):
        yield "one more, a stranger", sorted([*value, names[-1]])
        for at, name in enumerate(names):
            yield f"without name {at}", [item for item in value if item != name]
            yield f"name {at} alone", [name]


def _exchanged(value: list[Any], at: int) -> list[Any]:
    made = list(value)
    made[at], made[(at + 1) % len(made)] = made[(at + 1) % len(made)], made[at]
    return made


def _pair(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)


def _pairs(item: list[Any], names: Sequence[str]) -> Iterator[tuple[str, object]]:
    yield "name alone", item[0]
    yield "content alone", item[1]
    yield "three of them", [*item, item[1]]
    yield "exchanged in itself", item[::-1]
    yield from ((f"name: {label}", [changed, item[1]]) for label, changed in _changes(item[0], names))
    yield from ((f"content: {label}", [item[0], changed]) for label, changed in _changes(item[1], names))
