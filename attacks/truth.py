"""The truth of a recording, which only the scorer opens: what the clients' sequences really were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attacks.view import Key
from securesplit.errors import InputError

_HINT = "Name the truth.jsonl that the clients of the recorded run wrote."
_MAX_FAULTS = 20


class Truth(BaseModel):
    """One released sequence as its client knows it.

    Attributes:
        peer, step, row: where it stood in the traffic, as in :class:`attacks.view.Key`.
        tokens: its ids without padding.
        text: the record it was made from.
        pii: pieces of the text that identify somebody.
        label: name of the record's class, or of a sensitive property, as its source says; None where it says none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)
    peer: Annotated[str, Field(min_length=1)]
    step: Annotated[int, Field(ge=0)]
    row: Annotated[int, Field(ge=0)]
    tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    text: str
    pii: tuple[str, ...] = ()
    label: str | None = None

    @property
    def key(self) -> Key:
        """Where it stood in the traffic."""
        return Key(peer=self.peer, step=self.step, row=self.row)


def read_truth(path: Path) -> tuple[Truth, ...]:
    """Read ``truth.jsonl``, in its order. A sequence that was resent is listed once.

    Raises:
        InputError: SS-1701 when it cannot be read, holds nothing, breaks its schema, or says two things of one sequence.
            Messages name lines, never what stands there.
    """
    hint = _HINT
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("SS-1701", f"cannot read the truth {path}: {type(error).__name__}", hint=hint) from None
    found: dict[Key, Truth] = {}
    faults = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            truth = Truth.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            faults.append(f"line {number}: {where}: {first['type']}")
            continue
        if found.setdefault(truth.key, truth).tokens != truth.tokens:
            faults.append(f"line {number}: contradicts an earlier line on the same sequence")
    if faults:
        raise InputError(
            "SS-1701", f"{path} has {len(faults)} fault(s)", hint=hint, details=tuple(faults[:_MAX_FAULTS])
        )
    if not found:
        raise InputError("SS-1701", f"{path} holds no truth", hint=hint)
    return tuple(found.values())


def require_fitting(truths: Sequence[Truth], lengths: Mapping[Key, int], vocabulary: int) -> None:
    """Refuse truth that cannot be of this recording and this model.

    Args:
        truths: all that is known; of sequences that the recording lacks nothing is asked.
        lengths: rows of every sequence that was recorded, padding and all.
        vocabulary: V, how many tokens the model knows.

    Raises:
        InputError: SS-1701 for a token outside of the vocabulary, or a sequence longer than its rows.
    """
    faults = []
    for truth in truths:
        if truth.key not in lengths:
            continue
        where = f"step {truth.step}, row {truth.row}"
        if max(truth.tokens) >= vocabulary:
            faults.append(f"{where}: a token outside of the vocabulary")
        elif len(truth.tokens) > lengths[truth.key]:
            faults.append(f"{where}: more tokens than rows")
    if faults:
        raise InputError(
            "SS-1701", f"{len(faults)} sequence(s) of the truth do not fit the recording and the model", hint=_HINT,
            details=tuple(faults[:_MAX_FAULTS]),
        )  # fmt: skip
