"""Requests as work: what the engine has to compute for each, as a function that runs off the event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from securesplit.errors import LocalProtocolError, RemoteProtocolError, SecureSplitError
from securesplit.privacy.released import Codec
from securesplit.protocol.messages import Backward, Declined, DropCache, Forward, Gradient, Hidden, KeepAnchor, Message
from securesplit.server.anchors import KeptAnchors
from securesplit.server.caches import POLITE
from securesplit.server.connection import Answer, Together
from securesplit.server.course import Ask
from securesplit.server.engine import Batch, Engine
from securesplit.server.learner import Rows
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
        uniform: whether clients whose steps are one count the same, instead of by their sequences.
    """

    def __init__(self, engine: Callable[[], Engine], kept: KeptAnchors, codec: Codec, *, uniform: bool = False) -> None:
        self._engine = engine
        self._kept = kept
        self._codec = codec
        self._uniform = uniform
        self._sequences: dict[str, int] = {}  # Of each client's pending step.

    def run(self, asks: tuple[Ask, ...]) -> Work:
        """One request, or the batches or gradients of several clients as one."""
        if len(asks) == 1:
            return Work(asks[0].connection, lambda: self._answer(asks[0], *self._computed(asks)[0]))
        return Work(0, lambda: self._together(asks))

    def decode(self, connection: int, client: str, message: Forward) -> Work:
        """A decoding step."""

        def run() -> Answer:
            hidden = tensor_of(message.hidden)
            if message.gain != 1:
                hidden *= message.gain
            try:
                output = self._engine().decode(connection, message.cache, message.lengths, hidden, client)
            except RemoteProtocolError as error:
                if error.code not in POLITE:
                    raise
                return Answer(connection, client, message, Declined(step=message.step, code=error.code))
            return Answer(connection, client, message, Hidden(step=message.step, hidden=blob_of(output, self._codec)))

        return Work(connection, run)

    def average(self, *, uniform: bool) -> Work:
        """Average the copies of B."""
        return Work(0, lambda: self._engine().fleet.average(uniform=uniform))

    def _together(self, asks: tuple[Ask, ...]) -> Together:
        try:
            computed = self._computed(asks)
        except SecureSplitError as error:
            return Together((), asks, error)
        except Exception as error:  # noqa: BLE001 (the work is nobody's own: who is in the step would hear nothing)
            _log.error("a computation failed: %s", type(error).__name__)
            return Together(
                (), asks,
                LocalProtocolError("SS-4190", "the server failed inside a computation", hint="See the server's log."),
            )  # fmt: skip
        answers, failed, fault = list[Answer](), list[Ask](), None
        for ask, (step, output) in zip(asks, computed, strict=True):
            try:  # What cannot be told to one is nothing that the others did.
                answers.append(self._answer(ask, step, output))
            except SecureSplitError as error:
                failed, fault = [*failed, ask], error
        return Together(tuple(answers), tuple(failed), fault)

    def _answer(self, ask: Ask, step: int, output: Tensor) -> Answer:
        blob = blob_of(output, self._codec)
        forward = isinstance(ask.message, Forward)
        reply: Message = Hidden(step=step, hidden=blob) if forward else Gradient(step=step, gradient=blob)
        return Answer(ask.connection, ask.name, ask.message, reply)

    def _computed(self, asks: tuple[Ask, ...]) -> list[tuple[int, Tensor]]:
        """For each its step, and B's output or the gradient at B's input."""
        forward = [(ask, ask.message) for ask in asks if isinstance(ask.message, Forward)]
        if forward:
            batches = [Batch(a.name, m.step, m.lengths, tensor_of(m.hidden), m.gain) for a, m in forward]
            outputs = self._engine().forward(batches, learn=forward[0][1].learn)
            if forward[0][1].learn:
                self._sequences |= {b.client: len(b.lengths) for b in batches}
            return [(b.step, output) for b, output in zip(batches, outputs, strict=True)]
        pulls = self._weighted([(a, a.message) for a in asks if isinstance(a.message, Backward)])
        got = self._engine().backward(pulls)
        for pull in pulls:
            self._engine().fleet.learnt(pull.who, self._sequences.get(pull.who, 0))
        return [(p.step, gradient) for p, gradient in zip(pulls, got, strict=True)]

    def _weighted(self, asks: Sequence[tuple[Ask, Backward]]) -> list[Rows]:
        """Each client's loss is a mean over its own batch; B's is a mean over the clients in the step."""
        counts = [1 if self._uniform else self._sequences.get(a.name, 1) for a, _ in asks]
        total = sum(counts)
        return [
            Rows(a.name, m.step, tensor_of(m.gradient), count / total)
            for (a, m), count in zip(asks, counts, strict=True)
        ]

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
        """Forget everything of a connection."""
        return Work(connection, lambda: self._engine().forget(connection, client))
