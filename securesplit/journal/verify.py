"""Is a log what its party wrote? Everything is recomputed, every signature checked, and two ends' logs are compared.

What it finds by what, and what it cannot find:

| what was done | found by |
|---|---|
| a byte changed, a row removed, put in, moved or taken from another log | the hash chain |
| the same with all hashes recomputed, without the key | the signed heads inside, and the file ``head`` |
| the end cut off, a file removed or exchanged | the file ``head``; a file in the middle by the chain |
| log and ``head`` exchanged together for an older copy, or rewritten by somebody who can sign | the other end's log alone |

A signature is worth as much as the certificate it was made with: ``trust`` says whose that was.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from securesplit.errors import SecureSplitError
from securesplit.journal.events import Began, Checkpoint, Continued, PeerHead, SignedHead
from securesplit.journal.faults import altered, cut, disagree, missing, unfinished, unsigned
from securesplit.journal.scan import Line, Tail, scan
from securesplit.journal.seal import Head, Sealed, read_sealed, statement

_LOOKS, _PAUSE = 5, 0.02

__all__ = ["Trust", "Verified", "Witnessed", "agree", "verify"]


@dataclass(frozen=True, slots=True)
class Trust:
    """How signatures are judged.

    Attributes:
        owner: ``owner(certificate, at)``: whose certificate (DER) it was at that time (nanoseconds since 1970), as
            ``spiffe://...``; raises one of our errors when it is not to be trusted.
        signed: ``signed(certificate, signature, data)``; raises one of our errors when the signature is not good.
    """

    owner: Callable[[bytes, int], str]
    signed: Callable[[bytes, bytes, bytes], None]


@dataclass(frozen=True, slots=True)
class Witnessed:
    """What a log says about other logs: checkpoints, and the heads that other ends showed."""

    place: str
    event: Checkpoint | PeerHead


@dataclass(frozen=True, slots=True)
class Verified:
    """A log that is what its party wrote, as far as its own files can tell.

    Attributes:
        path: its folder.
        log: its name, hex.
        party: whose it is.
        rows, files, heads: how many; a head is a signature inside the log.
        last: hash of the last row, hex.
        torn: rows that tell of a process that died.
        witnessed: for :func:`agree`.
    """

    path: Path
    log: str
    party: str
    rows: int
    files: int
    heads: int
    last: str
    torn: int
    witnessed: tuple[Witnessed, ...]


def verify(path: Path, trust: Trust) -> Verified:
    """Check a whole log, while it is being written too.

    Raises:
        CheckFailed: SS-1580 altered, SS-1581 cut off, SS-1582 not signed by its party, SS-1584 the end is not sealed.
        InputError: SS-1587 no log.
    """
    sealed = _sealed(path)
    check = _Check(trust, sealed)
    for found in scan(path):
        check.take(found)
    return check.result(path, grew=check.open_ended and _grows(path, sealed))


def agree(logs: Sequence[Verified]) -> int:
    """Compare verified logs of several parties: what each says about the others, and their checkpoints.

    Of a party that has several logs all must be shown, or heads that others saw of the rest look like those of a log that
    was replaced.

    Returns:
        How many statements were compared.

    Raises:
        CheckFailed: SS-1583. InputError: SS-1587.
    """
    shown = {log.log: log for log in logs}
    parties = {log.party for log in logs}
    compared = 0
    for witness in logs:
        claims: dict[str, dict[int, Witnessed]] = {}
        for seen in witness.witnessed:
            if isinstance(seen.event, PeerHead) and seen.event.peer in parties:
                if seen.event.log not in shown:
                    raise disagree(
                        f"{witness.path}: {seen.place} has seen another log of {seen.event.peer} than is shown"
                    )
                claims.setdefault(seen.event.log, {})[seen.event.rows] = seen
        for log, heads in claims.items():
            _require_held(witness, heads, shown[log])
            compared += len(heads)
    return compared + _checkpoints_agree(logs)


def _require_held(witness: Verified, heads: dict[int, Witnessed], other: Verified) -> None:
    """Every head that a log holds of another one is a head of that one."""
    for rows, seen in sorted(heads.items()):
        if rows > other.rows:
            raise disagree(
                f"{witness.path}: {seen.place} has seen {rows} rows of {other.party}'s log, which has {other.rows}: it was cut off"
            )
    for found in scan(other.path):
        if isinstance(found, Line) and (claim := heads.get(found.row.index + 1)) is not None:
            assert isinstance(claim.event, PeerHead)
            if found.row.hash.hex() != claim.event.head:
                raise disagree(f"{witness.path}: {claim.place} has seen another row than {other.path}: {found.place}")


def _checkpoints_agree(logs: Sequence[Verified]) -> int:
    first: dict[tuple[str, int], tuple[Verified, Witnessed]] = {}
    compared = 0
    for log in logs:
        for seen in log.witnessed:
            if not isinstance(seen.event, Checkpoint):
                continue
            before, at = first.setdefault((seen.event.session, seen.event.number), (log, seen))
            if before is log:
                continue
            compared += 1
            if at.event != seen.event:
                raise disagree(
                    f"{before.path}: {at.place} and {log.path}: {seen.place}: the ends saw different messages in one session"
                )
    return compared


def _grows(path: Path, before: Sealed | None) -> bool:
    """Whether somebody writes it right now. Then it was checked up to where it was sealed when this began."""
    for _ in range(_LOOKS):
        now = _sealed(path)
        if now is not None and before is not None and now.latest.rows > before.latest.rows:
            return True
        time.sleep(_PAUSE)
    return False


def _sealed(path: Path) -> Sealed | None:
    try:
        return read_sealed(path / "head") if (path / "head").exists() else None
    except OSError as error:
        raise missing(str(path), error.strerror or type(error).__name__) from None


class _Check:
    """Row after row of one log."""

    def __init__(self, trust: Trust, sealed: Sealed | None) -> None:
        self._trust, self._sealed = trust, sealed
        self._heads = {h.rows: h for h in (sealed.synced, sealed.latest)} if sealed else {}
        self._began: Began | None = None
        self._certificate = b""
        self._rows = self._signed = self._torn = self._file = 0
        self._last, self._place = b"", ""
        self._tail: Tail | None = None
        self._witnessed: list[Witnessed] = []

    def take(self, found: Line | Tail) -> None:
        """One line."""
        if isinstance(found, Tail):
            self._tail = found
            return
        row, place = found.row, str(found.place)
        match row.event:
            case Began() | Continued():
                self._owner(row.event, row.at, place)
            case SignedHead(signature=signature):
                self._require_signed(Head(self._log, self._rows, self._last, bytes.fromhex(signature)), place)
                self._signed += 1
            case Checkpoint() | PeerHead():
                self._witness(row.event, row.at, place)
            case _ if row.event.kind == "torn":  # type: ignore[attr-defined]  # every kind has its name
                self._torn += 1
            case _:
                pass
        self._rows, self._last, self._place, self._file = row.index + 1, row.hash, place, found.place.file
        if (head := self._heads.get(self._rows)) is not None:
            if head.hash != self._last or head.log != self._log:
                raise altered(place, "it is not the row that was sealed")
            self._require_signed(head, "the file head")

    @property
    def open_ended(self) -> bool:
        """Whether there is something behind what was sealed."""
        sealed = self._sealed
        return sealed is not None and (self._tail is not None or self._rows > sealed.latest.rows)

    def result(self, path: Path, *, grew: bool) -> Verified:
        """What is left to ask at the end."""
        if self._began is None:
            raise altered("000001.jsonl line 1", "the first row is missing")
        if self._sealed is None:
            raise unsigned("the file head is missing or unreadable, so nobody can tell whether rows are missing")
        if self._sealed.latest.log != self._log:
            raise unsigned("the file head is another log's")
        gone = max(self._sealed.latest.rows, self._sealed.synced.rows) - self._rows
        if gone > 0:
            raise cut(f"{self._rows} rows are there and {self._rows + gone} were sealed; it ends at {self._place}")
        if self._tail is not None and not grew:
            raise unfinished(f"{self._tail.bytes} bytes after {self._place} are no row")
        if self._rows > self._sealed.latest.rows and not grew:
            raise unfinished(f"{self._rows - self._sealed.latest.rows} rows up to {self._place} are not sealed")
        return Verified(
            path, self._began.log, self._began.party, self._rows, self._file, self._signed, self._last.hex(), self._torn,
            tuple(self._witnessed),
        )  # fmt: skip

    @property
    def _log(self) -> bytes:
        return bytes.fromhex(self._began.log) if self._began else b""

    def _owner(self, event: Began | Continued, at: int, place: str) -> None:
        if isinstance(event, Began):
            self._began = event
        assert self._began is not None
        if (event.log, event.party) != (self._began.log, self._began.party):
            raise altered(place, "it belongs to another log")
        certificate = _decoded(event.certificate, place)
        if certificate == self._certificate:
            return
        if self._owner_of(certificate, at, place) != event.party:
            raise unsigned(f"{place}: the certificate is another party's")
        self._certificate = certificate

    def _owner_of(self, certificate: bytes, at: int, place: str) -> str:
        try:
            return self._trust.owner(certificate, at)
        except SecureSplitError as error:
            raise unsigned(f"{place}: the certificate is not trusted ({error.code}: {error.what})") from None

    def _require_signed(self, head: Head, place: str, certificate: bytes | None = None) -> None:
        try:
            data = statement(head.log, head.rows, head.hash)
            self._trust.signed(self._certificate if certificate is None else certificate, head.signature, data)
        except SecureSplitError as error:
            raise unsigned(f"{place}: the signature is not good ({error.code})") from None

    def _witness(self, event: Checkpoint | PeerHead, at: int, place: str) -> None:
        self._witnessed.append(Witnessed(place, event))
        if isinstance(event, PeerHead):
            certificate = _decoded(event.certificate, place)
            if self._owner_of(certificate, at, place) != event.peer:
                raise unsigned(f"{place}: the other end's certificate is another party's")
            head = Head(bytes.fromhex(event.log), event.rows, bytes.fromhex(event.head), bytes.fromhex(event.signature))
            self._require_signed(head, place, certificate)


def _decoded(certificate: str, place: str) -> bytes:
    try:
        return base64.b64decode(certificate, validate=True)
    except ValueError:
        raise altered(place, "its certificate is not base64") from None
