"""How well a model does on each held-out record: ``held-out.jsonl``. With it two runs can be compared record by record.

A record is named by its place in the data file, never by its text. How many nats it takes is private all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from securesplit.errors import InputError
from securesplit.pki.files import write_atomically

__all__ = ["HELD_OUT", "RecordLoss", "read_losses", "write_losses"]

HELD_OUT = "held-out.jsonl"


class RecordLoss(BaseModel):
    """One held-out record under a model.

    Attributes:
        source: its place among the records of the data, from 0.
        nats: negative log-likelihood of its predicted tokens, all together; None where that was no finite number.
        tokens: how many these are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    source: Annotated[int, Field(ge=0, lt=1 << 63)]
    nats: Annotated[float, Field(ge=0)] | None
    tokens: Annotated[int, Field(ge=0, lt=1 << 31)]


def write_losses(folder: Path, losses: Sequence[RecordLoss]) -> None:
    """Write the file of a run, whole or not at all, readable by its owner alone."""
    lines = "".join(loss.model_dump_json() + "\n" for loss in losses)
    write_atomically(folder / HELD_OUT, lines.encode(), mode=0o600)


def read_losses(folder: Path) -> tuple[RecordLoss, ...]:
    """The file of a run.

    Raises:
        InputError: SS-1284 when there is none, or with one detail for each line that is none.
    """
    path = folder / HELD_OUT
    try:
        if path.exists() and not path.is_file():  # Reading a pipe would never end.
            raise OSError
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(
            "SS-1284", f"{path} cannot be read: {type(error).__name__}",
            hint="Name the --out folder of a finished `securesplit train` of this version.",
        ) from None  # fmt: skip
    found: list[RecordLoss] = []
    faults: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(RecordLoss.model_validate_json(line))
        except ValidationError as error:
            faults.append(f"line {number}: {error.error_count()} fault(s)")
    if faults or not found:
        raise InputError(
            "SS-1284", f"{path} is not what a run wrote: {len(faults)} fault(s) in {len(lines)} line(s)",
            hint="Train again; the file was altered.", details=tuple(faults[:20]),
        )  # fmt: skip
    return tuple(sorted(found, key=lambda loss: loss.source))
