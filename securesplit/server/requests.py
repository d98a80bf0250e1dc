"""Requests as work: what the engine has to compute for each, as a function that runs off the event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor

from securesplit.errors import RemoteProtocolError
from securesplit.privacy.released import Codec
from securesplit.protocol.messages import Backward, Declined, DropCache, Forward, Gradient, Hidden, KeepAnchor
from securesplit.server.anchors import KeptAnchors
from securesplit.server.caches import POLITE
from securesplit.server.connection import Answer
from securesplit.server.engine import Engine
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
    """

    def __init__(self, engine: Callable[[], Engine], kept: KeptAnchors, codec: Codec) -> None:
        self._engine = engine
        self._kept = kept
        self._codec = codec

    def forward(self, connection: int, message: Forward) -> Work:
        """B over a batch, or a decoding step."""

        def run() -> Answer:
            hidden = tensor_of(message.hidden)
            if message.cache and message.gain != 1:
                hidden *= message.gain
            output: Tensor
            if message.cache:
                try:
                    output = self._engine().decode(connection, message.cache, message.lengths, hidden)
                except RemoteProtocolError as error:
                    if error.code not in POLITE:
                        raise
                    return Answer(message, Declined(step=message.step, code=error.code))
            else:
                output = self._engine().forward(
                    connection, message.step, message.lengths, hidden, gain=message.gain, learn=message.learn
                )
            return Answer(message, Hidden(step=message.step, hidden=blob_of(output, self._codec)))

        return Work(connection, run)

    def backward(self, connection: int, message: Backward) -> Work:
        """B's own gradient step, and the gradient at its input."""

        def run() -> Answer:
            gradient = self._engine().backward(connection, message.step, tensor_of(message.gradient))
            return Answer(message, Gradient(step=message.step, gradient=blob_of(gradient, self._codec)))

        return Work(connection, run)

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

    def forget(self, connection: int) -> Work:
        """Forget everything of a connection."""
        return Work(connection, lambda: self._engine().forget(connection))
