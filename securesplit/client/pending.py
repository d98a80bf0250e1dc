"""A round that is not closed yet, on this client's disk: what it brought, and the sum that it has, if it has it.

Written before the update enters the round, and again with the sum's name before the state that follows from the sum; read after
a crash. The state alone says whether the sum is in it: if not, the round is entered again, else only its end is waited for. It lies in the run's own folder,
private to the user, and holds an update that is fit for a secure sum and for nobody's eyes; it never leaves the site. What
it says of the update counts only with the gate's receipt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgpack
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from securesplit.aggregate.answered import AnswerLog
from securesplit.client.rounds import Brought, Kept
from securesplit.errors import AggregationAborted
from securesplit.pki.files import write_atomically
from securesplit.pki.store import KeyFolder
from securesplit.policy.schema import Policy
from securesplit.privacy.gate import Gate

__all__ = ["Pending", "read_pending", "write_pending"]


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """What was read.

    Attributes:
        brought: as it was.
        kept: the sum's; None when the round had none yet.
    """

    brought: Brought
    kept: Kept | None


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    format: int
    vector: bytes
    noised: bool
    honest: int
    step: float
    receipt: str
    weight: int
    number: int
    frozen: str
    origin: bytes
    alike: bytes
    run: bytes
    clients: tuple[str, ...]
    words: bytes


def write_pending(path: Path, gate: Gate, brought: Brought, kept: Kept | None = None) -> None:
    """Keep a round on disk, in one step, mode 0600.

    Args:
        path: the file.
        gate: made the update.
        brought: what enters the round.
        kept: of its sum, before what follows from it is written.
    """
    update, sum_ = brought.update, kept or Kept(b"", (), b"")
    fields = _File(
        format=1, vector=update.vector.astype("<f8").tobytes(), noised=update.noised, honest=update.honest, step=update.step,
        receipt=gate.receipt(update), weight=brought.weight, number=brought.number, frozen=brought.frozen,
        origin=brought.origin, alike=brought.alike, run=sum_.run, clients=sum_.clients, words=sum_.words,
    )  # fmt: skip
    write_atomically(path, msgpack.packb(fields.model_dump(), use_bin_type=True), mode=0o600)


def read_pending(
    path: Path, gate: Gate, *, folder: KeyFolder, policy: Policy, answers: AnswerLog, records: Path | None
) -> Pending | None:
    """What was kept; None when nothing was.

    Args:
        path: the file.
        gate: of the same site and policy.
        folder, policy, answers, records: of this process.

    Raises:
        AggregationAborted: SS-6035 when the file is damaged.
        PolicyDenied: SS-2011 when the update is not one that this site released under this policy.
    """
    if not path.exists():
        return None
    try:
        found = _File.model_validate(msgpack.unpackb(path.read_bytes(), raw=False, use_list=False))
        vector = np.frombuffer(found.vector, dtype="<f8").astype(np.float64)
    except (OSError, ValueError, msgpack.UnpackException, ValidationError, RecursionError):
        raise AggregationAborted(
            "SS-6035",
            f"{path} is not a round that this client kept",
            hint="Move it away and begin the round anew; what it would have released again is then paid for again.",
        ) from None
    update = gate.recall_update(
        vector, noised=found.noised, honest=found.honest, step=found.step, receipt=found.receipt
    )
    brought = Brought(
        folder, policy, update, found.weight, found.number, found.frozen, answers, found.origin, found.alike, records,
    )  # fmt: skip
    return Pending(brought, Kept(found.run, found.clients, found.words) if found.run else None)
