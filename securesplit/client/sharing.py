"""What clients learn between secure sums, what a sum carries, and what must be equal before it.

The update of a layer is ``alpha / rank * B A``, and a secure sum can only add. So the mean of what clients sent is the mean
of their models' updates exactly where at most one factor differs between clients. That holds for

* ``alternating``: B learns, then A, and so on, while the other stands still (RoLoRA, arXiv:2502.01755);
* ``frozen-a``: B learns, A stands at its public start for ever (FFA-LoRA, arXiv:2403.12313);
* ``core``: a square matrix between two constant factors learns (Fed-SB, arXiv:2502.15436).

With ``share-a`` both learn and only A is summed, exactly; B stays at its site, and every site has a model of its own
(FedSA-LoRA, arXiv:2410.01463). With ``naive`` both learn and both are summed (FedIT, arXiv:2305.05644), which is not exact;
securesplit/model/sketch.py measures by how much. Means are weighted by numbers of records; exactness is up to the sum's
rounding to its grid, for coordinates within the sum's clip.

B, the server's part of the model, learns both factors in every mode. Whether it has one copy or several that are averaged, and
which parts of the clients' side are never summed, is the mode of training: securesplit/protocol/training.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from securesplit.model.lora import Layout, Learned, adapter_layout, read_adapters
from securesplit.model.parts import Part
from securesplit.model.sketch import Residual, sketched, unsketched

if TYPE_CHECKING:
    from securesplit.client.client import Client
    from securesplit.protocol.adapters import Shared
    from securesplit.protocol.job import Job

__all__ = ["Turn", "alike_digest", "frozen_digest", "learns_in", "to_share", "turn_in", "turn_of", "what_was_shared"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Turn:
    """One round's part in a mode of sharing.

    Attributes:
        learned: what local steps move.
        summed: what the secure sum carries.
        constant: what stands at its public start from the first round to the last, at every client; None for nothing.
        common: what all clients hold alike before the sum; None for all factors.
    """

    learned: Learned
    summed: Learned
    constant: Learned | None = None
    common: Learned | None = None


def turn_of(sharing: Shared, number: int) -> Turn:
    """What is learnt and summed in this round, counted from 0."""
    match sharing:
        case "frozen-a":
            return Turn("B", "B", constant="A")
        case "share-a":  # B starts at zero and gives A no gradient before it has moved, so both learn at once.
            return Turn("both", "A", common="A")
        case "core":
            return Turn("core", "core", constant="both")
        case "naive":
            return Turn("both", "both")
        case "prefix":
            return Turn("prefix", "prefix")
    return Turn("B", "B") if number % 2 == 0 else Turn("A", "A")  # B first, for the same reason.


def turn_in(job: Job, number: int) -> Turn:
    """The same for a job: who hands its adapters over by itself may move both factors at once, and the sum is exact."""
    if job.mode.mode == "sequential" and job.adapters.shared == "alternating":
        return Turn("both", "both")
    return turn_of(job.adapters.shared, number)


def learns_in(job: Job, name: str, number: int) -> bool:
    """Whether a client learns in this round: each in its turn by name in mode ``sequential``, everybody in every other."""
    if job.mode.mode != "sequential":
        return True
    names = sorted(job.sums.roster)
    return names[number % len(names)] == name


def to_share(moved: Floats, client: Client, number: int) -> Floats:
    """What of a plain update goes to the gate: the update itself, under ``naive`` with a sketch of its products."""
    if client.job.adapters.sharing != "naive":
        return moved
    seed, bound = _public(client.job)
    return sketched(moved, _joined(client.layouts("both")), seed=seed, number=number, bound=bound)


def what_was_shared(
    start: npt.NDArray[np.float32], mean: Floats, client: Client, number: int
) -> tuple[Floats, Residual | None]:
    """The mean of what :func:`to_share` gave at every client, without a sketch; and what averaging got wrong, if it may."""
    if client.job.adapters.sharing != "naive":
        return mean, None
    seed, bound = _public(client.job)
    layout = _joined(client.layouts("both"))
    return unsketched(start.astype(np.float64), mean, layout, seed=seed, number=number, bound=bound)


def frozen_digest(client: Client, number: int, factor: Learned) -> str:
    """See :meth:`securesplit.client.client.Client.frozen_digest`."""
    adapters, turn = client.job.adapters, turn_in(client.job, number)
    # The whole job: a server that gave each client its own learning rate could silence all but one.
    start = f"{number}|{factor}|{adapters.shared}|{adapters.seed}|{client.policy.digest}|{client.job.digest}"
    digest = hashlib.sha256(start.encode())
    for layout in (*client.layouts(factor), *client.layouts()):
        digest.update(layout.digest.encode())
    plan = client.gate.plan
    if client.regime != "frozen" or (
        plan is not None and plan.update is not None
    ):  # All of it follows from noised sums.
        _take_values(digest, client.summed, turn.common)
    elif turn.constant is not None:
        _take_values(digest, _common(client), turn.constant)
    return digest.hexdigest()


def alike_digest(client: Client, number: int, factor: Learned, heard: bytes) -> bytes:
    """See :meth:`securesplit.client.client.Client.alike_digest`."""
    sharing = client.job.adapters.shared
    common = turn_in(client.job, number).common
    digest = hashlib.sha256(f"securesplit.alike.v1|{number}|{factor}|{sharing}|".encode())
    for layout in client.layouts(factor):
        digest.update(layout.digest.encode())
    _take_values(digest, _common(client), common)
    digest.update(heard)
    return digest.digest()


def _common(client: Client) -> tuple[Part, ...]:
    """The parts that all clients hold alike."""
    return tuple(part for part in (client.front, client.back) if part.role not in client.job.mode.personal)


def _take_values(digest: Any, parts: Sequence[Part], factor: Learned | None) -> None:
    for part in parts:
        layout = adapter_layout(part, factor)
        digest.update(layout.digest.encode() + read_adapters(part, layout).astype("<f4").tobytes())


def _public(job: Job) -> tuple[int, float]:
    return job.adapters.seed, job.sums.clip


def _joined(layouts: Sequence[Layout]) -> Layout:
    return Layout(tuple(tensor for layout in layouts for tensor in layout.tensors))
