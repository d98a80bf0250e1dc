"""Learning steps, each done once: the server as a deterministic machine, its journal, and what each client was answered last.

What changes B's adapters, or prepares to, passes through :meth:`Steps.apply` one by one: compute, write request and digest of
the answer to the journal, answer. So after a crash the last snapshot and the journal give the very same state again, the
graph that waits for a gradient included, and a request that is sent once more gets the answer that it got.

What this does not give: the same bits on another kind of machine, or with another number of threads; that is noticed
(SS-1295). Secure sums have a memory of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import msgpack
import numpy as np
import torch

from securesplit.errors import InputError, RemoteProtocolError
from securesplit.kept.folder import Kept, Snapshot
from securesplit.model.descent import NamedTensor
from securesplit.privacy.released import Codec
from securesplit.protocol.codec import Caps, decode, encode
from securesplit.protocol.messages import Backward, Forward, Gradient, Hidden, Message
from securesplit.server.engine import Engine
from securesplit.transport.tensors import blob_of, tensor_of

__all__ = ["Done", "Steps", "Waiting"]

_ANY = Caps(message_bytes=1 << 40)
_ENGINE, _SAID = "engine.", "said."
_WHAT = ("forward", "hidden", "backward", "gradient")
EVERY = 32
"""Learning steps between snapshots."""
_MOST = 8
"""Frames in a journal, in units of those."""


@dataclass(frozen=True, slots=True)
class Done:
    """An answer.

    Attributes:
        reply: to send.
        again: whether it is that of an earlier, equal request.
    """

    reply: Message
    again: bool = False


@dataclass(frozen=True, slots=True)
class Waiting:
    """A client whose forward has no backward yet."""

    client: str
    run: bytes


@dataclass(frozen=True, slots=True)
class _Said:
    """A client's last learning step: requests and answers, as messages' bytes; empty where there was none."""

    run: bytes
    step: int
    forward: bytes
    hidden: bytes
    backward: bytes = b""
    gradient: bytes = b""


class Steps:
    """All learning of one server. One thread calls it.

    Args:
        engine: gives B.
        codec: the job's.
        kept: the state folder; its snapshot and journal are taken in at once. None for a server that begins anew each time.
        every: learning steps between snapshots.

    Attributes:
        taken: learning steps since the job began.

    Raises:
        InputError: SS-1295 when this machine computes something else than the journal says, SS-1250, SS-1292.
    """

    def __init__(
        self, engine: Callable[[], Engine], codec: Codec, kept: Kept | None = None, *, every: int = EVERY
    ) -> None:
        self._engine, self._codec, self._kept, self._every = engine, codec, kept, every
        self._said: dict[str, _Said] = {}
        self._open: dict[str, bytes] = {}  # The frame of each client's forward that waits for its backward.
        self._frames = 0  # In the journal.
        self.taken = 0
        self._snapped = 0
        if kept is not None:
            if kept.snapshot is not None:
                self._restore(kept.snapshot)
            self._snapped = self.taken
            for frame in kept.frames:
                self._replay(frame)

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        """Whose gradients are due, of the runs that outlive a connection."""
        due = self._engine().waiting
        return tuple(
            Waiting(client, said.run) for client, said in self._said.items() if not said.backward and client in due
        )

    def apply(self, client: str, run: bytes, message: Forward | Backward) -> Done:
        """Do a learning step's half, or find that it was done.

        Args:
            client: its certificate name.
            run: the client's; empty for one that ends with its connection, whose requests are always computed.
            message: a ``Forward`` that learns, or a ``Backward``.

        Raises:
            RemoteProtocolError: SS-4014 a gradient that nothing waits for, SS-4022 a number again with other contents,
                SS-4055 a number that fell.
            CheckFailed: SS-1589 when the journal cannot be written; nothing more is learnt then.
        """
        data = encode(message)
        if run and (known := self._known(client, run, message.step, data)) is not None:
            return Done(decode(known, _ANY), again=True)
        try:
            reply = self._compute(client, message)
        except Exception:
            self._log(client, run, data, b"")  # It may have taken the graph away, and must do so when it is replayed.
            raise
        answer = encode(reply)
        self._log(client, run, data, answer)
        self._note(client, run, message, data, answer)
        self._snap()
        return Done(reply)

    def forget(self, client: str) -> None:
        """The client will not come back for its step: nothing waits for its gradient any more."""
        said = self._said.get(client)
        if client not in self._engine().waiting and (said is None or said.backward):
            return
        self._log(client, b"", b"", b"")
        self._drop(client)

    def commit(self) -> None:
        """Keep a snapshot now. A forward that waits for its backward begins the new journal.

        Raises:
            CheckFailed: SS-1589.
        """
        if self._kept is None:
            return
        tensors = [NamedTensor(_ENGINE + piece.name, piece.value) for piece in self._engine().state()]
        clients = sorted(name for name, said in self._said.items() if said.backward)
        for i, name in enumerate(clients):
            said = self._said[name]
            tensors += [NamedTensor(f"{_SAID}{i}.{what}", _as_tensor(getattr(said, what))) for what in _WHAT]
        runs = [{"client": name, "run": self._said[name].run.hex(), "step": self._said[name].step} for name in clients]
        self._kept.commit(json.dumps({"taken": self.taken, "clients": runs}), tensors)
        self._snapped, self._frames = self.taken, 0
        # After a crash just here the client says its forward again, and it is computed again from the same adapters.
        for client in sorted(self._engine().waiting & self._open.keys()):
            self._append(self._open[client])

    def _known(self, client: str, run: bytes, step: int, data: bytes) -> bytes | None:
        said = self._said.get(client)
        if said is None or said.run != run or step > said.step:
            return None
        for request, answer in ((said.forward, said.hidden), (said.backward, said.gradient)):
            if request == data:
                return answer
        if step < said.step:
            raise RemoteProtocolError("SS-4055", "a learning step's number is below that of the last one of its run")
        if data[3] == Forward.KIND or said.backward:
            raise RemoteProtocolError("SS-4022", "a step number came again with other contents")
        return None

    def _compute(self, client: str, message: Forward | Backward) -> Message:
        engine = self._engine()
        if isinstance(message, Forward):
            output = engine.forward(
                client, message.step, message.lengths, tensor_of(message.hidden), gain=message.gain, learn=True
            )
            return Hidden(step=message.step, hidden=blob_of(output, self._codec))
        gradient = engine.backward(client, message.step, tensor_of(message.gradient))
        return Gradient(step=message.step, gradient=blob_of(gradient, self._codec))

    def _note(self, client: str, run: bytes, message: Message, data: bytes, answer: bytes) -> None:
        if isinstance(message, Backward):
            self.taken += 1
        if not run:
            self._said.pop(client, None)  # Whatever ran before is over: another graph is in its place.
        elif isinstance(message, Forward):
            self._said[client] = _Said(run, message.step, data, answer)
        elif client in self._said:
            self._said[client] = replace(self._said[client], backward=data, gradient=answer)

    def _drop(self, client: str) -> None:
        self._engine().give_up(client)
        self._open.pop(client, None)
        if client in self._said and not self._said[client].backward:
            del self._said[client]

    def _log(self, client: str, run: bytes, data: bytes, answer: bytes) -> None:
        if self._kept is not None:
            digest = hashlib.sha256(answer).digest() if answer else b""
            frame = msgpack.packb([client, run, data, digest], use_bin_type=True)
            self._append(frame)
            self._remember(client, data, frame)

    def _append(self, frame: bytes) -> None:
        assert self._kept is not None
        self._kept.append(frame)
        self._frames += 1

    def _remember(self, client: str, data: bytes, frame: bytes) -> None:
        """Whose forward is under way, as a frame; a backward ends it, whether or not it was good."""
        if data and data[3] == Forward.KIND:
            self._open[client] = frame
        else:
            self._open.pop(client, None)

    def _snap(self) -> None:
        """Between two steps; or, where forwards come without backwards, before they fill the disk."""
        idle = not self._engine().waiting
        if (idle and self.taken - self._snapped >= self._every) or self._frames >= _MOST * self._every:
            self.commit()

    def _replay(self, frame: bytes) -> None:
        self._frames += 1
        client, run, data, digest = msgpack.unpackb(frame, raw=False, max_bin_len=1 << 31)
        if not data:
            self._drop(client)
            return
        message = decode(data, _ANY)
        assert isinstance(message, Forward | Backward)
        self._remember(client, data, frame)
        if not digest:
            with suppress(Exception):  # As it did then.
                self._compute(client, message)
            return
        answer = encode(self._compute(client, message))
        if hashlib.sha256(answer).digest() != digest:
            raise InputError(
                "SS-1295",
                "this machine computes other bits than the one that kept the state",
                hint="Go on with the same kind of machine, the same versions and the same --threads.",
            )
        self._note(client, run, message, data, answer)

    def _restore(self, snapshot: Snapshot) -> None:
        note = json.loads(snapshot.note)
        found = {piece.name: piece.value for piece in snapshot.tensors}
        self._engine().restore(
            [NamedTensor(n.removeprefix(_ENGINE), v) for n, v in found.items() if n.startswith(_ENGINE)]
        )
        self.taken = int(note["taken"])
        for i, known in enumerate(note["clients"]):
            parts = [_as_bytes(found[f"{_SAID}{i}.{what}"]) for what in _WHAT]
            self._said[str(known["client"])] = _Said(bytes.fromhex(known["run"]), int(known["step"]), *parts)


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
