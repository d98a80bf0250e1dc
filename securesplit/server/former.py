"""B's adapters as they were: states that clients' checkpoints name, on disk, a bounded number for each client.

    former/index.json  former/NAME.safetensors

A state's name is the SHA-256 of its values, so equal states lie here once, whoever asked, and one that was changed on the
disk is found out when it is read. Each client has slots, and a state that comes into a slot takes the place of the one before; what
no slot holds is deleted. Besides there is, for each client, the state of B at the end of the last secure sum: it is taken before
anybody hears of the end, so that all clients' checkpoints of a round name the same B, whoever steps first afterwards.

Only values that B computes with are kept; no optimiser, so nothing learns on from here. What this does not do: prove to
anybody that B computed with a state of this name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from securesplit.errors import InputError
from securesplit.kept.frames import damaged
from securesplit.pki.files import write_atomically

__all__ = ["FormerStates", "Values", "name_of"]

Values = tuple[torch.Tensor, ...]
"""Of B's adapters, in the order of :attr:`securesplit.server.learner.Learner.parameters`."""

_log = logging.getLogger(__name__)
_LOADED = 2
_NOBODY = ""
"""In the place of a client's name: states whose index was damaged."""
_NAME = re.compile(r"[0-9a-f]{64}")


class _Index(BaseModel):
    """Which state is in which slot of which client, and each client's at the end of the last sum; names in hex."""

    model_config = ConfigDict(extra="forbid")
    format: int = Field(default=1, ge=1, le=1)
    slots: dict[str, dict[int, str]] = {}
    ended: dict[str, str] = {}

    @property
    def names(self) -> set[str]:
        return {name for held in self.slots.values() for name in held.values()} | set(self.ended.values())


def name_of(values: Values) -> bytes:
    """SHA-256 over shapes and values, 32 bytes."""
    digest = hashlib.sha256(b"securesplit.former.v1|")
    for value in values:
        digest.update(json.dumps(list(value.shape)).encode() + b"|" + value.numpy().astype("<f4").tobytes())
    return digest.digest()


class FormerStates:
    """See the module. One thread calls it.

    Args:
        path: a folder that this alone uses, made when the first state is kept; None keeps them in memory, which a restart
            forgets.

    Raises:
        InputError: SS-1292 when the folder's index cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._index = _Index()
        self._memory: OrderedDict[str, Values] = OrderedDict()  # All of them without a path; else the last ones used.
        if path is not None and path.is_dir():
            self._index = _read(path / "index.json")
            self._sweep()

    def keep(self, client: str, slot: int, values: Values) -> bytes:
        """Put a state into a client's slot, durably where there is a path.

        Args:
            client, slot: whose, and where; what was there is let go.
            values: copies on the CPU, float32.

        Returns:
            Its name.

        Raises:
            OSError: the disk does not take it; then the slot holds what it held.
        """
        name = name_of(values)
        self._turn({name.hex(): values}, self._in_slot(client, slot, name.hex()))
        return name

    def ended(self, states: Mapping[str, Values]) -> None:
        """A secure sum has ended: B as each client computes with it now, for :meth:`keep_ended`.

        Args:
            states: by client's name; clients with one copy of B have the very same object.

        Raises:
            OSError: as :meth:`keep`; no state of the last end is known then.
        """
        named = {id(values): name_of(values).hex() for values in states.values()}
        found = {named[id(values)]: values for values in states.values()}
        self._index.ended = {}  # A mark must never get the end of an earlier sum.
        ended = {client: named[id(values)] for client, values in states.items()}
        self._turn(found, _Index(slots=self._index.slots, ended=ended))

    def keep_ended(self, client: str, slot: int) -> bytes:
        """As :meth:`keep`, of B at the end of the last sum; empty when there has been none."""
        name = self._index.ended.get(client, "")
        if name:
            self._turn({}, self._in_slot(client, slot, name))
        return bytes.fromhex(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all states that are kept, in hex."""
        return tuple(sorted(self._index.names))

    def find(self, name: bytes) -> Values | None:
        """A state; None when it is kept no more, or is damaged."""
        key = name.hex()
        if key not in self._index.names:
            return None
        if key not in self._memory:
            values = None if self._path is None else _loaded(self._file(key), name)
            if values is None:
                return None
            self._memory[key] = values
        self._memory.move_to_end(key)
        values = self._memory[key]
        self._forget()
        return values

    def _in_slot(self, client: str, slot: int, name: str) -> _Index:
        slots = {**self._index.slots, client: {**self._index.slots.get(client, {}), slot: name}}
        return _Index(slots=slots, ended=self._index.ended)

    def _turn(self, states: Mapping[str, Values], index: _Index) -> None:
        """States first, then the index, then what is let go: a crash leaves at most a file that nobody names."""
        if self._path is None:
            self._memory |= states
        elif states or index != self._index:
            try:
                self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
                for name, values in states.items():
                    if not self._file(name).exists() or _loaded(self._file(name), bytes.fromhex(name)) is None:
                        data = save({f"{i}": value.contiguous() for i, value in enumerate(values)}, None)
                        write_atomically(self._file(name), data, mode=0o600)
                write_atomically(self._path / "index.json", index.model_dump_json().encode(), mode=0o600)
            except InputError as error:
                raise OSError(error.code) from None
        self._index = index
        self._sweep()

    def _sweep(self) -> None:
        names = self._index.names
        for key in [key for key in self._memory if key not in names]:
            del self._memory[key]
        self._forget()
        if self._path is not None:
            for file in (*self._path.glob("*.safetensors"), *self._path.glob(".*.tmp")):
                if file.stem not in names:
                    with suppress(OSError):
                        file.unlink()

    def _forget(self) -> None:
        """What lies on disk need not all be in memory."""
        while self._path is not None and len(self._memory) > _LOADED:
            self._memory.popitem(last=False)

    def _file(self, name: str) -> Path:
        assert self._path is not None
        return self._path / f"{name}.safetensors"


def _read(path: Path) -> _Index:
    try:
        return _Index.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _Index()
    except OSError:
        raise damaged(path) from None
    except ValidationError:
        # The learning does not hang on it: checkpoints that name a lost state are told so.
        _log.warning("%s is not the index of former states that a server keeps; it begins anew", path)
        # A state is known by its contents; whose it was is lost, so nothing takes its place.
        left = sorted(file.stem for file in path.parent.glob("*.safetensors") if _NAME.fullmatch(file.stem))
        return _Index(slots={_NOBODY: dict(enumerate(left))} if left else {})


def _loaded(path: Path, name: bytes) -> Values | None:
    try:
        found = load(path.read_bytes())
        values = tuple(found[f"{i}"] for i in range(len(found)))
    except (OSError, SafetensorError, KeyError):
        _log.warning("%s is no state of B's adapters", path)
        return None
    if any(value.dtype != torch.float32 for value in values) or name_of(values) != name:
        _log.warning("%s holds another state than its name says", path)
        return None
    return values
