"""What a program may ask, in OpenAI's form: bytes to a value, or all faults at once.

What changes the meaning of an answer and is not done here (tools, forms of output, log-probabilities, several answers) is
refused, never passed over. Fields whose value asks for nothing, as ``null`` and the defaults that programs send along, are
taken as absent; so are labels for accounting that change no answer.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from securesplit.client.chat.conversation import Conversation, Message, Role
from securesplit.client.sampling import Sampling
from securesplit.errors import InputError

__all__ = ["Ask", "Defaults", "asked"]

MOST_TOKENS = 4096
_MOST_FAULTS = 20
# Asking for exactly this is asking for nothing.
_NOTHING: dict[str, tuple[object, ...]] = {
    "best_of": (1,), "echo": (False,), "frequency_penalty": (0,), "functions": ([],), "logit_bias": ({},), "logprobs": (False,),
    "modalities": (["text"],), "presence_penalty": (0,), "response_format": ({"type": "text"},), "store": (False,), "suffix": ("",),
    "tools": ([],), "tool_choice": ("none",), "function_call": ("none",), "service_tier": ("auto", "default"), "top_logprobs": (0,),
}  # fmt: skip
_LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"})
_REFUSED = frozenset(
    {
        *_NOTHING, "audio", "moderation", "prediction", "prompt_cache_retention", "reasoning_effort", "verbosity", "web_search_options",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds where a request does not say.

    Attributes:
        max_new_tokens: of one answer.
        sampling: its choice of tokens; the seed of a request without one is drawn.
    """

    max_new_tokens: int
    sampling: Sampling


@dataclass(frozen=True, slots=True, repr=False)
class Ask:
    """A request that can be carried out.

    Attributes:
        model: as named by the program.
        conversation: of ``/v1/chat/completions``, or None.
        text: of ``/v1/completions``, or None.
        max_new_tokens, sampling: as asked for, or by default.
        stream: whether the answer is to come in pieces.
        usage: whether such an answer is to end with counts.
    """

    model: str
    conversation: Conversation | None
    text: str | None
    max_new_tokens: int
    sampling: Sampling
    stream: bool
    usage: bool


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Text(_Strict):
    type: Literal["text"]
    text: str


_T = TypeVar("_T")


def _listed(value: object) -> object:
    """One text is a list of one. Where two types were allowed instead, a fault of one would be told as faults of both."""
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


def _parts(value: object) -> object:
    return ({"type": "text", "text": value},) if isinstance(value, str) else _listed(value)


def _some(values: tuple[_T, ...]) -> tuple[_T, ...]:
    if not values:
        raise ValueError("is empty")
    return values


_TEXTS = ("content", "prompt", "stop")
_Nothing = Annotated[tuple[object, ...], Field(max_length=0)]


class _Said(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[tuple[_Text, ...], BeforeValidator(_parts)]
    annotations: _Nothing = ()
    tool_calls: _Nothing = ()

    def message(self) -> Message:
        role: Role = "system" if self.role == "developer" else self.role
        return Message(role, "".join(part.text for part in self.content))


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


class _Body(_Strict):
    model: Annotated[str, Field(max_length=256)]
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: _Tokens | None = None
    n: Annotated[int, Field(ge=1, le=1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 20)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Annotated[tuple[_Stop, ...], BeforeValidator(_listed), Field(max_length=4)] = ()


class _Chat(_Body):
    messages: Annotated[tuple[_Said, ...], Field(max_length=4096), AfterValidator(_some)]
    max_completion_tokens: _Tokens | None = None


class _Completion(_Body):
    prompt: Annotated[tuple[Annotated[str, Field(min_length=1)]], BeforeValidator(_listed)]


def asked(body: bytes, *, chat: bool, defaults: Defaults, seed: int) -> Ask:
    """Read the body of a request.

    Args:
        body: as it came.
        chat: whether it asked for ``/v1/chat/completions``, or else for ``/v1/completions``.
        defaults: what holds where it does not say.
        seed: random, for a request without one.

    Raises:
        InputError: SS-1272 with every fault. It quotes names of fields, never a value.
    """
    raw = _parsed(body)
    faults = [f"{name}: is not done here" for name in raw if name in _REFUSED and not _asks_nothing(name, raw[name])]
    wanted = {name: value for name, value in raw.items() if name not in _REFUSED | _LABELS}
    kind = _Chat if chat else _Completion
    try:
        told = kind.model_validate_json(json.dumps(wanted))
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False, include_context=False)
        _refuse([*faults, *(f"{_place(fault['loc'], kind)}: {_told(fault)}" for fault in found)])
    if isinstance(told, _Chat) and told.max_tokens is not None and told.max_completion_tokens is not None:
        faults.append("max_tokens: is the old name of max_completion_tokens; give one of them")
    if told.stream_options is not None and not told.stream:
        faults.append("stream_options: says something only with stream")
    if faults:
        _refuse(faults)
    return _ask(told, defaults, seed)


def _ask(told: _Chat | _Completion, defaults: Defaults, seed: int) -> Ask:
    usual = defaults.sampling
    sampling = Sampling(
        temperature=usual.temperature if told.temperature is None else told.temperature,
        seed=seed if told.seed is None else told.seed,
        # As other programs have it: 0 and -1 are all tokens, and of no probability is the most likely one.
        top_k=usual.top_k if told.top_k is None else max(0, told.top_k) or None,
        top_p=usual.top_p if told.top_p is None else told.top_p or sys.float_info.min,
        min_p=usual.min_p if told.min_p is None else told.min_p,
        repetition_penalty=usual.repetition_penalty if told.repetition_penalty is None else told.repetition_penalty,
        stop=told.stop or usual.stop,
    )
    usage = told.stream_options is not None and told.stream_options.include_usage
    count = (
        told.max_tokens or (told.max_completion_tokens if isinstance(told, _Chat) else None) or defaults.max_new_tokens
    )
    conversation, text = None, None
    if isinstance(told, _Chat):
        conversation = Conversation(tuple(message.message() for message in told.messages))
    else:
        text = told.prompt[0]
    return Ask(told.model, conversation, text, count, sampling, told.stream, usage)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(body.decode("utf-8"), parse_constant=_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        _refuse(["the body is no JSON, or names a field twice"])
    if not isinstance(raw, dict):
        _refuse(["the body is no JSON object"])
    return raw


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ, without what is null: programs send their whole record of an answer back."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError
    return {name: value for name, value in pairs if value is not None}


def _constant(_name: str) -> NoReturn:
    raise ValueError


def _asks_nothing(name: str, value: object) -> bool:
    """Whether it is one of the values that do; ``0`` is not ``false``, and of ``logprobs`` it asks for the token's own."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in _NOTHING.get(name, ()))


def _told(fault: ErrorDetails) -> str:
    """A fault in the words of JSON."""
    if fault["type"] == "tuple_type":
        return "must be a text or a list" if fault["loc"][-1] in _TEXTS else "must be a list"
    return fault["msg"].removeprefix("Value error, ").replace("Tuple ", "Value ").replace(" after validation", "")


def _place(loc: tuple[int | str, ...], kind: type[_Body]) -> str:
    """Where a fault is. A name that is not ours is foreign text, and so is said to be there, but not repeated."""
    known = {*kind.model_fields, *_Said.model_fields, *_Text.model_fields, *_StreamOptions.model_fields}
    return ".".join(str(part) if isinstance(part, int) or part in known else _quoted(part) for part in loc) or "body"


def _quoted(name: str) -> str:
    plain = name.replace("_", "").replace("-", "")
    return name if plain.isascii() and plain.isalnum() and len(name) <= 40 else "?"


def _refuse(faults: list[str]) -> NoReturn:
    raise InputError(
        "SS-1272",
        f"the request has {len(faults)} fault(s)",
        hint="docs/chat.md lists what the endpoint does.",
        details=tuple(faults[:_MOST_FAULTS]),
    )
