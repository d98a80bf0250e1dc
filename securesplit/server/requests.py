"""Requests as work: what the engine has to compute for each, as a function that runs off the event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable

from securesplit.errors import LocalProtocolError, RemoteProtocolError, SecureSplitError
from securesplit.privacy.released import Codec
from securesplit.protocol.messages import Declined, DropCache, Forward, Hidden, KeepAnchor, Mark
from securesplit.server.anchors import KeptAnchors
from securesplit.server.caches import POLITE
from securesplit.server.connection import Answer, Together
from securesplit.server.course import Ask
from securesplit.server.engine import Batch, Engine
from securesplit.server.marks import Marks
from securesplit.server.steps import Done, Part, Steps
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
        marks: B as it was.
    """

    def __init__(
        self, engine: Callable[[], Engine], kept: KeptAnchors, codec: Codec, steps: Steps, marks: Marks | None = None
    ) -> None:
        self._engine = engine
        self._kept = kept
        self._codec = codec
        self._steps = steps
        self._marks = marks or Marks(engine, 0)

    def run(self, asks: tuple[Ask, ...]) -> Work:
        """One request, or the batches or gradients of several clients as one."""
        if len(asks) == 1:
            return Work(asks[0].connection, lambda: self._alone(asks[0]))
        return Work(0, lambda: self._together(asks))

    def decode(self, connection: int, client: str, message: Forward) -> Work:
        """A decoding step."""

        def run() -> Answer:
            hidden = tensor_of(message.hidden)
            if message.gain != 1:
                hidden *= message.gain
            try:
                with self._engine().computing(self._marks.of(connection)):
                    output = self._engine().decode(connection, message.cache, message.lengths, hidden, client)
            except RemoteProtocolError as error:
                if error.code not in POLITE:
                    raise
                return Answer(connection, client, message, Declined(step=message.step, code=error.code))
            return Answer(connection, client, message, Hidden(step=message.step, hidden=blob_of(output, self._codec)))

        return Work(connection, run)

    def average(self) -> Work:
        """Average the copies of B."""
        return Work(0, self._steps.average)

    def ended(self) -> list[Work]:
        """A secure sum has ended: B as it is now is what this round's checkpoints name."""
        return [Work(0, self._marks.ended)] if self._marks.slots else []

    def mark(self, connection: int, client: str, message: Mark) -> Work:
        """Keep a state of B, or compute with one from here on."""

        def run() -> Answer:
            return Answer(connection, client, message, self._marks.answer(connection, client, message))

        return Work(connection, run)

    def _together(self, asks: tuple[Ask, ...]) -> Together:
        try:
            computed = self._steps.apply([Part(ask.name, ask.run, ask.message) for ask in asks])
        except SecureSplitError as error:
            return Together((), asks, error)
        except Exception as error:  # noqa: BLE001 (the work is nobody's own: who is in the step would hear nothing)
            _log.error("a computation failed: %s", type(error).__name__)
            return Together(
                (), asks,
                LocalProtocolError("SS-4190", "the server failed inside a computation", hint="See the server's log."),
            )  # fmt: skip
        answers, failed, fault = list[Answer](), list[Ask](), None
        for ask, done in zip(asks, computed, strict=True):
            try:  # What cannot be told to one is nothing that the others did.
                answers.append(self._answer(ask, done))
            except SecureSplitError as error:
                failed, fault = [*failed, ask], error
        return Together(tuple(answers), tuple(failed), fault)

    def _alone(self, ask: Ask) -> Answer:
        if isinstance(ask.message, Forward) and not ask.message.learn:
            return self._evaluated(ask, ask.message)
        (done,) = self._steps.apply([Part(ask.name, ask.run, ask.message)])
        return self._answer(ask, done)

    def _answer(self, ask: Ask, done: Done) -> Answer:
        """What can be told.

        Raises:
            SecureSplitError: why it cannot.
        """
        if done.error is not None:
            raise done.error
        assert done.reply is not None
        return Answer(ask.connection, ask.name, ask.message, done.reply, ask.run, done.again)

    def _evaluated(self, ask: Ask, message: Forward) -> Answer:
        batch = Batch(ask.name, message.step, message.lengths, tensor_of(message.hidden), message.gain)
        with self._engine().computing(self._marks.of(ask.connection)):
            (output,) = self._engine().forward([batch], learn=False)
        return Answer(ask.connection, ask.name, message, Hidden(step=message.step, hidden=blob_of(output, self._codec)))

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
            self._marks.forget(connection)
            if client:
                self._steps.forget(client)

        return Work(connection, run)
