"""The endpoint itself: routes, and a request on its way from HTTP to the split model and back.

What is asked and answered stays on this machine: the server sees what :meth:`securesplit.client.client.Client.stream` lets
through the gate, and nothing of HTTP. No text is logged.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from securesplit.client.chat.toll import Toll
from securesplit.client.chat.turn import Turn, prepare, prepare_text, speak
from securesplit.client.endpoint.admission import Admission, NotKnown
from securesplit.client.endpoint.asked import Ask, Defaults, asked
from securesplit.client.endpoint.desk import Desk, Gave, lost
from securesplit.client.endpoint.told import BUSY, DONE, JSON, SSE, Answer, event, fault_json, models_json, status_of
from securesplit.client.generate import Piece
from securesplit.errors import InputError, SecureSplitError
from securesplit.transport.http import Head
from securesplit.transport.loopback import Exchange

if TYPE_CHECKING:
    from securesplit.client.client import Client

__all__ = ["Endpoint"]

_log = logging.getLogger(__name__)
_MODELS, _CHAT, _TEXT = "/v1/models", "/v1/chat/completions", "/v1/completions"
_METHODS = {_MODELS: "GET", _CHAT: "POST", _TEXT: "POST"}


class Endpoint:
    """A :class:`securesplit.transport.loopback.Service`.

    Args:
        desk: has the client.
        admission: who may ask.
        defaults: what holds where a request does not say.
        toll: counts what conversations cost.
        now: seconds since 1970.
        draw: random bits: of a name, of a seed.
    """

    def __init__(
        self,
        desk: Desk,
        admission: Admission,
        defaults: Defaults,
        toll: Toll,
        *,
        now: Callable[[], float] = time.time,
        draw: Callable[[int], int] = secrets.randbits,
    ) -> None:
        self._desk, self._admission, self._defaults, self._toll = desk, admission, defaults, toll
        self._now, self._draw = now, draw
        self.model = model_name(desk.client())
        self._started = int(now())

    def admit(self, head: Head) -> None:
        """Raise for a request that may not go on, before its body is read."""
        self._admission.check(head)
        path = head.path.removesuffix("/")
        if path.startswith(f"{_MODELS}/"):
            self._require_model(path.removeprefix(f"{_MODELS}/"))
            path = _MODELS
        if _METHODS.get(path) != head.method:
            raise InputError(
                "SS-1279",
                "there is nothing at this path for this method",
                hint=f"There are {', '.join(f'{method} {known}' for known, method in _METHODS.items())}.",
            )

    def answer(self, exchange: Exchange) -> None:
        """Answer a request."""
        assert exchange.request is not None
        path = exchange.request.head.path.removesuffix("/")
        if path.startswith(_MODELS):
            one = path != _MODELS
            exchange.whole(200, models_json(self.model, self._started, alone=one), JSON)
            return
        ask = asked(exchange.request.body, chat=path == _CHAT, defaults=self._defaults, seed=self._draw(63))
        self._require_model(ask.model)
        began = time.monotonic()
        try:
            with self._desk.seat(exchange.gone):
                count = self._carry_out(ask, exchange)
        except Gave:
            _log.info("%s: the program went before its answer", path)
            return
        _log.info("%s: %d tokens in %.1f s", path, count, time.monotonic() - began)

    def refuse(self, exchange: Exchange, error: SecureSplitError) -> None:
        """Answer with a refusal, within an answer that has begun, or instead of one."""
        status = status_of(error)
        _log.info("refused with %d %s", status, error.code)
        told = fault_json(error, status)
        if exchange.begun:
            exchange.part(event(told))
            exchange.end()
            return
        more: list[tuple[str, str]] = []
        if isinstance(error, NotKnown):
            more.append(("www-authenticate", "Bearer"))
        if status == 429:
            more.append(("retry-after", "2") if error.code in BUSY else ("x-should-retry", "false"))
        exchange.whole(status, json.dumps(told).encode(), (*JSON, *more))

    def _require_model(self, name: str) -> None:
        if name != self.model:
            raise InputError("SS-1279", "there is no model of this name", hint=f"There is one: {self.model}.")

    def _carry_out(self, ask: Ask, exchange: Exchange) -> int:
        turn, pieces = self._begun(ask)
        kind = "chatcmpl" if ask.conversation is not None else "cmpl"
        answer = Answer(
            f"{kind}-{self._draw(128):032x}", int(self._now()), self.model, ask.conversation is not None, turn
        )
        try:
            with closing(pieces):  # Whoever leaves early stops the generation by it, which may fail, too.
                return self._tell(ask, exchange, answer, pieces)
        except SecureSplitError as error:
            self._desk.failed(error)
            raise

    def _begun(self, ask: Ask) -> tuple[Turn, Pieces]:
        """The turn, with its first piece at hand: what fails until then is told by a status, and tried once more."""
        for again in (True, False):
            try:
                client = self._desk.client()
                turn = self._prepared(client, ask)
                return turn, Pieces(speak(client, self._toll, turn))
            except SecureSplitError as error:
                # The prompt is remembered by the ledger, so a second try with the same one is not charged again.
                if not (self._desk.failed(error) and lost(error) and again):
                    raise
        raise AssertionError

    def _prepared(self, client: Client, ask: Ask) -> Turn:
        if ask.conversation is not None:
            return prepare(
                client, self._toll, ask.conversation, max_new_tokens=ask.max_new_tokens, sampling=ask.sampling
            )
        assert ask.text is not None
        return prepare_text(client, self._toll, ask.text, max_new_tokens=ask.max_new_tokens, sampling=ask.sampling)

    def _tell(self, ask: Ask, exchange: Exchange, answer: Answer, pieces: Pieces) -> int:
        texts: list[str] = []
        tokens = 0
        if ask.stream:
            exchange.begin(200, SSE)
            if opening := answer.opening():
                exchange.part(opening)
        for piece in pieces:
            if exchange.gone():
                raise Gave
            tokens += piece.token is not None
            texts.append(piece.text)
            if ask.stream and piece.text:
                exchange.part(answer.piece(piece.text))
            if piece.finish is None:
                continue
            if not ask.stream:
                exchange.whole(200, answer.whole("".join(texts), piece.finish, tokens), JSON)
                continue
            usage = answer.usage(tokens) if ask.usage else b""
            exchange.part(answer.closing(piece.finish) + usage + DONE)
            exchange.end()
        return tokens


class Pieces:
    """An answer's pieces, the first of which has been waited for."""

    def __init__(self, source: Iterator[Piece]) -> None:
        self._source = source
        self._first: Piece | None = next(source)

    def __iter__(self) -> Iterator[Piece]:
        # No generator: one that is left would close the source by itself, and what fails then would be lost.
        return self

    def __next__(self) -> Piece:
        first, self._first = self._first, None
        return next(self._source) if first is None else first

    def close(self) -> None:
        """Stop the generation."""
        close = getattr(self._source, "close", None)
        if close is not None:
            close()


def model_name(client: Client) -> str:
    """What the endpoint calls the job's model: its alias, or the last part of its path."""
    return Path(client.job.model).name
