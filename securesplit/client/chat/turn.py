"""One turn: a conversation becomes a prompt that fits and can be paid, and its answer comes piece by piece.

:func:`prepare` sends nothing and raises whatever there is to refuse; :func:`speak` is where the server is spoken to.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from securesplit.client.chat.conversation import Conversation
from securesplit.client.chat.template import Rendered, fit
from securesplit.client.chat.toll import Price, Toll
from securesplit.client.generate import Piece
from securesplit.client.sampling import Sampling

if TYPE_CHECKING:
    from securesplit.client.client import Client

__all__ = ["Turn", "prepare", "prepare_text", "speak"]


@dataclass(frozen=True, slots=True, repr=False)
class Turn:
    """A prompt that may be sent.

    Attributes:
        prompt: tokens.
        said: the user's messages in it, or before it; what pays.
        dropped: how many of the oldest turns did not fit into the prompt.
        max_new_tokens: how many tokens are asked for.
        sampling: how they are chosen.
        price: what it costs; None under UnsafeNoPrivacy.
        ends: the token that ends a message, or None.
    """

    prompt: tuple[int, ...]
    said: tuple[str, ...]
    dropped: int
    max_new_tokens: int
    sampling: Sampling
    price: Price | None
    ends: int | None


def prepare(client: Client, toll: Toll, conversation: Conversation, *, max_new_tokens: int, sampling: Sampling) -> Turn:
    """Make a turn of a conversation, without sending anything.

    Raises:
        InputError: SS-1275, SS-1276, SS-1278 for what cannot become a prompt.
        PolicyDenied: SS-2010 when the policy allows no generation.
        BudgetExhausted: SS-5001, SS-5002 when it cannot be paid.
    """
    rendered = fit(conversation, client.tokenizer, max(client.policy.limits.buckets))
    return _turn(client, toll, rendered, conversation.mine, max_new_tokens, sampling)


def prepare_text(client: Client, toll: Toll, text: str, *, max_new_tokens: int, sampling: Sampling) -> Turn:
    """The same for plain text to continue; it is a conversation of one message, without a template.

    Raises:
        As :func:`prepare`; SS-1222 is raised by :func:`speak` for a text that is too long.
    """
    tokens = tuple(int(i) for i in client.tokenizer.encode(text))  # type: ignore[attr-defined]
    return _turn(client, toll, Rendered(tokens), (text,), max_new_tokens, sampling)


def _turn(
    client: Client, toll: Toll, rendered: Rendered, said: tuple[str, ...], max_new_tokens: int, sampling: Sampling
) -> Turn:
    toll.require(client, said, rendered.tokens, max_new_tokens)
    price = toll.price(client, said, rendered.tokens, max_new_tokens)
    stopping = replace(sampling, stop=(*sampling.stop, *rendered.stop))
    return Turn(rendered.tokens, said, rendered.dropped, max_new_tokens, stopping, price, rendered.ends)


def speak(client: Client, toll: Toll, turn: Turn) -> Iterator[Piece]:
    """Send a turn and hand out its answer; the last piece says why nothing follows. Closing the iterator stops it.

    Raises:
        As :meth:`securesplit.client.client.Client.stream`.
    """
    # What the client refuses is refused here, and costs nothing; the first byte leaves with the first piece.
    stream = client.stream(turn.prompt, max_new_tokens=turn.max_new_tokens, sampling=turn.sampling, ends=turn.ends)
    toll.pay(client, turn.said, turn.prompt)
    with closing(cast("Generator[Piece]", stream)) as pieces:
        yield from pieces
