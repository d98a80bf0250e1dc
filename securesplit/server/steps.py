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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import msgpack
import numpy as np
import torch
from torch import Tensor

from securesplit.errors import InputError, RemoteProtocolError, SecureSplitError
from securesplit.kept.folder import Kept, Snapshot
from securesplit.model.descent import NamedTensor
from securesplit.privacy.released import Codec
from securesplit.protocol.codec import Caps, decode, encode
from securesplit.protocol.messages import Backward, Forward, Gradient, Hidden, Message
from securesplit.server.engine import Batch, Engine
from securesplit.server.learner import Rows
from securesplit.transport.tensors import blob_of, tensor_of

__all__ = ["Done", "Part", "Steps", "Waiting"]

_ANY = Caps(message_bytes=1 << 40)
_ENGINE, _SAID = "engine.", "said."
_STEP, _FORGOT, _MEAN = "step", "forgot", "mean"
_WHAT = ("forward", "hidden", "backward", "gradient")
EVERY = 32
"""Learning steps between snapshots."""
_MOST = 8
"""Frames in a journal, in units of those."""


@dataclass(frozen=True, slots=True)
class Done:
    """An answer.

    Attributes:
        reply: to send; None where what was computed cannot be told.
        again: whether it is that of an earlier, equal request.
        error: why it cannot be told; the step was made all the same, and nobody else's part of it hangs on that.
    """

    reply: Message | None
    again: bool = False
    error: SecureSplitError | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """A client whose forward has no backward yet."""

    client: str
    run: bytes
    message: Forward


@dataclass(frozen=True, slots=True)
class Part:
    """One client's part in a step.

    Attributes:
        client: its certificate name.
        run: the client's; empty for one that ends with its connection, whose requests are always computed.
        message: a ``Forward`` that learns, or a ``Backward``; in one step all are of one kind.
    """

    client: str
    run: bytes
    message: Forward | Backward


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
        uniform: whether clients whose steps are one, and copies in a mean, count the same, instead of by their sequences.

    Attributes:
        taken: learning steps since the job began.
        since: steps of each client since the last mean of B's copies.

    Raises:
        InputError: SS-1295 when this machine computes something else than the journal says, SS-1250, SS-1292.
    """

    def __init__(
        self,
        engine: Callable[[], Engine],
        codec: Codec,
        kept: Kept | None = None,
        *,
        every: int = EVERY,
        uniform: bool = False,
    ) -> None:
        self._engine, self._codec, self._kept, self._every, self._uniform = engine, codec, kept, every, uniform
        self._said: dict[str, _Said] = {}
        self._open: dict[str, bytes] = {}  # The frame of each client's forward that waits for its backward.
        self._sequences: dict[str, int] = {}  # Of each client's forward that waits.
        self._when: dict[str, int] = {}  # When each client last learnt, by steps.
        self._frames = 0  # In the journal.
        self.taken = 0
        self.since: dict[str, int] = {}
        self._snapped = 0
        if kept is not None:
            if kept.snapshot is not None:
                self._restore(kept.snapshot)
            self._snapped = self.taken
            for frame in kept.frames:
                self._replay(frame)

    @property
    def order(self) -> tuple[str, ...]:
        """Clients by when they last learnt, the latest last."""
        return tuple(sorted(self._when, key=lambda client: self._when[client]))

    @property
    def waiting(self) -> tuple[Waiting, ...]:
        """Whose gradients are due, of the runs that outlive a connection."""
        due = self._engine().waiting
        found = []
        for client, said in self._said.items():
            if not said.backward and client in due:
                message = decode(said.forward, _ANY)
                assert isinstance(message, Forward)
                found.append(Waiting(client, said.run, message))
        return tuple(found)

    def knows(self, part: Part) -> bool:
        """Whether this request was answered before; called from any thread, and sure only where nothing is computed.

        Raises:
            RemoteProtocolError: SS-4022 for another gradient of a step that has had one.
        """
        said = self._said.get(part.client)
        if not part.run or said is None or said.run != part.run or said.step != part.message.step:
            return False
        data = encode(part.message)
        if isinstance(part.message, Backward) and said.backward and data != said.backward:
            raise RemoteProtocolError("SS-4022", "a step number came again with other contents")
        return data in (said.forward, said.backward)

    def apply(self, parts: Sequence[Part]) -> tuple[Done, ...]:
        """Do one half of a learning step, of one client or of several as one, or find that it was done.

        Raises:
            RemoteProtocolError: SS-4014 a gradient that nothing waits for, SS-4022 a number again with other contents,
                SS-4055 a number that fell.
            CheckFailed: SS-1589 when the journal cannot be written; nothing more is learnt then.
        """
        data = [encode(part.message) for part in parts]
        known = [
            self._known(part.client, part.run, part.message.step, bytes_) if part.run else None
            for part, bytes_ in zip(parts, data, strict=True)
        ]
        if all(answer is not None for answer in known):
            return tuple(Done(decode(answer, _ANY), again=True) for answer in known if answer is not None)
        try:
            done = self._compute(parts)
        except Exception:
            self._log(parts, data, b"")  # It may have taken the graph away, and must do so when it is replayed.
            raise
        answers = _encoded(done)
        self._log(parts, data, _digest(answers))
        self._note(parts, data, answers)
        self._snap()
        return done

    def average(self) -> None:
        """Give all copies of B's adapters their mean.

        Raises:
            CheckFailed: SS-1589.
        """
        self._mean()
        self._write([_MEAN], b"")
        self._snap()

    def _mean(self) -> None:
        self._engine().fleet.average(uniform=self._uniform)
        self.since = {}

    def forget(self, client: str) -> None:
        """The client will not come back for its step: nothing waits for its gradient any more."""
        said = self._said.get(client)
        if client not in self._engine().waiting and (said is None or said.backward):
            return
        self._write([_FORGOT, client], b"")
        self._open.pop(client, None)
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
        note = {"taken": self.taken, "clients": runs, "since": self.since, "when": self._when}
        self._kept.commit(json.dumps(note), tensors)
        self._snapped, self._frames = self.taken, 0
        # After a crash just here the client says its forward again, and it is computed again from the same adapters.
        waiting = sorted(self._engine().waiting & self._open.keys())
        for frame in dict.fromkeys(self._open[client] for client in waiting):  # Several may stand in one frame.
            self._append(frame)

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

    def _compute(self, parts: Sequence[Part]) -> tuple[Done, ...]:
        engine, forward = self._engine(), [p.message for p in parts if isinstance(p.message, Forward)]
        if forward:
            batches = [
                Batch(part.client, m.step, m.lengths, tensor_of(m.hidden), m.gain)
                for part, m in zip(parts, forward, strict=True)
            ]
            outputs = engine.forward(batches, learn=True)
            self._sequences |= {batch.client: len(batch.lengths) for batch in batches}
            return tuple(self._told(Hidden, b.step, o) for b, o in zip(batches, outputs, strict=True))
        pulls = self._weighted(parts)
        gradients = engine.backward(pulls)
        for pull in pulls:
            engine.fleet.learnt(pull.who, self._sequences.pop(pull.who, 0))
        return tuple(self._told(Gradient, p.step, g) for p, g in zip(pulls, gradients, strict=True))

    def _told(self, kind: type[Hidden | Gradient], step: int, output: Tensor) -> Done:
        try:
            rows = blob_of(output, self._codec)
        except SecureSplitError as error:
            return Done(None, error=error)
        return Done(Hidden(step=step, hidden=rows) if kind is Hidden else Gradient(step=step, gradient=rows))

    def _weighted(self, parts: Sequence[Part]) -> list[Rows]:
        """Each client's loss is a mean over its own batch; B's is a mean over the clients in the step."""
        counts = [1 if self._uniform else self._sequences.get(part.client, 1) for part in parts]
        return [
            Rows(part.client, part.message.step, tensor_of(part.message.gradient), count / sum(counts))
            for part, count in zip(parts, counts, strict=True)
            if isinstance(part.message, Backward)
        ]

    def _note(self, parts: Sequence[Part], data: Sequence[bytes], answers: Sequence[bytes]) -> None:
        if isinstance(parts[0].message, Backward):
            self.taken += 1
        for part, said, answer in zip(parts, data, answers, strict=True):
            client, message = part.client, part.message
            if isinstance(message, Backward):
                self.since[client] = self.since.get(client, 0) + 1
                self._when[client] = self.taken
            if not part.run or not answer:
                self._said.pop(client, None)  # Whatever ran before is over: another graph is in its place.
            elif isinstance(message, Forward):
                self._said[client] = _Said(part.run, message.step, said, answer)
            elif client in self._said:
                self._said[client] = replace(self._said[client], backward=said, gradient=answer)

    def _drop(self, client: str) -> None:
        self._engine().give_up(client)
        self._open.pop(client, None)
        if client in self._said and not self._said[client].backward:
            del self._said[client]

    def _log(self, parts: Sequence[Part], data: Sequence[bytes], digest: bytes) -> None:
        rows = [[part.client, part.run, said] for part, said in zip(parts, data, strict=True)]
        frame = self._write([_STEP, *rows], digest)
        if self._kept is not None:
            self._remember([part.client for part in parts], data[0], frame)

    def _write(self, what: list[object], digest: bytes) -> bytes:
        if self._kept is None:
            return b""
        frame: bytes = msgpack.packb([*what, digest], use_bin_type=True)
        self._append(frame)
        return frame

    def _append(self, frame: bytes) -> None:
        assert self._kept is not None
        self._kept.append(frame)
        self._frames += 1

    def _remember(self, clients: Sequence[str], data: bytes, frame: bytes) -> None:
        """Whose forward is under way, as a frame; a backward ends it, whether or not it was good."""
        for client in clients:
            if data[3] == Forward.KIND:
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
        kind, *rows, digest = msgpack.unpackb(frame, raw=False, max_bin_len=1 << 31)
        if kind == _MEAN:
            return self._mean()
        if kind == _FORGOT:
            self._open.pop(rows[0], None)
            return self._drop(rows[0])
        parts, data = [], []
        for client, run, said in rows:
            message = decode(said, _ANY)
            assert isinstance(message, Forward | Backward)
            parts.append(Part(client, run, message))
            data.append(said)
        self._remember([part.client for part in parts], data[0], frame)
        if not digest:
            with suppress(Exception):  # As it did then.
                self._compute(parts)
            return None
        answers = _encoded(self._compute(parts))
        if _digest(answers) != digest:
            raise InputError(
                "SS-1295",
                "this machine computes other bits than the one that kept the state",
                hint="Go on with the same kind of machine, the same versions and the same --threads.",
            )
        return self._note(parts, data, answers)

    def _restore(self, snapshot: Snapshot) -> None:
        note = json.loads(snapshot.note)
        found = {piece.name: piece.value for piece in snapshot.tensors}
        self._engine().restore(
            [NamedTensor(n.removeprefix(_ENGINE), v) for n, v in found.items() if n.startswith(_ENGINE)]
        )
        self.taken = int(note["taken"])
        self.since = {str(client): int(steps) for client, steps in note["since"].items()}
        self._when = {str(client): int(steps) for client, steps in note["when"].items()}
        for i, known in enumerate(note["clients"]):
            parts = [_as_bytes(found[f"{_SAID}{i}.{what}"]) for what in _WHAT]
            self._said[str(known["client"])] = _Said(bytes.fromhex(known["run"]), int(known["step"]), *parts)


def _encoded(done: Sequence[Done]) -> list[bytes]:
    return [b"" if one.reply is None else encode(one.reply) for one in done]


def _digest(answers: Sequence[bytes]) -> bytes:
    """Of all answers to one step."""
    digest = hashlib.sha256()
    for answer in answers:
        digest.update(len(answer).to_bytes(8, "little") + answer)
    return digest.digest()


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def _as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
