"""Requests as work: what the engine has to compute for each, as a function that runs off the event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from securesplit.privacy.released import Codec
from securesplit.protocol.messages import Backward, DropCache, Forward, Hidden, KeepAnchor
from securesplit.server.anchors import KeptAnchors
from securesplit.server.connection import Answer
from securesplit.server.engine import Engine
from securesplit.server.steps import Steps
from securesplit.transport.actions import Work
from securesplit.transport.tensors import blob_of, tensor_of

__all__ = ["Requests"]

_log = logging.getLogger(__name__)


class Requests:
    """Makes work of requests.

    Args:
        engine: gives B.
        kept: what clients asked to keep.
        codec: the job's.
        steps: does what learns.
    """

    def __init__(self, engine: Callable[[], Engine], kept: KeptAnchors, codec: Codec, steps: Steps) -> None:
        self._engine = engine
        self._steps = steps
        self._kept = kept
        self._codec = codec

    def forward(self, connection: int, client: str, message: Forward, run: bytes = b"") -> Work:
        """B over a batch, or a decoding step."""

        def learn() -> Answer:
            done = self._steps.apply(client, run, message)
            return Answer(message, done.reply, client, run, done.again)

        def compute() -> Answer:
            hidden = tensor_of(message.hidden)
            if message.cache and message.gain != 1:
                hidden *= message.gain
            output: Tensor
            if message.cache:
                output = self._engine().decode(connection, message.cache, message.lengths, hidden)
            else:
                output = self._engine().forward(
                    client, message.step, message.lengths, hidden, gain=message.gain, learn=False
                )
            return Answer(message, Hidden(step=message.step, hidden=blob_of(output, self._codec)))

        return Work(connection, learn if message.learn else compute)

    def backward(self, connection: int, client: str, message: Backward, run: bytes = b"") -> Work:
        """B's own gradient step, and the gradient at its input."""

        def compute() -> Answer:
            done = self._steps.apply(client, run, message)
            return Answer(message, done.reply, "", run, done.again)

        return Work(connection, compute)

    def keep(self, connection: int, certificate: bytes, message: KeepAnchor) -> Work:
        """Write down a client's sealed anchor."""

        def run() -> None:
            try:
                self._kept.keep(certificate, message.blob)
            except OSError as error:  # The client is protected by its own anchor; this one was a second line.
                _log.warning("an anchor could not be kept: %s", type(error).__name__)

        return Work(connection, run)

    def drop(self, connection: int, message: DropCache) -> Work:
        """Forget a decoding cache."""
        return Work(connection, lambda: self._engine().drop_cache(connection, message.cache))

    def forget(self, connection: int, client: str) -> Work:
        """Forget everything of a connection, and the graph that waits for this client, if one is named."""

        def run() -> None:
            self._engine().forget(connection)
            if client:
                self._steps.forget(client)

        return Work(connection, run)
