"""Logs to play with: signed with an HMAC, which is fast and which nobody in a test forges; and a reader of its own.

:func:`chain_of` recomputes the chain from the description in docs/audit-log.md, with json and hashlib alone.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
from collections.abc import Callable
from pathlib import Path

from securesplit.errors import ConnectionFailed
from securesplit.journal.events import Accepted, Closed, Loaded, Refused, Released, Round, Served
from securesplit.journal.log import Journal
from securesplit.journal.seal import Signer
from securesplit.journal.verify import Trust

SERVER = "spiffe://securesplit.local/securesplit/server/gpu"
ALICE = "spiffe://securesplit.local/securesplit/client/alice"
BOB = "spiffe://securesplit.local/securesplit/client/bob"
EVENTS = (
    Loaded(what="policy", digest="a" * 64),
    Accepted(connection=1, address="10.0.0.7:51842", peer=ALICE, certificate="b" * 64, serial="0A0B", tls="TLSv1.3"),
    Refused(stage="tls", code="SS-3205", address="[fe80::1]:5"),
    Served(connection=1, session="c" * 32, what="forward", step=4, rows=64, bytes=4096),
    Round(state="started", number=0, run="d" * 32, clients=3),
    Released(channel="cut", sequences=2, charged=1, units=77, noised=True, payload="e" * 64),
    Closed(connection=1, session="c" * 32, peer=ALICE, code="SS-4001", steps=5, bytes_up=7, bytes_down=8),
)


def certificate_of(party: str, generation: int = 0) -> bytes:
    return f"certificate {generation} of {party}".encode()


def _key(certificate: bytes) -> bytes:
    return hashlib.sha256(b"the private key of " + certificate).digest()


def verify_by(certificate: bytes, signature: bytes, data: bytes) -> None:
    if not hmac.compare_digest(hmac.new(_key(certificate), data, hashlib.sha256).digest(), signature):
        raise ConnectionFailed("SS-3207", "a bad signature")


def owner(certificate: bytes, at: int) -> str:
    assert at > 0
    words = certificate.decode("ascii", errors="replace").split(" of ")
    if len(words) != 2 or not words[0].startswith("certificate "):
        raise ConnectionFailed("SS-3202", "of nobody we know")
    return words[1]


def signer_for(party: str = SERVER, generation: int = 0) -> Signer:
    certificate = certificate_of(party, generation)
    return Signer(
        certificate, lambda data: hmac.new(_key(certificate), data, hashlib.sha256).digest(), verify_by, owner
    )


TRUST = Trust(owner, verify_by)


def ticking(start: int = 1_700_000_000_000_000_000) -> Callable[[], int]:
    moments = itertools.count(start, 1_234_567)
    return lambda: next(moments)


def opened(path: Path, party: str = SERVER, **options: object) -> Journal:
    generation = int(options.pop("generation", 0))  # type: ignore[call-overload]
    return Journal.open(path, signer_for(party, generation), party=party, clock=ticking(), **options)  # type: ignore[arg-type]


def filled(path: Path, count: int = 20, party: str = SERVER, **options: object) -> Path:
    with opened(path, party, **options) as journal:
        for number in range(count):
            journal.append(EVENTS[number % len(EVENTS)], durable=False)
    return path


def lines_of(path: Path) -> list[bytes]:
    return b"".join(file.read_bytes() for file in sorted(path.glob("*.jsonl"))).splitlines(keepends=True)


def chain_of(path: Path) -> list[bytes]:
    """Hashes of all rows, each recomputed; the stated ones have to agree."""
    hashes: list[bytes] = []
    previous = b""
    for index, line in enumerate(lines_of(path)):
        row = json.loads(line)
        stated = row.pop("hash")
        if index == 0:
            previous = hashlib.sha256(b"securesplit.journal.v1 log\0" + bytes.fromhex(row["log"])).digest()
        assert row["index"] == index
        body = json.dumps(row, sort_keys=True, separators=(",", ":")).encode()
        previous = hashlib.sha256(b"securesplit.journal.v1 row\0" + previous + body).digest()
        assert previous.hex() == stated
        hashes.append(previous)
    return hashes
