"""The job: everything that both ends must agree on, owned by the server, sent in Welcome, admitted or refused by clients.

No privacy parameter stands here; a server has no say in them.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from securesplit.errors import InputError, RemoteProtocolError
from securesplit.protocol.adapters import Adapters, Sharing
from securesplit.protocol.optimiser import Memory, Optimiser, Precision
from securesplit.protocol.training import Training

__all__ = [
    "Adapters", "Code", "Cut", "Job", "Memory", "Optimiser", "Precision", "Schedule", "Sharing", "Task", "Training", "load_job",
    "parse_job",
]  # fmt: skip

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_LABEL_BYTES = 1 << 15  # Of the 64 KiB that a Welcome gives its job.


class Cut(BaseModel):
    """How many decoder layers stay on the client on each end; 0 is the embedding, or norm and head, alone."""

    model_config = _STRICT
    front: Annotated[int, Field(ge=0, le=1000)]
    back: Annotated[int, Field(ge=0, le=1000)]


class Schedule(BaseModel):
    """How long.

    Attributes:
        rounds: number of secure-aggregation rounds.
        epochs: local passes over a client's records in each round.
        batch: sequences per message.
        evaluate_every: optimiser steps between measurements of the held-out loss inside a round; each is a release of all
            held-out records, and charged. Absent: before the first round and after each alone.
        patience: so many measurements in a row without a new lowest held-out loss, and this client takes no more local
            steps; it stays in the sums, with updates of zero. Each client decides for itself.
        keep_best: write the adapters that had the lowest held-out loss beside the last ones.
        checkpoints: of how many rounds each client keeps its adapters, the last ones; where B learns, the server keeps B's as
            they were then, for each client. Absent: of none but the last.
    """

    model_config = _STRICT
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    epochs: Annotated[int, Field(ge=1, le=10_000)]
    batch: Annotated[int, Field(ge=1, le=4096)]
    evaluate_every: Annotated[int | None, Field(ge=1, le=10**6)] = None
    patience: Annotated[int | None, Field(ge=1, le=10_000)] = None
    keep_best: Annotated[bool, Field(exclude_if=lambda value: value is False)] = False
    checkpoints: Annotated[int | None, Field(ge=1, le=256)] = None


class Sums(BaseModel):
    """Who takes part in the secure sums, or, in a mode without any, in the job.

    Attributes:
        roster: certificate names of all clients, in any order; three at least where there are sums.
        threshold: how many of them must agree to open a sum; more than half.
        min_clients: fewest updates in a sum.
        clip: largest absolute value of one coordinate of an update.
        blind: whether the sum is hidden from the server too.
        stage_seconds: how long the server waits for each stage of a round before it goes on without the missing ones.
        attempts: how often a round is tried that is lost with a connection, a client or the server; absent: once, and what
            is lost then ends the run.
        quorum: fewest clients that a round goes on with; absent: the larger of ``threshold`` and ``min_clients``. The size
            of the roster: sums are over everybody or not made.
        late: ``handover``: a client that was away while rounds went on gets what all hold in common from the others, sealed
            by them for it, and goes on where they are; absent: it is out of the job. Needs ``attempts``.
        reconnect_seconds: how long a client whose connection broke may take to come back; 10 when absent.
        colluders: how many clients may side with the server without another's update being opened; absent: one in five, or
            as many as the threshold allows.
        ring_bits: 32, when absent, or 64: words that a sum is made of.
        backend: ``masks``, when absent; ``bfv`` or ``ckks`` encrypt the masked words once more.
        prg: generator of the masks: ``aes256ctr``, when absent; ``chacha20`` for clients without AES instructions.
        weights: ``records``, when absent: an update counts by its number of records, at most 255; ``uniform``: each once.
    """

    model_config = _STRICT
    roster: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    threshold: Annotated[int, Field(ge=2)]
    min_clients: Annotated[int, Field(ge=3)] = 3
    clip: Annotated[float, Field(gt=0)]
    blind: bool
    stage_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    reconnect_seconds: Annotated[float | None, Field(gt=0, le=3600)] = None
    attempts: Annotated[int | None, Field(ge=2, le=1000)] = None
    quorum: Annotated[int | None, Field(ge=3, le=256)] = None
    late: Literal["handover"] | None = None
    colluders: Annotated[int | None, Field(ge=0, le=256)] = None
    ring_bits: Literal[32, 64] | None = None
    backend: Literal["masks", "bfv", "ckks"] | None = None
    prg: Literal["aes256ctr", "chacha20"] | None = None
    weights: Literal["records", "uniform"] | None = None

    @field_validator("roster")
    @classmethod
    def _once(cls, roster: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(roster)) < len(roster):
            raise ValueError("a client stands twice in the roster")
        return roster

    @property
    def patience(self) -> float:
        """How long a client whose connection broke may take to come back, in seconds."""
        return self.reconnect_seconds or 10.0

    @property
    def fewest(self) -> int:
        """The quorum: fewest clients that a round goes on with."""
        return max(self.threshold, self.min_clients, self.quorum or 0)

    @model_validator(mode="after")
    def _quorum(self) -> Sums:
        if self.quorum is not None and not max(self.threshold, self.min_clients) <= self.quorum <= len(self.roster):
            raise ValueError(
                f"quorum {self.quorum}: it must lie between {max(self.threshold, self.min_clients)}, the larger of threshold "
                f"and min_clients, and the roster of {len(self.roster)}"
            )
        return self

    @model_validator(mode="after")
    def _late(self) -> Sums:
        if self.late is not None and self.attempts is None:
            raise ValueError("late = 'handover' needs attempts: only then do the others know which rounds are over")
        return self

    @model_validator(mode="after")
    def _encryption(self) -> Sums:
        if self.backend in ("bfv", "ckks") and (not self.blind or self.ring_bits == 64):
            raise ValueError(
                f"backend {self.backend} encrypts 32-bit words and hides the sum: set blind = true, ring_bits = 32"
            )
        return self


class Code(BaseModel):
    """The public code at the cut, a file of ``securesplit model fit``; both ends have it beforehand.

    Attributes:
        digest: of the code.
        width: k, the columns of what crosses.
    """

    model_config = _STRICT
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    width: Annotated[int, Field(ge=1, lt=1 << 24)]


class Task(BaseModel):
    """Classification: every record has one of these labels, and C learns to name it behind the text.

    Attributes:
        labels: names of the classes, in the order that all clients count them in; public.
    """

    model_config = _STRICT
    labels: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=64)], ...],
        Field(min_length=2, max_length=10_000, strict=False),
    ]

    @field_validator("labels")
    @classmethod
    def _different_and_few(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) < len(labels):
            raise ValueError("two labels have one name")
        if len(json.dumps(labels)) > _LABEL_BYTES:
            raise ValueError(f"the labels take more than {_LABEL_BYTES} bytes of a job that travels in one message")
        return labels


class Job(BaseModel):
    """A whole job file. Without ``code`` hidden states cross as they are, all D columns; without ``task`` text is learnt."""

    model_config = _STRICT
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
    model: Annotated[str, Field(min_length=1, max_length=512)]
    codec: Literal["f32", "bf16", "int8"] = "f32"
    cut: Cut
    adapters: Adapters
    optimiser: Optimiser
    schedule: Schedule
    sums: Sums
    code: Code | None = None
    task: Task | None = None
    training: Training | None = None
    precision: Precision | None = None
    memory: Memory | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_sums(cls, raw: Any) -> Any:
        """Where nothing is summed a job need not say how."""
        match raw:
            case {"training": {"mode": "splitfed-v3"}, "sums": {**sums}}:
                return {**raw, "sums": {"threshold": 2, "clip": 1.0, "blind": True, **sums}}
        return raw

    @model_validator(mode="after")
    def _mode_fits(self) -> Self:
        """What the mode of training asks of the other tables, all at once."""
        mode, faults = self.mode, []
        if mode.summed and len(self.sums.roster) < 3:
            faults.append(
                "sums.roster: secure sums need three clients; mode splitfed-v3 has none, and takes any number"
            )
        if strangers := sorted({name for group in mode.groups for name in group} - set(self.sums.roster)):
            faults.append(f"training.groups: {len(strangers)} name(s) are not on the roster")
        if mode.mode == "sequential" and self.adapters.sharing in {"share-a", "naive"}:
            faults.append(
                f"adapters.sharing '{self.adapters.sharing}' is about sums of several; mode sequential hands one over"
            )
        faults += self.adapters.dora_faults(mode.personal if mode.summed else ("front", "back"))
        if not mode.summed and self.sums.late is not None:
            faults.append("sums.late is about secure sums; mode splitfed-v3 has none, so leave it out")
        if not mode.summed and self.adapters.sharing != "alternating":
            faults.append("adapters.sharing says what secure sums carry; mode splitfed-v3 has none, so leave it out")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def mode(self) -> Training:
        """The mode of training, with what it is when the job does not say."""
        return self.training or Training()

    def canonical(self) -> str:
        """The text that travels in Welcome and is hashed: JSON, sorted keys, no spaces; no key for what is absent."""
        return json.dumps(self.model_dump(mode="json", exclude_none=True), sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`canonical`, in hex."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def parse_job(text: str) -> Job:
    """The job of a Welcome.

    Raises:
        RemoteProtocolError: SS-4006 when the peer's job breaks the schema.
    """
    try:
        return Job.model_validate_json(text, strict=False)
    except ValidationError as error:
        raise RemoteProtocolError("SS-4006", f"the server's job has {error.error_count()} fault(s)") from None


def load_job(path: str | Path) -> Job:
    """Read a job file.

    Raises:
        InputError: SS-1110 when it cannot be read or is not TOML, SS-1111 with one detail per fault.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            "SS-1110", f"cannot read the job {path}: {type(error).__name__}", hint="Compare it with examples/job.toml."
        ) from None
    try:
        return Job.model_validate(raw)
    except ValidationError as error:
        details = tuple(
            f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors(include_url=False, include_input=False)
        )
        raise InputError(
            "SS-1111", f"{path} has {len(details)} fault(s)", hint="Compare it with examples/job.toml.", details=details
        ) from None
