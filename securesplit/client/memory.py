"""A client's run that a crash only interrupts: snapshots, and every answer of the server since the last one.

A run is a deterministic function of its data, its seeds, the bytes that its gate let out, and what it was answered. The data
and the seeds are there again after a crash; the bytes are in the ledger, in the commit that paid for them
(:meth:`securesplit.privacy.gate.Gate.remember`); the answers lie here. So a process that starts again restores
the snapshot, does the steps since then once more with the same bytes and answers, free of charge and without the
network, and sends the request that was on its way again, byte for byte.

What lies here is private to the site: adapters, an optimiser's moments, sums of gradients, answers. Neither keys nor the
ledger are in it, nor noise that did not leave. What it does not give: the same bits under another number of threads or
other versions; that is noticed (SS-1294).
"""

from __future__ import annotations

import hashlib
import io
import secrets
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import msgpack
import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from securesplit.client.client import Client
from securesplit.client.pace import Pace
from securesplit.client.plausible import Look
from securesplit.client.position import Begun, Position, RoundRecord
from securesplit.client.units import Added
from securesplit.data.batches import Batch
from securesplit.errors import InputError
from securesplit.kept.folder import Facts, Kept, Snapshot
from securesplit.kept.frames import damaged
from securesplit.model.descent import NamedTensor
from securesplit.model.sketch import Residual
from securesplit.pki.files import write_atomically
from securesplit.protocol.codec import Caps, decode, encode
from securesplit.protocol.messages import Backward, Forward, Gradient, Mark, Message

__all__ = ["EVERY", "Remembered", "data_digest"]

EVERY = 16
"""Local steps between snapshots."""
_ANY = Caps(message_bytes=1 << 40)
_DESCENT, _MET, _PACE = "descent.", "met.", "pace."
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Round(BaseModel):
    model_config = _STRICT
    number: int
    losses: list[float]
    survivors: list[str]
    total_weight: int
    residual: list[float] | None
    sha256: str = ""  # Of its file. Absent from runs that an earlier release began.


class _Note(BaseModel):
    """What of a position is no tensor."""

    model_config = _STRICT
    run: str
    link_step: int
    up: int
    down: int
    steps: int
    moves: int
    rate: float
    done: int
    missed: list[int] = []  # This and ``looked`` are absent from runs that an earlier release began.
    curve: list[float]
    looked: int | None = None
    rounds: list[_Round]
    heard: str
    losses: list[float]
    begun: list[str] | None
    guardian: list[float] | None
    records: list[str] | None
    met: list[str]


def data_digest(batches: Sequence[Batch]) -> str:
    """Names what a run trains and evaluates on, in its order."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(repr((tuple(batch.tokens.shape), batch.lengths, batch.records, batch.contents)).encode())
        digest.update(batch.tokens.numpy().tobytes() + batch.labels.numpy().tobytes())
    return digest.hexdigest()


class Remembered:
    """The memory of one run.

    Args:
        kept: its folder.
        every: local steps between snapshots.
    """

    def __init__(self, kept: Kept, *, every: int = EVERY) -> None:
        self._kept, self._every = kept, every
        self._answers = deque(kept.frames)
        self._client: Client | None = None
        self._since = 0
        self._sums: dict[int, str] = {}  # SHA-256 of the files of the rounds that the snapshot speaks of.

    @staticmethod
    def facts(client: Client, batches: Sequence[Batch], held_out: Sequence[Batch]) -> Facts:
        """What a run is."""
        return Facts(
            party=client.link.name, job=client.job.digest, model=client.link.model, policy=client.policy.digest,
            data=data_digest((*batches, *held_out)),
        )  # fmt: skip

    @property
    def resumes_at(self) -> int | None:
        """How many local steps had been made at the last snapshot; None for a run that begins."""
        if self._kept.snapshot is None:
            return None
        return _Note.model_validate_json(self._kept.snapshot.note).steps

    @property
    def looks(self) -> int | None:
        """How many evaluations before a round or after one had been made at the last snapshot; None for a run that begins."""
        if self._kept.snapshot is None:
            return None
        return len(_Note.model_validate_json(self._kept.snapshot.note).curve)

    @property
    def pending(self) -> Path:
        """Where a round lies that is not closed yet."""
        return self._kept.path / "round"

    @property
    def replays(self) -> bool:
        """Whether the run is still doing what it did before it was interrupted."""
        return bool(self._answers)

    def recall(self, request: Forward | Backward | Mark) -> Message | None:
        """The answer that this request got before a crash; None when it got none.

        Raises:
            InputError: SS-1294 when another request stands there.
        """
        if not self._answers:
            return None
        digest, answer = msgpack.unpackb(self._answers.popleft(), raw=False, max_bin_len=1 << 31)
        if digest != hashlib.sha256(encode(request)).digest():
            raise InputError(
                "SS-1294",
                "the run does other things than it did before it was interrupted, so it cannot go on",
                hint="Resume with the same versions, options and --threads, on the same kind of machine.",
            )
        return decode(answer, _ANY)

    def keep(self, request: Forward | Backward | Mark, answer: Message) -> None:
        """Write an answer down.

        A hidden state need not be safe from a loss of power yet: its request would be sent once more, and the server has it.

        Raises:
            CheckFailed: SS-1589.
        """
        frame = msgpack.packb([hashlib.sha256(encode(request)).digest(), encode(answer)], use_bin_type=True)
        self._kept.append(frame, durable=isinstance(answer, Gradient))

    def begin(self, client: Client, pace: Pace) -> Position:
        """Start the run, or put the client where the last snapshot was.

        Args:
            client: with fresh adapters.
            pace: with no measurement.

        Raises:
            ConnectionFailed: when the server is gone. CheckFailed: SS-1589. InputError: SS-1292.
            PolicyDenied: SS-2013, SS-2014.
        """
        self._client = client
        if self._kept.snapshot is None:
            at = Position(pace, run=secrets.token_bytes(16))
            # What the layers draw, as dropout does, is the same in a run that is started twice.
            seed = hashlib.sha256(f"securesplit.run.v1|{client.job.digest}|{client.link.name}".encode()).digest()
            torch.manual_seed(int.from_bytes(seed[:8], "little") >> 1)
            self._snap(at)
        else:
            at = self._restored(client, pace, self._kept.snapshot)
        client.link.enter(at.run)
        client.gate.remember(lambda: at.moment)
        # A frozen B answers the same bytes with the same bytes, and keeps no state: there is nothing to remember.
        client.link.memory = None if client.regime == "frozen" else self
        return at

    def pause(self, at: Position, *, now: bool) -> None:
        """Between two steps: keep a snapshot when one is due, or when it matters.

        Raises:
            CheckFailed: SS-1589.
        """
        self._since += 1
        if self._answers or not (now or self._since >= self._every):
            return
        for record in at.rounds:
            self._write_round(record)
        self._snap(at)

    def _snap(self, at: Position) -> None:
        client = self._client
        assert client is not None
        tensors = [NamedTensor(f"adapters.{i}", torch.from_numpy(v)) for i, v in enumerate(client.snapshot())]
        for part in (client.front, client.back):
            if part.scale is not None:
                tensors += [NamedTensor(f"scale.{part.role}.{piece.name}", piece.value) for piece in part.scale.state()]
        tensors += [NamedTensor(_PACE + piece.name, piece.value) for piece in at.pace.state()]
        tensors.append(NamedTensor("rng", torch.get_rng_state()))
        witness = client.remote.witness
        tensors += [
            NamedTensor("outputs", _looks(witness.outputs)),
            NamedTensor("gradients", _looks(witness.gradients)),
        ]
        if at.begun is not None:
            tensors.append(NamedTensor("start", torch.from_numpy(at.begun.start)))
            tensors += [NamedTensor(f"before.{i}", torch.from_numpy(v)) for i, v in enumerate(at.begun.before)]
        # An optimiser that goes on from round to round may not have been taken over yet since the last interruption.
        moments = at.moments if at.optimiser is None else at.optimiser.state()
        tensors += [NamedTensor(_DESCENT + piece.name, piece.value) for piece in moments]
        if at.units is not None:
            tensors.append(NamedTensor("sum", torch.from_numpy(at.units.total.steps)))
            tensors += [NamedTensor(f"{_MET}{i}", value) for i, value in enumerate(at.units.met.values())]
        self._kept.commit(_note_of(client, at, self._sums).model_dump_json(), tensors)
        self._since = 0

    def _restored(self, client: Client, pace: Pace, snapshot: Snapshot) -> Position:
        note = _Note.model_validate_json(snapshot.note)
        found = {piece.name: piece.value for piece in snapshot.tensors}
        client.install(_numbered(found, "adapters"))
        for part in (client.front, client.back):
            if part.scale is not None:
                part.scale.restore(_under(found, f"scale.{part.role}."))
        pace.restore(_under(found, _PACE))
        client.gate.restored(client.policy.digest)
        torch.set_rng_state(found["rng"])
        client.remote.witness.outputs[:] = _seen(found["outputs"])
        client.remote.witness.gradients[:] = _seen(found["gradients"])
        if client.remote.guardian is not None and note.guardian is not None:
            guardian = client.remote.guardian
            guardian.missing, guardian.allowed, guardian.steps = (
                note.guardian[0],
                note.guardian[1],
                int(note.guardian[2]),
            )
        link = client.link
        link.step, link.bytes_up, link.bytes_down = note.link_step, link.bytes_up + note.up, link.bytes_down + note.down
        link.carried = note.up, note.down
        at = Position(
            pace, run=bytes.fromhex(note.run), steps=note.steps, moves=note.moves, rate=note.rate, done=note.done, missed=list(note.missed), curve=list(note.curve), looked=len(note.curve) - 1 if note.looked is None else note.looked, heard=bytes.fromhex(note.heard),
            rounds=[self._read_round(record) for record in note.rounds], losses=list(note.losses),
            moments=_under(found, _DESCENT),
        )  # fmt: skip
        if note.begun is not None:
            frozen, alike, origin = note.begun
            at.begun = Begun(
                frozen, bytes.fromhex(alike), bytes.fromhex(origin), found["start"].numpy(), _numbered(found, "before")
            )
        if note.records is not None:
            met = {key: found[f"{_MET}{i}"] for i, key in enumerate(note.met)}
            at.added = Added(found["sum"].numpy(), tuple(note.records), met)
        return at

    def _write_round(self, record: RoundRecord) -> None:
        """Before the snapshot that names it; a file of a snapshot that was never made may hold another sum."""
        if record.number in self._sums:
            return
        packed = io.BytesIO()
        np.savez(packed, contribution=record.contribution, ring_sum=record.ring_sum)
        write_atomically(self._round_path(record.number), packed.getvalue(), mode=0o600)
        self._sums[record.number] = hashlib.sha256(packed.getvalue()).hexdigest()

    def _read_round(self, said: _Round) -> RoundRecord:
        path = self._round_path(said.number)
        try:
            data = path.read_bytes()
            if said.sha256 not in {"", hashlib.sha256(data).hexdigest()}:
                raise damaged(path)
            with np.load(io.BytesIO(data), allow_pickle=False) as kept:
                contribution, ring_sum = kept["contribution"], kept["ring_sum"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error, RuntimeError):  # Of a torn archive.
            raise damaged(path) from None
        self._sums[said.number] = hashlib.sha256(data).hexdigest()
        return RoundRecord(
            number=said.number, losses=tuple(said.losses), survivors=tuple(said.survivors), total_weight=said.total_weight,
            contribution=contribution, ring_sum=ring_sum,
            residual=None if said.residual is None else Residual(*said.residual),
        )  # fmt: skip

    def _round_path(self, number: int) -> Path:
        return self._kept.path / f"round-{number}.npz"


def _note_of(client: Client, at: Position, sums: Mapping[int, str]) -> _Note:
    guardian, link, begun, units = client.remote.guardian, client.link, at.begun, at.units
    return _Note(
        run=at.run.hex(), link_step=link.step, up=link.bytes_up, down=link.bytes_down, steps=at.steps, moves=at.moves,
        rate=at.rate, done=at.done, missed=at.missed, curve=at.curve, looked=at.looked,
        rounds=[
            _Round(
                number=r.number, losses=list(r.losses), survivors=list(r.survivors), total_weight=r.total_weight,
                residual=None if r.residual is None else [r.residual.relative, r.residual.clipped], sha256=sums[r.number],
            )
            for r in at.rounds
        ],
        heard=at.heard.hex(), losses=at.losses,
        begun=None if begun is None else [begun.frozen, begun.alike.hex(), begun.origin.hex()],
        guardian=None if guardian is None else [guardian.missing, guardian.allowed, float(guardian.steps)],
        records=None if units is None else list(units.total.records), met=[] if units is None else list(units.met),
    )  # fmt: skip


def _under(found: Mapping[str, Tensor], start: str) -> tuple[NamedTensor, ...]:
    return tuple(NamedTensor(n.removeprefix(start), v) for n, v in found.items() if n.startswith(start))


def _numbered(found: Mapping[str, Tensor], name: str) -> tuple[npt.NDArray[np.float32], ...]:
    count = sum(n.startswith(f"{name}.") for n in found)
    return tuple(found[f"{name}.{i}"].numpy() for i in range(count))


def _looks(looks: Sequence[Look]) -> Tensor:
    return torch.tensor([[seen.ratio, seen.spread, float(seen.blank)] for seen in looks], dtype=torch.float64).reshape(
        -1, 3
    )


def _seen(looks: Tensor) -> list[Look]:
    return [Look(ratio, spread, bool(blank)) for ratio, spread, blank in looks.tolist()]
