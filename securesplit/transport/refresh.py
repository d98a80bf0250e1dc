"""A running server and its key folder: what changed there, and what has run out although nothing changed."""

from __future__ import annotations

import hashlib
import logging
import time
from datetime import UTC, datetime

from securesplit.errors import ConnectionFailed
from securesplit.pki.store import KeyFolder
from securesplit.transport.lapse import run_out
from securesplit.transport.record import Record
from securesplit.transport.tls import ContextHolder

__all__ = ["Refresher"]

_log = logging.getLogger(__name__)
_SELF_CHECK = 30.0


class Refresher:
    """Looks at the folder a few times a second.

    Args:
        tls: holds the context in force.
        record: told of every exchange, and of every one that failed.
    """

    def __init__(self, tls: ContextHolder, record: Record) -> None:
        self._tls = tls
        self._record = record
        self._checked = time.monotonic()
        self._fault = ""
        self._broken = ""
        self._lapsed = 0

    def look(self) -> bool:
        """Exchange the context if a file has changed; True when everybody who is connected has to be looked at again.

        That is also so when a list or an authority in force has run out. Files that cannot be used leave the old ones in
        force, but for newer revocation lists; they are tried again now and then, for a mode or a clock may be set right.
        """
        if self._tls.changed():
            return self._exchange()
        if time.monotonic() - self._checked >= _SELF_CHECK:
            self._checked = time.monotonic()
            if self._broken:
                return self._exchange()
            self._look_at_myself()
        before, self._lapsed = self._lapsed, run_out(self._tls.folder, datetime.now(UTC))
        return self._lapsed > before

    def _exchange(self) -> bool:
        before, broken = self._tls.folder, ""
        try:
            self._tls.reload()
        except ConnectionFailed as error:
            broken = error.code
            if broken != self._broken or self._tls.folder is not before:
                _log.error("the changed key folder is not usable, the old one stays in force: %s", error)
                self._record.reloaded("folder", code=broken)
        else:
            self._fault = ""
            _log.info("certificates reloaded")
            self._record.rekey(self._tls.folder)
        self._broken = broken
        for what, digest in _differences(before, self._tls.folder):
            self._record.reloaded(what, digest)
        return True

    def _look_at_myself(self) -> None:
        """Say once when the server's own certificate or list runs out: from then on every new client is refused."""
        folder, fault = self._tls.folder, ""
        try:
            folder.verify_peer(folder.cert_der, "server")
        except ConnectionFailed as error:
            fault = error.code
            if fault != self._fault:
                _log.error("every new client is refused: %s", error)
                self._record.reloaded("crl" if fault == "SS-3206" else "certificate", code=fault)
        self._fault = fault


def _differences(before: KeyFolder, after: KeyFolder) -> list[tuple[str, str]]:
    """Which of the three has been exchanged, and the digest of the new one."""
    pairs = (
        ("certificate", before.cert_der, after.cert_der),
        ("authority", before.ca_pem, after.ca_pem),
        ("crl", before.crl_pem, after.crl_pem),
    )
    return [(what, hashlib.sha256(new).hexdigest()) for what, old, new in pairs if old != new]
