"""Answers in OpenAI's form: values in, JSON and server-sent events out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from securesplit.client.chat.toll import Price
from securesplit.client.chat.turn import Turn
from securesplit.client.endpoint.admission import NotKnown
from securesplit.errors import SecureSplitError
from securesplit.transport.http import Late

__all__ = ["BUSY", "DONE", "JSON", "SSE", "Answer", "event", "fault_json", "models_json", "status_of"]

JSON = (("content-type", "application/json"),)
SSE = (("content-type", "text/event-stream; charset=utf-8"),)
DONE = b"data: [DONE]\n\n"
Finish = Literal["stop", "length"]

BUSY = frozenset({"SS-1277", "SS-4017", "SS-4040"})
"""Refusals that pass by themselves: somebody else is being served. A budget is none of them; it does not refill."""
_STATUS = {
    "SS-1003": 500,
    "SS-1273": 413,
    "SS-1274": 403,
    "SS-1279": 404,
    "SS-4034": 400,
    "SS-4041": 400,
    **dict.fromkeys(BUSY, 429),
}
_FAMILIES = {"SS-1": 400, "SS-2": 403, "SS-3": 503, "SS-4": 502, "SS-5": 429}
_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer's frame: whatever all its parts say.

    Attributes:
        name: of the answer.
        created: seconds since 1970.
        model: as the endpoint calls it.
        chat: whether the answer is a message, or else text.
        turn: what is answered.
    """

    name: str
    created: int
    model: str
    chat: bool
    turn: Turn

    def whole(self, text: str, finish: Finish, tokens: int) -> bytes:
        """The answer at once."""
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": finish}
        return _json(
            {**self._frame(whole=True), "choices": [choice], "usage": self._usage(tokens), "securesplit": self._ours()}
        )

    def opening(self) -> bytes:
        """The first event of a message; nothing for text."""
        return self._piece({"role": "assistant", "content": ""}, None) if self.chat else b""

    def piece(self, text: str) -> bytes:
        """An event with more of the answer."""
        return self._piece({"content": text} if self.chat else text, None)

    def closing(self, finish: Finish) -> bytes:
        """The event that says why nothing follows, and what is not of OpenAI's form."""
        return self._piece({} if self.chat else "", finish, securesplit=self._ours())

    def usage(self, tokens: int) -> bytes:
        """The event with counts."""
        return event({**self._frame(whole=False), "choices": [], "usage": self._usage(tokens)})

    def _piece(self, delta: dict[str, str] | str, finish: Finish | None, **more: object) -> bytes:
        body = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": 0, **body, "logprobs": None, "finish_reason": finish}
        return event({**self._frame(whole=False), "choices": [choice], **more})

    def _frame(self, *, whole: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.chat else "chat.completion" if whole else "chat.completion.chunk"
        return {
            "id": self.name,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _usage(self, tokens: int) -> dict[str, int]:
        asked = len(self.turn.prompt)
        return {"prompt_tokens": asked, "completion_tokens": tokens, "total_tokens": asked + tokens}

    def _ours(self) -> dict[str, object]:
        return {"dropped_turns": self.turn.dropped, **price_json(self.turn.price)}


def price_json(price: Price | None) -> dict[str, object]:
    """What has been spent, for programs; ``epsilon`` is None where nothing is counted."""
    if price is None:
        return {"epsilon": None}
    return {
        "epsilon": price.after, "budget": price.budget, "delta": price.meaning.delta, "unit": price.meaning.unit, "relation": price.meaning.relation,
        "tokens_left": price.tokens_left,
    }  # fmt: skip


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + _json(value) + b"\n\n"


def models_json(model: str, created: int, *, alone: bool) -> bytes:
    """The one model, alone or as the list of models."""
    one = {"id": model, "object": "model", "created": created, "owned_by": "securesplit"}
    return _json(one if alone else {"object": "list", "data": [one]})


def fault_json(error: SecureSplitError, status: int) -> dict[str, object]:
    """A refusal in OpenAI's form; ``code`` is ours, for `securesplit explain`."""
    said = "; ".join((error.what, *error.details))
    place, colon, _ = error.details[0].partition(":") if error.code == "SS-1272" and error.details else ("", "", "")
    param = place if colon and place != "body" else None  # A fault of the whole body has no place in it.
    message = f"{said}. {error.hint}" if error.hint else said
    return {
        "error": {"message": message, "type": _TYPES.get(status, "server_error"), "param": param, "code": error.code}
    }


def status_of(error: SecureSplitError) -> int:
    """The HTTP status for one of our errors."""
    if isinstance(error, NotKnown):
        return 401
    if isinstance(error, Late):
        return 408
    return _STATUS.get(error.code) or _FAMILIES.get(error.code[:4], 500)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
