"""A running server and its key folder: what changed there, and what has run out although nothing changed."""

from __future__ import annotations

import hashlib
import logging
import time

from securesplit.errors import ConnectionFailed
from securesplit.pki.store import KeyFolder
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

    def look(self) -> bool:
        """Exchange the context if a file has changed; True when everybody who is connected has to be looked at again.

        Files that cannot be used leave the old ones in force.
        """
        if not self._tls.changed():
            self._look_at_myself()
            return False
        before = self._tls.folder
        try:
            self._tls.reload()
        except ConnectionFailed as error:
            _log.error("the changed key folder is not usable, the old one stays in force: %s", error)
            self._record.reloaded("folder", code=error.code)
            return False
        self._fault = ""
        _log.info("certificates reloaded")
        self._record.rekey(self._tls.folder)
        for what, digest in _differences(before, self._tls.folder):
            self._record.reloaded(what, digest)
        return True

    def _look_at_myself(self) -> None:
        """Say once when the server's own certificate or list runs out: from then on every new client is refused."""
        now = time.monotonic()
        if now - self._checked < _SELF_CHECK:
            return
        self._checked = now
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
