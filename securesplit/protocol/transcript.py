"""What the server saw, byte for byte, and nothing besides.

A transcript directory holds ``transcript.json`` (public facts: policy, job, model manifest digest) and one
``NNNN.bin`` per connection: records of ``direction u8 | time in ns u64 LE | length u32 LE | message``. Direction 0 came
from the client, 1 went to it. The truth (``truth.jsonl``) is written by clients, elsewhere; no attack opens it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from securesplit.errors import InputError, SecureSplitError
from securesplit.protocol import int8
from securesplit.protocol.codec import Caps, decode
from securesplit.protocol.messages import Backward, Blob, Forward, Hello, Hidden, Message, Secagg

_RECORD = struct.Struct("<BQI")
_CAPS = Caps(message_bytes=1 << 32)
_MAX_FAULTS = 20

Direction = Literal[0, 1]


class Recorder:
    """Appends every message of one connection to a file, as bytes.

    Args:
        directory: the transcript's directory; made when absent.
        peer: the certificate identity of the client, which the server knows anyway.
        number: number of the connection, unique in the directory.
    """

    def __init__(self, directory: Path, *, peer: str, number: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._paths = tuple(directory / f"{number:04d}.{kind}" for kind in ("bin", "peer"))
        self._file: BinaryIO = self._paths[0].open("xb")
        self._paths[1].write_text(peer, encoding="utf-8")
        self._heard = False

    def record(self, direction: Direction, time_ns: int, data: bytes) -> None:
        """Append one whole message."""
        self._heard |= direction == 0
        self._file.write(_RECORD.pack(direction, time_ns, len(data)))
        self._file.write(data)

    def close(self) -> None:
        """Flush and close. Of a client that connected and said nothing, nothing is kept: it released nothing."""
        self._file.close()
        if not self._heard:
            for path in self._paths:
                path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Observation:
    """One sequence as the server received it in one :class:`Forward`.

    Attributes:
        peer: certificate identity of the sender.
        connection, step, row: which message, and which sequence in it.
        time_ns: when it arrived, by the server's clock.
        cache: 0, or the decoding cache that the rows extend.
        hidden: (T, D) float32, the released rows; T is the public bucket length.
        output: (T, D) float32, what the middle answered, or None when the answer was never sent.
        gradient: (T, D) float32, the released gradient of the same step, or None.
        gain: public factor that B multiplies ``hidden`` by.
        size: bytes of the message.
        learn: whether the client said that a gradient would follow; it says so when it trains, not when it evaluates.
    """

    peer: str
    connection: int
    step: int
    row: int
    time_ns: int
    cache: int
    hidden: npt.NDArray[np.float32]
    output: npt.NDArray[np.float32] | None
    gradient: npt.NDArray[np.float32] | None
    gain: float
    size: int
    learn: bool = False


def array_of(blob: Blob) -> npt.NDArray[np.float32]:
    """A float tensor's values as float32, of the blob's shape."""
    if blob.dtype == "f32":
        return np.frombuffer(blob.data, dtype="<f4").reshape(blob.shape)
    if blob.dtype == "bf16":
        wide = np.frombuffer(blob.data, dtype="<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).reshape(blob.shape)
    if blob.dtype == "int8":
        return int8.values(blob.data, blob.shape)
    raise InputError("SS-1302", f"a tensor of type {blob.dtype} holds no floats")


@dataclass(frozen=True, slots=True)
class Transcript:
    """A recorded server view.

    Attributes:
        directory: where it lies.
        public: the public facts, as the server wrote them: ``policy``, ``job``, ``model`` and ``version``.
        peers: certificate identity by connection number.
    """

    directory: Path
    public: str
    peers: tuple[tuple[int, str], ...]

    @classmethod
    def load(cls, directory: str | Path) -> Transcript:
        """Open a transcript directory.

        Raises:
            InputError: SS-1301 when the directory holds no transcript.
        """
        directory = Path(directory)
        try:
            public = (directory / "transcript.json").read_text(encoding="utf-8")
            json.loads(public)
            peers = tuple((int(p.stem), p.read_text(encoding="utf-8")) for p in sorted(directory.glob("*.peer")))
        except (OSError, ValueError):
            raise InputError(
                "SS-1301",
                f"{directory} holds no readable transcript",
                hint="Name a directory that `serve --record` wrote.",
            ) from None
        return cls(directory=directory, public=public, peers=peers)

    def faults(self) -> tuple[str, ...]:
        """What keeps this from being a whole recording, at most one sentence per file, each beginning with its name.

        Readers of single messages go on up to a torn record. Whoever judges a policy by a recording must not: a lost file
        is text that nobody attacked. A recording that ends between two records looks whole, and so does one that lost
        all of a connection's files; the clients' truth tells (attacks/evaluate.py).
        """
        found = []
        for path in sorted((*self.directory.glob("*.bin"), *self.directory.glob("*.peer"))):
            other = path.with_suffix(".peer" if path.suffix == ".bin" else ".bin")
            if not other.is_file():
                found.append(f"{path.name}: there is no {other.name}")
            elif path.suffix == ".bin" and (fault := self._fault(path)):
                found.append(f"{path.name}: {fault}")
        return tuple(found)

    def _fault(self, path: Path) -> str:
        """What is wrong with a connection's file; empty for nothing."""
        size, greeted, count = 0, None, 0
        try:
            for count, (direction, _, data) in enumerate(self.timed(int(path.stem)), 1):
                if direction not in (0, 1):
                    return f"record {count} went neither way"
                message = decode(data, _CAPS)
                if direction == 0 and greeted is None:
                    greeted = isinstance(message, Hello)
                size += _RECORD.size + len(data)
            rest = path.stat().st_size - size
        except SecureSplitError as error:
            return f"record {count} is no message ({error.code})"
        except (OSError, ValueError):
            return "it cannot be read"
        if rest:
            return f"its last {rest} bytes are no whole record"
        if not count:
            return "it holds no record"
        return "" if greeted else "the client's first message is no Hello"

    def require_whole(self) -> None:
        """Refuse a recording with faults.

        Raises:
            InputError: SS-1301, naming the files.
        """
        if faults := self.faults():
            raise InputError(
                "SS-1301", f"{self.directory} is no whole recording: {len(faults)} fault(s)",
                hint="Record again, or cut the torn record off, or remove both files of that connection, by hand.",
                details=faults[:_MAX_FAULTS],
            )  # fmt: skip

    def messages(self, connection: int) -> Iterator[tuple[Direction, Message]]:
        """The messages of one connection in the order in which the server saw them. A torn last record is left out."""
        for direction, data in self.frames(connection):
            yield direction, decode(data, _CAPS)

    def frames(self, connection: int) -> Iterator[tuple[Direction, bytes]]:
        """The same as raw bytes."""
        for direction, _, data in self.timed(connection):
            yield direction, data

    def timed(self, connection: int) -> Iterator[tuple[Direction, int, bytes]]:
        """The same with the server's clock in nanoseconds, as it stood when the message passed."""
        with (self.directory / f"{connection:04d}.bin").open("rb") as file:
            while len(head := file.read(_RECORD.size)) == _RECORD.size:
                direction, time_ns, size = _RECORD.unpack(head)
                data = file.read(size)
                if len(data) < size:
                    return
                yield direction, time_ns, data

    def observations(self) -> Iterator[Observation]:
        """Every released sequence, joined with the server's own answer and with the gradient of the same step."""
        for number, peer in self.peers:
            forwards: dict[int, tuple[int, int, Forward]] = {}
            outputs: dict[int, Hidden] = {}
            gradients: dict[int, Backward] = {}
            for _, time_ns, data in self.timed(number):
                match message := decode(data, _CAPS):
                    case Forward():
                        forwards.setdefault(message.step, (time_ns, len(data), message))
                    case Hidden():
                        outputs.setdefault(message.step, message)
                    case Backward():
                        gradients.setdefault(message.step, message)
                    case _:
                        pass
            for step, (time_ns, size, forward) in forwards.items():
                output = array_of(outputs[step].hidden) if step in outputs else None
                gradient = array_of(gradients[step].gradient) if step in gradients else None
                hidden, start = array_of(forward.hidden), 0
                for row, length in enumerate(forward.lengths):
                    rows = slice(start, start + length)
                    start += length
                    yield Observation(
                        peer=peer, connection=number, step=step, row=row, time_ns=time_ns, cache=forward.cache,
                        hidden=hidden[rows], output=None if output is None else output[rows], gradient=None if gradient is None else gradient[rows],
                        gain=forward.gain, size=size, learn=forward.learn,
                    )  # fmt: skip

    def bytes_seen(self) -> tuple[int, int]:
        """Bytes of messages from the clients, and to them."""
        up = down = 0
        for number, _ in self.peers:
            for direction, data in self.frames(number):
                up, down = (up + len(data), down) if direction == 0 else (up, down + len(data))
        return up, down

    def aggregation_messages(self) -> Iterator[tuple[str, Direction, Secagg]]:
        """The secure-aggregation messages with the client they came from or went to."""
        for number, peer in self.peers:
            for direction, message in self.messages(number):
                if isinstance(message, Secagg):
                    yield peer, direction, message
