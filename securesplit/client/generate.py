"""Decoding through the split: a cache in each party, sampling on the client.

What it costs. The prompt is one release of its own record. Every generated token that is fed back is another release:
it depends on the prompt through attention, and on every training record through C's adapters, so it is charged to all
records of the site (``*``). Whether it can be paid is checked before the first byte leaves; only another process of the
same site that spends in the meantime can still end a run midway.

The number of messages says nothing: under a private policy as many tokens cross, and are charged, as were asked for,
even when the text ended before. What the server still learns: that number, and the time between messages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from securesplit.data.batches import bucket_of
from securesplit.errors import InputError
from securesplit.policy.schema import Gaussian
from securesplit.privacy.plan import enforced_epsilon

if TYPE_CHECKING:
    from securesplit.client.client import Client


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, on the client.

    Attributes:
        temperature: 0 is greedy.
        seed: for temperatures above 0; public randomness, it protects nothing.
    """

    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(
                "SS-1440", "the temperature must be finite and not negative", hint="0 is greedy; 0.7 is usual."
            )


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
    """Continue a prompt.

    Args:
        client: an open site.
        prompt: private text.
        max_new_tokens: at least 1.
        sampling: how tokens are chosen.

    Raises:
        InputError: SS-1441 for an empty prompt or no tokens to generate.
        PolicyDenied: SS-2010 when the policy does not allow generation.
        BudgetExhausted: SS-5001, SS-5002; nothing was sent.
    """
    tokenizer: Any = client.tokenizer
    ids = [int(i) for i in tokenizer.encode(prompt)]
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
    # Nobody says whose prompt it is, so under unit 'user' everybody pays for it.
    anybody = isinstance(client.policy.privacy, Gaussian) and client.policy.privacy.unit == "user"
    record = client.ledger.key(prompt.encode()) if client.ledger is not None and not anybody else None
    new = _decode(client, ids, record, max_new_tokens, sampling, stop=tokenizer.eos_token_id, full=private)
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    privacy = client.policy.privacy
    if not isinstance(privacy, Gaussian) or client.ledger is None:
        return Generated(text, tuple(new), epsilon=None, delta=None)
    return Generated(text, tuple(new), enforced_epsilon(client.ledger.mu(record), privacy.delta), privacy.delta)


@torch.no_grad()
def _decode(
    client: Client, ids: list[int], record: str | None, count: int, sampling: Sampling, *, stop: int | None, full: bool
) -> list[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    front, back = client.coded_front.new_cache(), client.coded_back.new_cache()
    cache = client.link.open_cache()
    new: list[int] = []
    ended = False
    rows, records = torch.tensor([ids]), None if record is None else [record]
    contents = None if client.ledger is None else [client.ledger.key(b"prompt:" + b",".join(b"%d" % i for i in ids))]
    try:
        for position in range(count):
            hidden = client.coded_front(rows, cache=front)
            if position == 0:
                private = client.gate.release(hidden, at="cut", records=records, contents=contents)
            else:
                private = client.gate.release(hidden, at="decode")
            mixed = client.link.forward(private, learn=False, cache=cache)
            token = _choose(client.coded_back(mixed, cache=back, logits_to_keep=1)[0, -1], sampling, generator)
            ended = ended or token == stop
            if ended and not full:
                break
            if not ended:
                new.append(token)
            rows = torch.tensor([[token]])
        return new
    finally:
        client.link.drop_cache(cache)


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
