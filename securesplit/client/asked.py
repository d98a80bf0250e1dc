"""Prompts on their way out: as tokens, padded to their bucket, with who pays for them; checked before anything is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from securesplit.data.answers import prompt_tokens
from securesplit.data.batches import bucket_of
from securesplit.errors import InputError
from securesplit.policy.schema import Gaussian

if TYPE_CHECKING:
    from securesplit.client.client import Client

__all__ = ["Ask", "Prompt", "asked", "chunks"]

Prompt = str | tuple[int, ...]
"""Text, or its tokens, such as a chat template makes them."""

_ROOM = 1 << 16
"""Of a message, for what is not rows."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt, ready to leave.

    Attributes:
        ids: what crosses, with padding in front under a private policy.
        real: without padding.
        record: who pays for the prompt; None for everybody.
        content: names the tokens, for the memory of released bytes; None where there is no ledger.
    """

    ids: tuple[int, ...]
    real: tuple[int, ...]
    record: str | None
    content: str | None


def asked(client: Client, prompts: Sequence[Prompt], count: int) -> tuple[Ask, ...]:
    """Check the whole request before anything is sent.

    Raises:
        InputError: SS-1441, SS-1260, SS-1222. PolicyDenied: SS-2010. BudgetExhausted: SS-5001, SS-5002.
    """
    tokenizer: Any = client.tokenizer
    reals = [tuple(prompt_tokens(p, tokenizer) if isinstance(p, str) else map(int, p)) for p in prompts]
    size = client.front.module.config.vocab_size
    if count < 1 or not all(reals) or any(not 0 <= i < size for ids in reals for i in ids):
        raise InputError(
            "SS-1441", "there is nothing to continue",
            hint="Give a prompt of text, or of the model's own tokens, and at least one new token.",
        )  # fmt: skip
    client.train(None)
    asks = tuple(_ask(client, prompt, real) for prompt, real in zip(prompts, reals, strict=True))
    most = getattr(client.front.module.config, "max_position_embeddings", None)
    sentinel = client.code is not None and client.code.facts.sentinel is not None
    longest = max((len(ask.ids) for ask in asks), default=0) + count - 1 + sentinel
    if most is not None and longest > most:
        raise InputError(
            "SS-1260", f"prompt and text need {longest} positions, and the model has {most}",
            hint="Ask for fewer new tokens, or shorten the prompt.",
        )  # fmt: skip
    if count > 1 and asks:
        client.gate.require((count - 1) * len(asks), at="decode")
    return asks


def _ask(client: Client, prompt: Prompt, real: tuple[int, ...]) -> Ask:
    privacy, ledger = client.policy.privacy, client.ledger
    tokenizer: Any = client.tokenizer
    ids = real
    if isinstance(privacy, Gaussian):
        # The server sees the bucket, not the length. Padding stands in front, where later tokens may see it unmasked.
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ids = (int(fill),) * (bucket_of(len(real), client.policy.limits.buckets) - len(real)) + real
    if ledger is None:
        return Ask(ids, real, None, None)
    # Nobody says whose prompt it is, so under unit 'user' everybody pays for it.
    anybody = isinstance(privacy, Gaussian) and privacy.unit == "user"
    text = prompt if isinstance(prompt, str) else _spelled(tokenizer, real)
    content = ledger.key(b"prompt:" + b",".join(b"%d" % i for i in ids))
    return Ask(ids, real, None if anybody else ledger.key(text.encode()), content)


def _spelled(tokenizer: Any, ids: tuple[int, ...]) -> str:
    """The text that these tokens are, so that it is one record however it was given."""
    texts: list[str] = [tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False) for skip in (True, False)]  # fmt: skip
    return next((text for text in texts if tuple(prompt_tokens(text, tokenizer)) == ids), texts[1])


def chunks(client: Client, asks: Sequence[Ask]) -> Iterator[list[int]]:
    """Places of prompts that cross together: within the policy's limits, equally long ones beside each other."""
    limits, width = client.policy.limits, 4 * client.front.width + 4
    chunk: list[int] = []
    rows = 0
    for i in sorted(range(len(asks)), key=lambda i: len(asks[i].ids)):
        size = len(asks[i].ids)
        if chunk and (len(chunk) >= limits.max_sequences or (rows + size) * width > limits.max_message_bytes - _ROOM):
            yield chunk
            chunk, rows = [], 0
        chunk.append(i)
        rows += size
    if chunk:
        yield chunk
