"""Models beside each other on the same held-out records: losses and measures with intervals, differences record by record.

All intervals are percentiles of the cluster bootstrap (securesplit/measures/interval.py) with the same draws, so that the
interval of a difference is that of paired records. They say how sure the held-out records let us be, and nothing of how
another training run would come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from securesplit.data.tasks.score import Measured
from securesplit.errors import InputError
from securesplit.measures.interval import Estimate, estimate, mean
from securesplit.runs.losses import RecordLoss
from securesplit.runs.spent import Spent

__all__ = ["Compared", "Row", "compare_rows", "require_finite", "require_same_records"]


@dataclass(frozen=True, slots=True)
class Row:
    """One model, trained and judged.

    Attributes:
        name: unique in the table.
        samples: records that training steps were made of, each time anew.
        steps: training steps, all clients together.
        spent: what any record has spent at most, with what that means.
        note: what else must be known to read the row.
        losses: of every held-out record, client after client.
        curve: held-out loss before the first round and after each.
        measures: of the task, with intervals where they are known.
        seconds: of training and evaluation.
        bytes_up, bytes_down: all clients together.
    """

    name: str
    samples: int
    steps: int
    spent: Spent
    note: str
    losses: tuple[RecordLoss, ...]
    curve: tuple[float, ...]
    measures: tuple[Measured, ...]
    seconds: float
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True, slots=True)
class Compared:
    """A row with what it is worth.

    Attributes:
        row: as it was given.
        loss: nats per predicted token.
        difference: its loss less the reference's, on the same records; None for the reference itself.
    """

    row: Row
    loss: Estimate
    difference: Estimate | None


def compare_rows(rows: Sequence[Row], groups: Sequence[str], reference: int) -> tuple[Compared, ...]:
    """Judge every row, and pair each with the reference.

    Args:
        rows: over the same held-out records in the same order.
        groups: which records stand or fall together, one name each.
        reference: index of the row that the others are less or more than.

    Raises:
        InputError: SS-1284 with one detail for each row that has a loss which is no number.
    """
    require_finite(rows)
    tables = [[(r.nats or 0.0, r.tokens) for r in row.losses] for row in rows]
    found = []
    for i, (row, table) in enumerate(zip(rows, tables, strict=True)):
        loss = estimate(table, groups, mean)
        pairs = [(one, two, tokens) for (one, tokens), (two, _) in zip(table, tables[reference], strict=True)]
        found.append(Compared(row, loss, None if i == reference else estimate(pairs, groups, _less)))
    return tuple(found)


def require_same_records(
    name: str, theirs: Sequence[Sequence[RecordLoss]], ours: Sequence[Sequence[RecordLoss]]
) -> None:
    """The held-out records of a run and of this data are the same ones, as far as places and lengths tell.

    Args:
        name: of the run.
        theirs, ours: client after client.

    Raises:
        InputError: SS-1285 with one detail for each client whose records are others.
    """
    faults = []
    for number, (run, data) in enumerate(zip(theirs, ours, strict=True), 1):
        if len(run) != len(data):
            faults.append(f"client {number}: the run held out {len(run)} record(s), the data here gives {len(data)}")
        elif [(r.source, r.tokens) for r in run] != [(r.source, r.tokens) for r in data]:
            faults.append(f"client {number}: places or lengths of held-out records differ")
    if faults:
        raise InputError(
            "SS-1285", f"run {name} was evaluated on other records, so its losses cannot be compared",
            hint="Give the same --data in the order of the run's folders, and the run's --held-out, --limit, --max-tokens, "
            "--task, --template and policy.", details=tuple(faults),
        )  # fmt: skip


def require_finite(rows: Sequence[Row]) -> None:
    """Every record has a loss that is a number.

    Raises:
        InputError: SS-1284 with one detail for each row that has another.
    """
    lost = [f"{row.name}: {n} record(s)" for row in rows if (n := sum(r.nats is None for r in row.losses))]
    if lost:
        raise InputError(
            "SS-1284", f"{len(lost)} model(s) have losses that are no numbers: their training diverged",
            hint="Lower the learning rates of the job, or leave these rows out.", details=tuple(lost),
        )  # fmt: skip


def _less(sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sums of nats of one, nats of the other, tokens, (R, 3), to the difference of mean losses, (R,)."""
    found: npt.NDArray[np.float64] = (sums[:, 0] - sums[:, 1]) / sums[:, 2]
    return found
