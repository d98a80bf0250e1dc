"""What a server's shell writes down: every visitor that was turned away, every connection, every reload. Rows, never prose.

Without a journal all of it goes to the process's log alone. With one, a disk that takes no rows stops the service: what
cannot be recorded is not done.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Literal, cast

from cryptography import x509

from securesplit.errors import SecureSplitError
from securesplit.journal.coalesce import Coalescer
from securesplit.journal.events import Accepted, Closed, Event, Quota, Refused, Reloaded
from securesplit.journal.log import Journal
from securesplit.journal.seal import Signer
from securesplit.pki.certificate import serial_text
from securesplit.pki.store import KeyFolder

__all__ = ["Record", "Stage", "stage_of"]

_log = logging.getLogger(__name__)

Stage = Literal["tcp", "tls", "http", "identity", "handshake", "policy", "protocol", "limit", "budget"]
_LIMITS: dict[str, Literal["connections", "handshakes", "progress", "queue", "rate", "bytes"]] = {
    "SS-3040": "connections", "SS-3050": "rate", "SS-3051": "handshakes", "SS-3053": "progress", "SS-3054": "connections",
    "SS-4025": "queue", "SS-4026": "progress", "SS-4027": "progress", "SS-2040": "bytes",
}  # fmt: skip


def stage_of(code: str) -> Stage:
    """How far somebody had come who was put out with this code while connected."""
    if code in _LIMITS:
        return "limit"
    families: dict[str, Stage] = {"SS-2": "policy", "SS-3": "identity", "SS-5": "budget"}
    return families.get(code[:4], "protocol")


class Record:
    """Writes events.

    Args:
        journal: where to; None for the process's log alone.
        signer_of: makes of renewed keys what signs the journal from then on.

    Attributes:
        fault: why the journal takes no rows, while it does not.
    """

    def __init__(self, journal: Journal | None = None, signer_of: Callable[[KeyFolder], Signer] | None = None) -> None:
        self._signer_of = signer_of
        self._journal = journal
        self._coalescer = Coalescer()
        self._now = 0.0
        self.fault: SecureSplitError | None = None

    @property
    def sound(self) -> bool:
        """Whether what happens is being recorded. Nothing may be served while it is not."""
        return self.fault is None

    def note(self, event: Event) -> None:
        """Write one row; it is on disk after the next :meth:`sync`."""
        if self._journal is None:
            return
        try:
            self._journal.append(event, durable=False)
        except SecureSplitError as error:
            self._failed(error)
        else:
            self.fault = None

    def require(self, event: Event) -> None:
        """Write one row about something that must not happen without it.

        Raises:
            CheckFailed: SS-1585 when the journal does not take it.
        """
        self.note(event)
        if self.fault is not None:
            raise self.fault

    def refused(self, stage: Stage, code: str, address: str, *, peer: str = "", connection: int = 0) -> None:
        """Somebody was turned away or put out. A flood of the same becomes one row with a count."""
        offered = Refused(stage=stage, code=code, address=address, peer=peer, connection=connection)
        for event in self._coalescer.offer(offered, self._now):
            if event.count == 1:
                _log.warning("refused (%s): [%s] %s %s", stage, code, address, peer)
            self.note(event)

    def quota(self, code: str, limit: int, address: str, *, peer: str = "", connection: int = 0) -> None:
        """A limit was reached by somebody who is known."""
        what = _LIMITS.get(code, "connections")
        self.note(Quota(quota=what, code=code, limit=limit, peer=peer, address=address, connection=connection))

    def accepted(self, connection: int, address: str, peer: str, certificate: bytes) -> None:
        """A client with a verified certificate is in."""
        _log.info("connection %d: %s from %s", connection, peer, address)
        serial = serial_text(x509.load_der_x509_certificate(certificate).serial_number)
        digest = hashlib.sha256(certificate).hexdigest()
        self.note(
            Accepted(
                connection=connection, address=address, peer=peer, certificate=digest, serial=serial, tls="TLSv1.3"
            )
        )

    def closed(self, connection: int, peer: str, code: str, *, up: int, down: int) -> None:
        """A connection is gone."""
        _log.info("connection %d: closed %s", connection, code)
        self.note(Closed(connection=connection, peer=peer, code=code, bytes_up=up, bytes_down=down))

    def reloaded(self, what: str, digest: str = "", code: str = "") -> None:
        """The key folder changed."""
        part = cast("Literal['certificate', 'authority', 'crl', 'folder', 'policy']", what)
        self.note(Reloaded(what=part, digest=digest, code=code))

    def rekey(self, folder: KeyFolder) -> None:
        """The server's certificate was exchanged: the journal's heads are signed by the new one from here on."""
        if self._journal is None or self._signer_of is None:
            return
        try:
            self._journal.rekey(self._signer_of(folder))
        except SecureSplitError as error:
            self._failed(error)

    def tick(self, now: float) -> None:
        """Let the clock advance: rows that stand for many are due now and then; a broken disk is tried again."""
        self._now = now
        for event in self._coalescer.due(now):
            self.note(event)
        if self.fault is not None and self._journal is not None:
            try:
                self._journal.probe()
            except SecureSplitError as error:
                self._failed(error)
            else:
                self.fault = None
                _log.warning("the audit log takes rows again")

    def finish(self) -> None:
        """The server ends: rows that stand for many refusals are due whether or not their second is over."""
        for event in self._coalescer.due(self._now, all_of_them=True):
            self.note(event)

    def sync(self) -> None:
        """Wait for the disk; not on an event loop."""
        if self._journal is None:
            return
        try:
            self._journal.sync()
        except SecureSplitError as error:
            self._failed(error)

    def _failed(self, error: SecureSplitError) -> None:
        if self.fault is None:
            _log.error("the audit log takes no rows; nothing is served until it does: %s", error)
        self.fault = error
