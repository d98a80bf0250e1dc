"""The server's running sum of masked vectors: words of the ring, or ciphertexts that a worker adds.

What this does not protect: without encryption and outside blind rounds the server reads the sum; that is what it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.encryption import SumWorker, scheme_of
from securesplit.aggregate.fixedpoint import Words
from securesplit.aggregate.wire import Vector
from securesplit.errors import AggregationAborted, LocalProtocolError, RemoteProtocolError

__all__ = ["Tally"]


class Tally:
    """One round's sum.

    Args:
        config: the round.
        worker: adds ciphertexts, in rounds with homomorphic encryption.
    """

    def __init__(self, config: RoundConfig, worker: SumWorker | None) -> None:
        self._config, self._worker = config, worker
        self._words: Words | None = None
        self._handle: int | None = None
        self._public = b""

    def check(self, name: str, vector: Vector | None) -> Vector:
        """The vector, if it has the type and length of this round's; a frame's length is the worker's to check.

        Raises:
            RemoteProtocolError: SS-6014.
        """
        c = self._config
        encrypted = c.backend != "masks"
        kind = np.dtype("u1" if encrypted else f"u{c.ring_bits // 8}")
        if vector is None or vector.dtype != kind or not (encrypted or vector.shape == (c.dim + 1,)):
            raise RemoteProtocolError("SS-6014", f"the masked vector of {name} has a wrong type or length")
        return vector

    def add(self, vector: Vector, public: bytes) -> None:
        """Add a client's vector, or its frame under the round's key, which is the one that the first client names.

        Raises:
            RemoteProtocolError: SS-6014 for a frame that is malformed.
            AggregationAborted: SS-6012 when this client names another key than the first one did, and nobody can tell which
                of them lies: the round is over for all. SS-6016 when the worker died.
        """
        c = self._config
        if c.backend == "masks":
            if self._words is None:
                self._words = np.zeros(c.dim + 1, dtype=vector.dtype)
            self._words += vector
            return
        worker = self._need()
        if self._handle is None:
            self._handle, self._public = worker.begin(scheme_of(c), public, c.dim + 1), public
        if public != self._public:
            raise AggregationAborted(
                "SS-6012", "clients of one round name two encryption keys", hint="One of them lies; start a new round."
            )
        worker.add(self._handle, vector.tobytes())

    def unmasked(self, unmask: Callable[[Words], None]) -> Vector:
        """The sum after ``unmask`` took the masks off, in place; under encryption they are added as plain words.

        Raises:
            AggregationAborted: what ``unmask`` or the worker raises.
        """
        if self._config.backend == "masks":
            assert self._words is not None, "stage 2 ended with enough vectors"
            unmask(self._words)
            return self._words
        correction = np.zeros(self._config.dim + 1, dtype=np.uint32)
        unmask(correction)
        worker, handle = self._need(), self._handle
        assert handle is not None, "stage 2 ended with enough vectors"
        worker.add_plain(handle, correction)
        frame = worker.finish(handle)
        self._handle = None
        return np.frombuffer(frame, dtype=np.uint8)

    def drop(self) -> None:
        """Forget everything."""
        self._words = None
        if self._worker is not None and self._handle is not None:
            with suppress(AggregationAborted):  # It died, and its sums with it.
                self._worker.drop(self._handle)
        self._handle = None

    def _need(self) -> SumWorker:
        if self._worker is None:
            raise LocalProtocolError("SS-6005", "a round with encryption needs a worker")
        return self._worker
