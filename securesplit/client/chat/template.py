"""From a conversation to the tokens of a prompt, by the tokenizer's own chat template.

The template is a Jinja program that came with the model; transformers runs it in Jinja's sandbox, where it can neither
open files nor import. A tokenizer without one gets the plain form: an instruction, then ``User:`` and ``Assistant:`` before
what each said. Only a model that was trained on such a form follows it well, and nothing marks where a message ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jinja2.exceptions import TemplateError

from securesplit.client.chat.conversation import Conversation
from securesplit.errors import InputError

__all__ = ["Rendered", "fit", "render"]

_PLAIN = {"system": "", "user": "User: ", "assistant": "Assistant: "}
_PLAIN_STOP = "\nUser:"


@dataclass(frozen=True, slots=True, repr=False)
class Rendered:
    """A prompt.

    Attributes:
        tokens: what the model reads.
        dropped: how many of the oldest turns did not fit.
        stop: texts that end the answer, besides those that the user chose.
        ends: the token that ends a message, where the template has one; often, but not always, the end of a text.
    """

    tokens: tuple[int, ...]
    dropped: int = 0
    stop: tuple[str, ...] = ()
    ends: int | None = None


def render(conversation: Conversation, tokenizer: Any) -> Rendered:
    """The whole conversation as a prompt that asks for the assistant's next message.

    Args:
        conversation: at least one message, the last one not the assistant's.
        tokenizer: of transformers.

    Raises:
        InputError: SS-1276 when a message holds a control token of the model, which would end its turn and begin
            another; SS-1278 when there is nothing to answer, or the template refuses this order of messages.
    """
    messages = conversation.messages
    if not conversation.mine or messages[-1].role == "assistant":
        raise InputError("SS-1278", "there is nothing to answer", hint="The last message must be the user's.")
    _refuse_control_tokens(conversation, tokenizer)
    if not getattr(tokenizer, "chat_template", None):
        lines = [f"{_PLAIN[m.role]}{m.content}" for m in messages]
        ids = tokenizer.encode("\n".join([*lines, "Assistant:"]))
        return Rendered(tuple(int(i) for i in ids), stop=(_PLAIN_STOP,))
    said = [{"role": message.role, "content": message.content} for message in messages]
    try:
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=True, return_dict=False)
    except (TemplateError, ValueError, TypeError, KeyError) as error:  # Its text may quote what was said.
        raise InputError(
            "SS-1278",
            f"the model's chat template cannot render these messages ({type(error).__name__})",
            hint="Most want at most one system message, first, and then user and assistant in turns.",
        ) from None
    return Rendered(tuple(int(i) for i in ids), ends=_end_of_message(tokenizer))


def fit(conversation: Conversation, tokenizer: Any, longest: int) -> Rendered:
    """As :func:`render`, without the oldest turns where they do not fit. What is dropped is counted; say so.

    Args:
        longest: tokens; the largest length that the policy lets the server see.

    Raises:
        InputError: as :func:`render`; SS-1275 when the last turn alone does not fit.
    """
    rendered = render(conversation, tokenizer)
    if len(rendered.tokens) <= longest:
        return rendered
    # Halving, because a prompt without more turns is no longer: a program may send thousands of them with each request.
    most = conversation.droppable
    last = rendered if most == 0 else render(conversation.without_oldest(most), tokenizer)
    if len(last.tokens) > longest:
        raise InputError(
            "SS-1275",
            f"the last message makes a prompt of {len(last.tokens)} tokens, and {longest} fit",
            hint="Shorten the message or the instructions, or let the policy's owner add a larger bucket.",
        )
    low, high, best = 0, most, last  # So many do not fit, so many do.
    while high - low > 1:
        middle = (low + high) // 2
        rendered = render(conversation.without_oldest(middle), tokenizer)
        if len(rendered.tokens) > longest:
            low = middle
        else:
            high, best = middle, rendered
    return replace(best, dropped=high)


def _end_of_message(tokenizer: Any) -> int | None:
    """The control token that this template writes behind a message of the assistant, found by looking."""
    said = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "securesplit"}]
    try:
        text = str(tokenizer.apply_chat_template(said, add_generation_prompt=False, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    behind = text.rpartition("securesplit")[2].lstrip()
    found = [token for token in _control_tokens(tokenizer) if behind.startswith(token)]
    return int(tokenizer.convert_tokens_to_ids(max(found, key=len))) if found else None


def _control_tokens(tokenizer: Any) -> frozenset[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    control = {str(t.content) for t in added if t.special} | {str(t) for t in tokenizer.all_special_tokens}
    return frozenset(control - {str(tokenizer.unk_token)})  # That stands for an unknown word, and controls nothing.


def _refuse_control_tokens(conversation: Conversation, tokenizer: Any) -> None:
    """A pasted text with ``<|im_end|>`` in it would speak with the voice of the system."""
    control = _control_tokens(tokenizer)
    where = [
        f"message {i} ({message.role})"
        for i, message in enumerate(conversation.messages)
        if any(token in message.content for token in control)
    ]
    if where:
        raise InputError(
            "SS-1276",
            "a message holds a control token of the model, which would end the message and begin another",
            hint="Take it out of the text, or write it with a space inside.",
            details=tuple(where),
        )
