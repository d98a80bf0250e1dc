"""Decoding through the split: a cache in each party, sampling on the client.

What it costs. The prompt is one release of its own record, remembered: the same prompt again resends the same bytes and
costs nothing. Every generated token that is fed back is another release: it depends on the prompt through attention, and
on every training record through C's adapters, so it is charged to all records of the site (``*``). Whether it can be paid
is checked before the first byte leaves; only another process of the same site that spends in the meantime can still end
a run midway. What the server has forgotten, or a lost connection took, is sent again and costs nothing (replay.py).

The number of messages says nothing: under a private policy as many tokens cross, and are charged, as were asked for,
even when the text ended before, or its reader went away. What the server still learns: that number, and the time between
messages.

Several prompts at once cross together. Without noise all of them are in one message for each token; with noise, those of
one bucket, because a public factor of the message follows from its length.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from securesplit.client.asked import Ask, Prompt, asked, chunks
from securesplit.client.decoding import decoded
from securesplit.client.sampling import Sampling
from securesplit.client.text import Spoken, Stops
from securesplit.policy.schema import Gaussian
from securesplit.privacy.plan import enforced_epsilon

if TYPE_CHECKING:
    from securesplit.client.client import Client

__all__ = [
    "Finish",
    "Generated",
    "Piece",
    "Prompt",
    "Sampling",
    "generate",
    "generate_batch",
    "generate_each",
    "stream",
]

Finish = Literal["stop", "length"]
"""Why a text ended: at the model's own end or a stop text; or because it had as many tokens as were asked for."""


@dataclass(frozen=True, slots=True)
class Generated:
    """A continuation.

    Attributes:
        text: of the new tokens, up to a stop text.
        tokens: the new token ids; those that a stop text is made of are among them, the model's own end is not.
        epsilon: what the prompt's record has spent in all by now, at the policy's delta; the policy's unit, relation
            replace-one. None under UnsafeNoPrivacy.
        delta: of the same claim.
        finish: why the text ended.
        prompt_tokens: how many tokens the prompt has, padding apart.
    """

    text: str
    tokens: tuple[int, ...]
    epsilon: float | None
    delta: float | None
    finish: Finish = "length"
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a continuation, as it comes.

    Attributes:
        text: whole characters, often none: what could still become another character, or a stop text, is held back.
        token: the new token, or None where there is none.
        finish: why the text ended, in the last piece; None in all others.
    """

    text: str
    token: int | None
    finish: Finish | None


class _Text:
    """One continuation while it grows; ``ends`` is a token that ends it, besides the model's own end."""

    def __init__(self, tokenizer: Any, sampling: Sampling, ends: int | None = None) -> None:
        self._ends = (tokenizer.eos_token_id, ends)
        self._spoken, self._stops = Spoken(tokenizer), Stops(sampling.stop)
        self.tokens: list[int] = []
        self.finish: Finish | None = None

    def add(self, token: int) -> str:
        """The next token; what can be shown now. After the end nothing is."""
        if self.finish is not None:
            return ""
        if token in self._ends:
            self.finish = "stop"
            return ""
        self.tokens.append(token)
        shown = self._stops.add(self._spoken.add(token))
        self.finish = "stop" if self._stops.found else None
        return shown

    def end(self) -> str:
        """No token comes any more; what was held back."""
        shown = "" if self._stops.found else self._stops.add(self._spoken.end())
        self.finish = "stop" if self._stops.found else self.finish or "length"
        return shown + self._stops.end()


def generate(client: Client, prompt: Prompt, *, max_new_tokens: int, sampling: Sampling) -> Generated:
    """Continue a prompt; :func:`generate_batch` with one."""
    return generate_batch(client, [prompt], max_new_tokens=max_new_tokens, sampling=sampling)[0]


def generate_batch(
    client: Client, prompts: Sequence[Prompt], *, max_new_tokens: int, sampling: Sampling
) -> tuple[Generated, ...]:
    """Continue several prompts side by side; each gets what it would get alone, but for rounding of sums.

    Args:
        client: an open site.
        prompts: private texts.
        max_new_tokens: of each, at least 1.
        sampling: how tokens are chosen; every text has its own generator of the same seed.

    Raises:
        InputError: SS-1441 for an empty prompt or no tokens to generate, SS-1260 when prompt and text have more positions
            than the model, SS-1222 when a prompt is longer than the policy's largest bucket.
        PolicyDenied: SS-2010 when the policy does not allow generation.
        BudgetExhausted: SS-5001, SS-5002; nothing of the batch concerned was sent.
        RemoteProtocolError: SS-4040, SS-4041 when the server has no room. ConnectionFailed: when it cannot be reached again.
    """
    asks = asked(client, prompts, max_new_tokens)
    made = dict(_each(client, asks, max_new_tokens, sampling))
    # Only now: what was fed back for the last text is at the expense of the first one's record, too.
    return tuple(_generated(client, ask, *made[i]) for i, ask in enumerate(asks))


def generate_each(
    client: Client, prompts: Sequence[Prompt], *, max_new_tokens: int, sampling: Sampling
) -> Iterator[tuple[int, Generated]]:
    """The same, each with its place among the prompts, as soon as those that cross together are done; so in another order.

    Whoever keeps them as they come does not pay twice for what was done before something failed. Args and errors as
    :func:`generate_batch`; the input is looked at when the first is asked for. An epsilon is that of its moment, and grows
    with what comes after it.
    """
    asks = asked(client, prompts, max_new_tokens)
    for i, (text, made) in _each(client, asks, max_new_tokens, sampling):
        yield i, _generated(client, asks[i], text, made)


def _each(
    client: Client, asks: Sequence[Ask], max_new_tokens: int, sampling: Sampling
) -> Iterator[tuple[int, tuple[str, _Text]]]:
    """Each prompt's place, its text, and how that came about."""
    for chunk in chunks(client, asks):
        texts, said = [_Text(client.tokenizer, sampling) for _ in chunk], [""] * len(chunk)
        steps = decoded(client, [asks[i] for i in chunk], max_new_tokens, sampling)
        try:
            for tokens in steps:
                for i, (text, token) in enumerate(zip(texts, tokens, strict=True)):
                    said[i] += text.add(token)
                if not _private(client) and all(text.finish for text in texts):
                    break
        finally:
            _leave(client, steps)
        for i, text, told in sorted(zip(chunk, texts, said, strict=True), key=lambda made: made[0]):
            yield i, (told + text.end(), text)


def stream(
    client: Client, prompt: Prompt, *, max_new_tokens: int, sampling: Sampling, ends: int | None = None
) -> Iterator[Piece]:
    """Continue a prompt and give the text as it comes; all pieces' texts together are :attr:`Generated.text`.

    ``ends`` is another token that ends the text as the model's own end does, such as the end of a message.

    Under a private policy the last piece comes when as many tokens have crossed as were asked for, however short the text
    is; closing the iterator before sends the rest, too. Args and errors as :func:`generate_batch`; faults of the input are
    raised at once, others where the next piece would be.
    """
    (ask,) = asked(client, [prompt], max_new_tokens)
    return _pieces(client, ask, max_new_tokens, sampling, ends)


def _pieces(client: Client, ask: Ask, count: int, sampling: Sampling, ends: int | None) -> Iterator[Piece]:
    text = _Text(client.tokenizer, sampling, ends)
    steps = decoded(client, [ask], count, sampling)
    try:
        for (token,) in steps:
            before = len(text.tokens)
            shown = text.add(token)
            if len(text.tokens) > before:
                yield Piece(shown, token, None)
            if text.finish is not None:
                break
        if rest := text.end():
            yield Piece(rest, None, None)
    finally:
        _leave(client, steps)
    yield Piece("", None, text.finish)


def _leave(client: Client, steps: Generator[tuple[int, ...], None, None]) -> None:
    """Let the server forget; under a private policy the rest crosses first, or the number of messages would tell the end."""
    if _private(client):
        for _ in steps:
            continue
    steps.close()


def _private(client: Client) -> bool:
    return isinstance(client.policy.privacy, Gaussian)


def _generated(client: Client, ask: Ask, text: str, made: _Text) -> Generated:
    privacy, ledger = client.policy.privacy, client.ledger
    private = isinstance(privacy, Gaussian) and ledger is not None
    epsilon = enforced_epsilon(ledger.mu(ask.record), privacy.delta) if private else None  # type: ignore[union-attr]
    delta = privacy.delta if isinstance(privacy, Gaussian) and private else None
    assert made.finish is not None
    return Generated(text, tuple(made.tokens), epsilon, delta, made.finish, len(ask.real))
