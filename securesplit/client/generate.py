"""Decoding through the split: a cache in each party, sampling on the client.

What it costs. The prompt is one release of its own record. Every generated token that is fed back is another release:
it depends on the prompt through attention, and on every training record through C's adapters, so it is charged to all
records of the site (``*``). Whether it can be paid is checked before the first byte leaves; only another process of the
same site that spends in the meantime can still end a run midway.

The number of messages says nothing: under a private policy as many tokens cross, and are charged, as were asked for,
even when the text ended before. What the server still learns: that number, and the time between messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from securesplit.client.sampling import Sampling
from securesplit.data.batches import bucket_of
from securesplit.errors import InputError
from securesplit.policy.schema import Gaussian
from securesplit.privacy.plan import enforced_epsilon

if TYPE_CHECKING:
    from securesplit.client.client import Client


@dataclass(frozen=True, slots=True)
class Piece:
    """What one more token adds; the last piece says why nothing follows."""

    text: str
    token: int | None
    finish: Literal["stop", "length"] | None


@dataclass(frozen=True, slots=True)
class Generated:
    """A continuation.

    Attributes:
        text: of the new tokens.
        tokens: the new token ids.
        epsilon: what the prompt's record has spent in all by now, at the policy's delta; unit sequence, relation
            replace-one. None under UnsafeNoPrivacy.
        delta: of the same claim.
    """

    text: str
    tokens: tuple[int, ...]
    epsilon: float | None
    delta: float | None


def generate(client: Client, prompt: str, *, max_new_tokens: int, sampling: Sampling) -> Generated:
    """Continue a prompt; see :func:`stream` for arguments and errors."""
    pieces = list(stream(client, prompt, max_new_tokens=max_new_tokens, sampling=sampling))
    new = [piece.token for piece in pieces if piece.token is not None]
    text = "".join(piece.text for piece in pieces)
    privacy = client.policy.privacy
    if not isinstance(privacy, Gaussian) or client.ledger is None:
        return Generated(text, tuple(new), epsilon=None, delta=None)
    mu = client.ledger.mu(_record(client, prompt))
    return Generated(text, tuple(new), enforced_epsilon(mu, privacy.delta), privacy.delta)


def _record(client: Client, prompt: str | tuple[int, ...]) -> str | None:
    """The ledger's name for a prompt. Nobody says whose it is, so under unit 'user' everybody pays for it."""
    privacy = client.policy.privacy
    if client.ledger is None or (isinstance(privacy, Gaussian) and privacy.unit == "user"):
        return None
    return client.ledger.key(prompt.encode() if isinstance(prompt, str) else b",".join(b"%d" % i for i in prompt))


def stream(
    client: Client, prompt: str | tuple[int, ...], *, max_new_tokens: int, sampling: Sampling
) -> Iterator[Piece]:
    """Continue a prompt, piece by piece.

    Args:
        client: an open site.
        prompt: private text, or its tokens.
        max_new_tokens: at least 1.
        sampling: how tokens are chosen.

    Raises:
        InputError: SS-1441 for an empty prompt or no tokens to generate.
        PolicyDenied: SS-2010 when the policy does not allow generation.
        BudgetExhausted: SS-5001, SS-5002; nothing was sent.
    """
    tokenizer: Any = client.tokenizer
    ids = [int(i) for i in (tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)]
    if not ids or max_new_tokens < 1:
        raise InputError("SS-1441", "there is nothing to continue", hint="Give a prompt, and at least one new token.")
    client.train(None)
    private = isinstance(client.policy.privacy, Gaussian)
    if private:
        # The server sees the bucket, not the length. Padding stands in front, where later tokens may see it unmasked.
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ids = [int(fill)] * (bucket_of(len(ids), client.policy.limits.buckets) - len(ids)) + ids
    if max_new_tokens > 1:
        client.gate.require(max_new_tokens - 1, at="decode")
    new: list[int] = []
    told, finish = "", None
    for token in _decode(client, ids, _record(client, prompt), max_new_tokens, sampling):
        if finish is None and token == tokenizer.eos_token_id:
            finish = "stop"
        if finish is None:
            new.append(token)
            text = str(tokenizer.decode(new, skip_special_tokens=True))
            ends = [text.index(stop) for stop in sampling.stop if stop in text]
            if ends:
                text, finish = text[: max(min(ends), len(told))], "stop"
            yield Piece(text[len(told) :], token, None)
            told = text
        if finish is not None and not private:
            break
    yield Piece("", None, "stop" if finish else "length")


def _decode(client: Client, ids: list[int], record: str | None, count: int, sampling: Sampling) -> Iterator[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    front, back = client.coded_front.new_cache(), client.coded_back.new_cache()
    cache = client.link.open_cache()
    rows, records = torch.tensor([ids]), None if record is None else [record]
    contents = None if client.ledger is None else [client.ledger.key(b"prompt:" + b",".join(b"%d" % i for i in ids))]
    try:
        for position in range(count):
            with torch.no_grad():
                hidden = client.coded_front(rows, cache=front)
                if position == 0:
                    private = client.gate.release(hidden, at="cut", records=records, contents=contents)
                else:
                    private = client.gate.release(hidden, at="decode")
                mixed = client.link.forward(private, learn=False, cache=cache)
                token = _choose(client.coded_back(mixed, cache=back, logits_to_keep=1)[0, -1], sampling, generator)
            yield token
            rows = torch.tensor([[token]])
    finally:
        client.link.drop_cache(cache)


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
