"""One process that encrypts, adds and decrypts; this side of it, which never loads TenSEAL and parses no ciphertext.

The process gets bytes and gives bytes, in a format of our own (he_py), whose every length is checked here again.
When it dies, hangs or runs out of memory, the call aborts, and the next one starts a fresh process: a frame that kills
the parser ends one round, not the program.

What this does not protect: see he.py. Whoever may trace the user's processes reads the secrets in this one and in that.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from securesplit.aggregate.fixedpoint import Words
from securesplit.aggregate.he import (
    CLIENT,
    SCHEMES,
    SECRET_BYTES,
    SUM,
    HeKeys,
    HeScheme,
    derive_keys,
    key_id_of,
    read_public,
    unpack_frame,
)
from securesplit.aggregate.he_pipe import (
    ADD,
    ADD_PLAIN,
    BEGIN,
    DECRYPT,
    DROP,
    ENCRYPT,
    FINISH,
    SCHEME,
    HeProcess,
)
from securesplit.errors import AggregationAborted, LocalProtocolError

__all__ = ["HeWorker"]

_MAX_SUMS = 8


@dataclass(slots=True)
class _Running:
    """What is known here of a running sum."""

    scheme: HeScheme
    key_id: bytes
    dim: int
    process: HeProcess
    added: int = 0
    plain: bool = False


class HeWorker:
    """Homomorphic encryption in a process of its own; a context manager. Threads may share one; calls take turns.

    Args:
        timeout: seconds after which a call is given up and the process killed.
        memory_bytes: address space that the process may use. A running sum takes about 16 bytes a word, and adding to it
            or decrypting it about 40 more for the time of the call.
    """

    def __init__(self, *, timeout: float = 300.0, memory_bytes: int = 4 << 30) -> None:
        self._timeout, self._memory = timeout, memory_bytes
        self._lock = threading.Lock()
        self._process: HeProcess | None = None
        self._sums: dict[int, _Running] = {}
        self._next, self._closed = 1, False

    def __enter__(self) -> Self:
        """Start the process, so that a missing TenSEAL shows before a round begins.

        Raises:
            InputError: SS-1606 when TenSEAL is not installed or not usable here.
        """
        with self._lock:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the process so far, which this process's own clock does not count."""
        return 0.0 if self._process is None else self._process.cpu_seconds

    def make_keys(self, scheme: HeScheme) -> HeKeys:
        """Fresh keys for one round. To derive equal ones from a secret that clients share, use ``he.derive_keys``."""
        return derive_keys(scheme, secrets.token_bytes(SECRET_BYTES))

    def encrypt(self, scheme: HeScheme, secret: bytes, words: Words) -> bytes:
        """Encrypt ring words.

        Args:
            scheme: for the round's number of clients.
            secret: 32 bytes, the round's.
            words: (d,) uint32; masked ones.

        Returns:
            A frame for :meth:`add`, at most ``scheme.frame_bytes(d)`` bytes.

        Raises:
            InputError: SS-1601 when d is out of range, SS-1606 without TenSEAL.
            LocalProtocolError: SS-6011 when the words are not uint32 or the secret not 32 bytes.
            AggregationAborted: SS-6016 when the process failed.
        """
        key_id, data = key_id_of(scheme, secret), _checked(words)
        head, most = _head(scheme, words.size), scheme.frame_bytes(words.size)
        frame = self._call(ENCRYPT, head, secret, data, most=most)[1]
        unpack_frame(scheme, CLIENT, words.size, key_id, frame)
        return frame

    def begin(self, scheme: HeScheme, public: bytes, dim: int) -> int:
        """Begin a sum of frames of dim words under one key; returns its handle.

        Raises:
            RemoteProtocolError: SS-6014 when ``public`` is not the public part of a key of the scheme; a secret is none.
            InputError: SS-1601 when dim is out of range, SS-1606 without TenSEAL.
            LocalProtocolError: SS-6005 when eight sums are open.
            AggregationAborted: SS-6016 when the process failed.
        """
        key_id = read_public(scheme, public)
        head = _head(scheme, dim)
        with self._lock:
            process = self._start()
            if sum(one.process is process for one in self._sums.values()) >= _MAX_SUMS:
                raise LocalProtocolError("SS-6005", "too many homomorphic sums are open", hint="Finish or drop one.")
            handle, self._next = self._next, self._next + 1
            process.ask(BEGIN, (head, key_id, handle.to_bytes(8, "little")), most=0)
            self._sums[handle] = _Running(scheme, key_id, dim, process)
        return handle

    def add(self, handle: int, frame: bytes) -> None:
        """Add a client's frame. One that is refused leaves the sum as it was.

        Raises:
            RemoteProtocolError: SS-6014 when the frame is not exactly one of this sum.
            LocalProtocolError: SS-6005 for an unknown handle, or more frames than the scheme is for.
            AggregationAborted: SS-6016 when the process failed, now or since the sum began.
        """
        with self._lock:
            found = self._running(handle)
            if found.added >= found.scheme.clients or found.plain:
                raise LocalProtocolError(
                    "SS-6005", "the homomorphic sum takes no further frame", hint="Start a new round."
                )
            unpack_frame(found.scheme, CLIENT, found.dim, found.key_id, frame)
            found.process.ask(ADD, (handle.to_bytes(8, "little"), frame), most=0)
            found.added += 1

    def add_plain(self, handle: int, words: Words) -> None:
        """Add words that are no secret, once, after all frames.

        Args:
            handle: the sum.
            words: (d,) uint32.

        Raises:
            LocalProtocolError: SS-6005 for an unknown handle, before a frame or a second time; SS-6011 for other words.
            AggregationAborted: SS-6016 when the process failed, now or since the sum began.
        """
        data = _checked(words)
        with self._lock:
            found = self._running(handle)
            if found.added == 0 or found.plain:
                raise LocalProtocolError("SS-6005", "plain words are added once, after a frame")
            if words.size != found.dim:
                raise LocalProtocolError("SS-6011", f"{words.size} words for a sum of {found.dim}")
            found.process.ask(ADD_PLAIN, (handle.to_bytes(8, "little"), data), most=0)
            found.plain = True

    def finish(self, handle: int) -> bytes:
        """End a sum.

        Returns:
            A frame for :meth:`decrypt`, at most ``scheme.frame_bytes(dim, kind=SUM)`` bytes.

        Raises:
            LocalProtocolError: SS-6005 for an unknown handle or a sum of nothing.
            AggregationAborted: SS-6016 when the process failed, now or since the sum began.
        """
        with self._lock:
            found = self._running(handle)
            if found.added == 0:
                raise LocalProtocolError("SS-6005", "a homomorphic sum of no frame")
            most = found.scheme.frame_bytes(found.dim, kind=SUM)
            frame = found.process.ask(FINISH, (handle.to_bytes(8, "little"),), most=most)
            self._sums.pop(handle, None)
        unpack_frame(found.scheme, SUM, found.dim, found.key_id, frame)
        return frame

    def drop(self, handle: int) -> None:
        """Forget a sum; one that is not known is forgotten already."""
        with self._lock:
            found = self._sums.pop(handle, None)
            if found is not None and found.process is self._process:
                with contextlib.suppress(AggregationAborted):
                    found.process.ask(DROP, (handle.to_bytes(8, "little"),), most=0)

    def decrypt(self, scheme: HeScheme, secret: bytes, frame: bytes, dim: int, *, silent: bool = False) -> Words:
        """Open a sum.

        Args:
            scheme, secret, dim: the round's.
            frame: what :meth:`finish` gave, as it came.
            silent: give words even where they cannot be right. A server that alters a sum and learns who complains learns
                about the key; see he.py.

        Returns:
            (dim,) uint32: the sum mod 2^32.

        Raises:
            RemoteProtocolError: SS-6014 when the frame is not exactly a sum's, of this scheme, key and dimension.
            AggregationAborted: SS-6011 when a coordinate is too large for the sum of so many words, or is a quarter or
                more away from an integer, or the filling of the last block is not zero. SS-6016 when the process failed.
            LocalProtocolError: SS-6011 when the secret is not 32 bytes. InputError: SS-1601 when dim is out of range,
                SS-1606 without TenSEAL.
        """
        unpack_frame(scheme, SUM, dim, key_id_of(scheme, secret), frame)
        mode = b"silent" if silent else b"strict"
        process, data = self._call(DECRYPT, _head(scheme, dim), secret, frame, mode, most=4 * dim)
        if len(data) != 4 * dim:
            raise process.failed()
        return np.frombuffer(data, dtype="<u4").astype(np.uint32)

    def close(self) -> None:
        """End the process; a call under way aborts, and the worker cannot be used any more."""
        self._closed, process = True, self._process
        if process is not None:
            process.kill()
        with self._lock:
            if self._process is not None:
                self._process.end()
            self._process = None

    def _start(self) -> HeProcess:
        if self._closed:
            raise LocalProtocolError("SS-6005", "the worker for homomorphic sums is closed")
        if self._process is None or not self._process.alive:
            if self._process is not None:
                self._process.end()
            self._process = None
            self._process = HeProcess(timeout=self._timeout, memory_bytes=self._memory)
        return self._process

    def _call(self, code: int, *parts: bytes | memoryview, most: int) -> tuple[HeProcess, bytes]:
        with self._lock:
            process = self._start()
            return process, process.ask(code, parts, most=most)

    def _running(self, handle: int) -> _Running:
        found = self._sums.get(handle)
        if found is None:
            raise LocalProtocolError("SS-6005", "there is no such homomorphic sum")
        return found


def _head(scheme: HeScheme, dim: int) -> bytes:
    scheme.count(dim)
    return SCHEME.pack(SCHEMES.index(scheme.name), scheme.clients, dim)


def _checked(words: Words) -> memoryview:
    if words.dtype != np.uint32 or words.ndim != 1:
        raise LocalProtocolError("SS-6011", "words for encryption are not a vector of uint32")
    return np.ascontiguousarray(words, dtype="<u4").data.cast("B")
