"""A split that the ``datasets`` package wrote with ``save_to_disk``: a ``state.json`` that names Arrow files.

They are read by pyarrow, an optional extra. The package itself is not needed: it brings a pickler and a network client
along, and this reads three files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from securesplit.data.tasks.faults import Faults
from securesplit.data.tasks.located import Located, whole_text
from securesplit.data.tasks.source import Many
from securesplit.errors import InputError

__all__ = ["saved_rows"]

_MAX_BYTES = 1 << 32


class Shard(BaseModel):
    """One Arrow file, beside the state."""

    model_config = ConfigDict(frozen=True, strict=True)
    filename: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\.arrow$", max_length=200)]


class State(BaseModel):
    """``state.json``, of which this alone matters."""

    model_config = ConfigDict(frozen=True, strict=True)
    data_files: Annotated[Many[Shard], Field(alias="_data_files", min_length=1)]


def saved_rows(folder: Path, faults: Faults) -> Iterator[Located]:
    """The rows, from 1, without columns that hold nothing there.

    Raises:
        InputError: SS-1243 when pyarrow is not installed.
    """
    if (folder / "dataset_dict.json").is_file():
        faults.add(folder, None, "holds several splits: name the folder of one")
        return
    state = folder / "state.json"
    if not state.is_file():
        faults.add(folder, None, "is no data set that save_to_disk wrote: it has no state.json")
        return
    try:
        shards = State.model_validate(json.loads(whole_text(state, faults) or "")).data_files
    except (ValidationError, ValueError, RecursionError):
        faults.add(state, None, "does not name the Arrow files of a data set")
        return
    number = 0
    for shard in shards:
        for row in _rows(folder / shard.filename, faults):
            number += 1
            yield Located(number, {name: value for name, value in row.items() if value is not None})


def _rows(path: Path, faults: Faults) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
    except ImportError:
        raise InputError(
            "SS-1243", f"{path.parent} is a saved data set, and reading it needs pyarrow",
            hint="Install it with `pip install 'securesplit[datasets]'`, or give a .jsonl or .csv file.",
        ) from None  # fmt: skip
    try:
        if path.stat().st_size > _MAX_BYTES:
            faults.add(path, None, f"is over {_MAX_BYTES} bytes")
            return
        with path.open("rb") as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                batch.validate(full=True)
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        faults.add(path, None, f"cannot be read as Arrow: {type(error).__name__}")
