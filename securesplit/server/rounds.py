"""What the server keeps of each secure sum for whoever wants to verify it: ``securesplit aggregate verify``."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from securesplit.aggregate.record import encode_record, record_name, seal
from securesplit.aggregate.server import ServerRound
from securesplit.errors import SecureSplitError
from securesplit.pki.files import write_atomically
from securesplit.pki.store import KeyFolder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RoundRecords:
    """Writes a sealed record of every round that has ended.

    Attributes:
        folder: the server's keys.
        out: directory for the files.
    """

    folder: KeyFolder
    out: Path

    def __call__(self, ended: ServerRound) -> None:
        """Keep one. A full disk costs the record and not the round."""
        record = ended.record(int(time.time()), maker=self.folder.identity.name)
        sealed = seal(record, self.folder.cert_der, self.folder.sign)
        try:
            write_atomically(self.out / record_name(ended.config), encode_record(sealed), mode=0o600)
        except SecureSplitError as error:
            _log.warning("the record of a round could not be kept: %s", error)
