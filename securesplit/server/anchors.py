"""What clients give the server to keep: the sealed heads of their ledgers, opaque to it, one per certificate.

A client whose whole machine was set back to an older image cannot know it; the server, which kept the newest blob, shows
it in Welcome, and the client refuses itself. The server learns that a client has a ledger and when it changed, which the
traffic shows anyway. A server that shows an old blob or none hides a rollback; it cannot invent one. With a new certificate a client begins anew here, so that one who was provisioned again
is not locked out by the ledger that it had before.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


class KeptAnchors:
    """Blobs by client certificate (DER), on disk where there is a folder.

    Args:
        folder: made when it is absent; None keeps them in memory alone.

    Raises:
        OSError: when the folder cannot be made.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: dict[bytes, bytes] = {}
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def of(self, client: bytes) -> bytes:
        """What this client gave last; empty when nothing, or when it cannot be read."""
        if client not in self._known and self._folder is not None:
            try:
                self._known[client] = self._file(client).read_bytes()
            except OSError:
                return b""
        return self._known.get(client, b"")

    def keep(self, client: bytes, blob: bytes) -> None:
        """Keep a client's newest blob. Raises OSError when the disk refuses."""
        self._known[client] = blob
        if self._folder is None:
            return
        descriptor, draft = tempfile.mkstemp(dir=self._folder)
        with os.fdopen(descriptor, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).replace(self._file(client))

    def _file(self, client: bytes) -> Path:
        assert self._folder is not None
        return self._folder / f"{hashlib.sha256(client).hexdigest()[:32]}.anchor"
