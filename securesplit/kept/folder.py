"""A folder from which an interrupted run goes on: a snapshot, and a journal of what happened since.

    lock  manifest.json  snapshot-N.safetensors  journal-N

``manifest.json`` is replaced in one step and decides which N counts: a crash meets the old snapshot with its whole journal, or
the new one with an empty journal, and nothing between. It holds the SHA-256 of its note and the snapshot, and the job, model and policy by
their digests, so that a run never goes on from another one's state.

What lies here is as private as the run itself (adapters, and at a client what B answered), and never a key or a ledger.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from securesplit.errors import InputError, SecureSplitError
from securesplit.kept.frames import EMPTY, Frames, damaged, unwritable
from securesplit.model.descent import NamedTensor
from securesplit.pki.files import write_atomically

__all__ = ["Facts", "Kept", "Snapshot"]

_MOST = 1 << 26


class Facts(BaseModel):
    """What a run is; all of it must be the same for the run to go on.

    Attributes:
        party: ``server``, or the client's name.
        job, model, policy: digests.
        data: digest of what a client trains on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    party: str
    job: str
    model: str
    policy: str
    data: str = ""


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    format: Literal["securesplit.kept.v1"] = "securesplit.kept.v1"
    facts: Facts
    number: Annotated[int, Field(ge=0)] = 0
    sha256: str = ""
    note: Annotated[str, Field(max_length=_MOST)] = ""
    finished: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Everything at one moment.

    Attributes:
        note: what is no tensor, as its owner wrote it.
        tensors: the rest.
    """

    note: str
    tensors: tuple[NamedTensor, ...] = field(repr=False)


class Kept:
    """The folder, held by this process alone.

    Attributes:
        path: of the folder.
        finished: whether the run ended; then nothing but a note is left.
        snapshot: the last one; None before the first.
        frames: what was written to the journal after it, up to the opening.
    """

    def __init__(self, path: Path, lock: int, manifest: _Manifest, snapshot: Snapshot | None) -> None:
        self.path = path
        self.finished = manifest.finished
        self.snapshot = snapshot
        self._lock = lock
        self._manifest = manifest
        self._journal = Frames(self._name("journal", manifest.number))
        self.frames = self._journal.found

    @classmethod
    def open(cls, path: Path, facts: Facts) -> Self:
        """Take the folder; it is made, mode 0700, when absent.

        Raises:
            InputError: SS-1291 another run's, SS-1292 damaged, SS-1293 in use. CheckFailed: SS-1589.
        """
        lock = _locked(path)
        try:
            manifest = _read(path)
            if manifest is None:
                manifest = _Manifest(facts=facts)
                # A manifest never stands without its journal, so one that is missing was taken away.
                Frames(path / f"journal-{manifest.number}").close()
                _write(path, manifest)
            _require_same(path, manifest.facts, facts)
            if not _begun(journal := path / f"journal-{manifest.number}"):
                raise damaged(journal)
            found = _loaded(path, manifest)
            _sweep(path, manifest.number)
            return cls(path, lock, manifest, found)
        except BaseException:
            os.close(lock)
            raise

    @staticmethod
    def finished_at(path: Path) -> bool | None:
        """Whether the run of a folder is over; None where there is none. The folder is only looked at.

        Raises:
            InputError: SS-1292. CheckFailed: SS-1589.
        """
        manifest = _read(path)
        return None if manifest is None else manifest.finished

    def append(self, frame: bytes, *, durable: bool = True) -> None:
        """Write to the journal; see :meth:`Frames.append`."""
        self._journal.append(frame, durable=durable)

    def commit(self, note: str, tensors: Sequence[NamedTensor]) -> None:
        """Replace snapshot and journal by a new snapshot and an empty journal, in one step.

        Raises:
            CheckFailed: SS-1589; the old ones stand, or the new ones, and then nothing is appended before the next opening.
        """
        number = self._manifest.number + 1
        data = save({piece.name: piece.value.contiguous() for piece in tensors}, None)
        manifest = self._manifest.model_copy(update={"number": number, "sha256": _digest(note, data), "note": note})
        self._turn(manifest, lambda: write_atomically(self._snapshot_path(number), data, mode=0o600))

    def finish(self, note: str) -> None:
        """The run is over: leave the note and nothing else.

        Raises:
            CheckFailed: SS-1589.
        """
        number = self._manifest.number + 1
        manifest = self._manifest.model_copy(update={"number": number, "sha256": "", "note": note, "finished": True})
        self._turn(manifest, lambda: None)
        self.finished = True
        for entry in self.path.iterdir():
            if entry.name not in {"lock", "manifest.json", f"journal-{number}"}:
                with suppress(OSError):
                    entry.unlink()

    @property
    def note(self) -> str:
        """What the last snapshot, or the end, said."""
        return self._manifest.note

    def close(self) -> None:
        """Let the folder go; twice is once."""
        self._journal.close()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def _turn(self, manifest: _Manifest, prepare: Callable[[], None]) -> None:
        fresh = None
        try:
            prepare()
            fresh = Frames(self._name("journal", manifest.number))
            _write(self.path, manifest)
        except SecureSplitError as error:
            if fresh is not None:
                fresh.close()
                # The new manifest may be there, and only its folder not synced: the old journal would be forgotten.
                self._journal.close()
            raise unwritable(self.path, OSError(error.code)) from None
        self._journal.close()
        self._journal, self._manifest = fresh, manifest
        _sweep(self.path, manifest.number)

    def _snapshot_path(self, number: int) -> Path:
        return self._name("snapshot", number).with_suffix(".safetensors")

    def _name(self, what: str, number: int) -> Path:
        return self.path / f"{what}-{number}"


def _locked(path: Path) -> int:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise InputError(
            "SS-1293",
            f"another process uses {path}",
            hint="One run has one folder; wait for the other or name another.",
        ) from None
    return lock


def _read(path: Path) -> _Manifest | None:
    try:
        text = (path / "manifest.json").read_bytes()
    except FileNotFoundError:
        # A crash before the first one leaves an empty journal. Anything else had a manifest, and is no new beginning.
        if any(path.glob("snapshot-*")) or any(_begun(journal, beyond=True) for journal in path.glob("journal-*")):
            raise damaged(path / "manifest.json") from None
        return None
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        return _Manifest.model_validate_json(text)
    except ValidationError:
        raise damaged(path / "manifest.json") from None


def _begun(journal: Path, *, beyond: bool = False) -> bool:
    """Whether a journal is there, with its first line; or with something beyond that."""
    with suppress(OSError):
        return journal.stat().st_size >= EMPTY + beyond
    return False


def _write(path: Path, manifest: _Manifest) -> None:
    write_atomically(path / "manifest.json", manifest.model_dump_json(indent=1).encode(), mode=0o600)


def _require_same(path: Path, there: Facts, here: Facts) -> None:
    differ = [name for name in Facts.model_fields if getattr(there, name) != getattr(here, name)]
    if differ:
        raise InputError(
            "SS-1291",
            f"{path} holds the state of another run: its {', '.join(differ)} differ",
            hint="Start with what it began with, or name another folder.",
        )


def _loaded(path: Path, manifest: _Manifest) -> Snapshot | None:
    if not manifest.sha256:
        return None
    place = path / f"snapshot-{manifest.number}.safetensors"
    try:
        data = place.read_bytes()
    except OSError:
        raise damaged(place) from None
    if _digest(manifest.note, data) != manifest.sha256:
        raise damaged(place)
    try:
        found = load(data)
    except SafetensorError:
        raise damaged(place) from None
    return Snapshot(manifest.note, tuple(NamedTensor(name, value) for name, value in found.items()))


def _digest(note: str, data: bytes) -> str:
    """Of both, so that a bit that turned in either is found."""
    said = note.encode()
    return hashlib.sha256(len(said).to_bytes(8, "little") + said + data).hexdigest()


def _sweep(path: Path, number: int) -> None:
    """Take away what an older snapshot, or a crash, has left."""
    keep = {f"snapshot-{number}.safetensors", f"journal-{number}"}
    for entry in path.iterdir():
        mine = entry.name.startswith(("snapshot-", "journal-")) or entry.name.endswith(".tmp")
        if mine and entry.name not in keep:
            with suppress(OSError):
                entry.unlink()
