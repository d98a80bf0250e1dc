"""Token after token through the split: A, the gate, B behind its cache, C, and a choice; for one prompt or for many.

Prompts of one length run as one batch in A and C. Everything is paid for before the first byte leaves.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from securesplit.client.asked import Ask
from securesplit.client.replay import Parts, ServerCache
from securesplit.client.sampling import Sampling, choose
from securesplit.errors import SecureSplitError
from securesplit.model.parts import PartCache
from securesplit.privacy.gate import Released

if TYPE_CHECKING:
    from securesplit.client.client import Client

__all__ = ["decoded"]


@dataclass(slots=True)
class _Lane:
    """Prompts of one length, which run as one batch in A and C.

    Attributes:
        members: their places in the batch.
        rows: (B, T) the next token ids.
        front, back: caches of A and C.
    """

    members: tuple[int, ...]
    rows: Tensor
    front: PartCache
    back: PartCache


def decoded(
    client: Client, asks: Sequence[Ask], count: int, sampling: Sampling
) -> Generator[tuple[int, ...], None, None]:
    """The next token of every prompt, ``count`` times; each is fed back but for the last. Close it to let the server forget.

    Raises:
        BudgetExhausted: SS-5001, SS-5002. Others as :meth:`securesplit.client.replay.ServerCache.extend`.
    """
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in asks]
    seen = [list(ask.real) for ask in asks]
    lanes = _lanes(client, asks)
    caches: list[tuple[ServerCache, list[_Lane]]] = []
    try:
        for position in range(count):
            released = [_release(client, lane, asks if position == 0 else None) for lane in lanes]
            if position == 0:  # Everything is paid for before the first byte leaves.
                if (
                    count > 1
                ):  # Prompts of records that had spent much under another policy may have left less than before.
                    client.gate.require((count - 1) * len(asks), at="decode")
                gains = dict.fromkeys(part.gain for part in released)
                caches = [
                    (ServerCache(client.link, client.patience), [lane for lane, part in zip(lanes, released, strict=True) if part.gain == gain])
                    for gain in gains
                ]  # fmt: skip
            leaving = dict(zip(map(id, lanes), released, strict=True))
            found: dict[int, int] = {}
            for cache, members in caches:
                parts: Parts = tuple(leaving[id(lane)] for lane in members)
                for lane, mixed in zip(members, cache.extend(parts), strict=True):
                    for i, logits in zip(lane.members, _logits(client, lane, mixed), strict=True):
                        found[i] = choose(logits, sampling, generators[i], seen[i])
                        seen[i].append(found[i])
                    lane.rows = torch.tensor([[found[i]] for i in lane.members])
            yield tuple(found[i] for i in range(len(asks)))
    finally:
        for cache, _ in caches:
            with suppress(SecureSplitError):  # The connection may be gone, and the cache with it.
                cache.drop()


def _lanes(client: Client, asks: Sequence[Ask]) -> list[_Lane]:
    """Prompts by length."""
    places: dict[int, list[int]] = {}
    for i, ask in enumerate(asks):
        places.setdefault(len(ask.ids), []).append(i)
    return [
        _Lane(tuple(members), torch.tensor([asks[i].ids for i in members]), client.coded_front.new_cache(), client.coded_back.new_cache())
        for members in places.values()
    ]  # fmt: skip


@torch.no_grad()
def _release(client: Client, lane: _Lane, asks: Sequence[Ask] | None) -> Released:
    """A's rows through the gate; ``asks`` for the prompts themselves, None for tokens that are fed back."""
    hidden = client.coded_front(lane.rows, cache=lane.front)
    if asks is None:
        return client.gate.release(hidden, at="decode")
    mine = [asks[i] for i in lane.members]
    records = [ask.record for ask in mine if ask.record is not None]
    contents = [ask.content for ask in mine if ask.content is not None]
    return client.gate.release(hidden, at="cut", records=records or None, contents=contents or None)


@torch.no_grad()
def _logits(client: Client, lane: _Lane, mixed: Tensor) -> Tensor:
    """C at the last position of each, (B, V)."""
    logits: Tensor = client.coded_back(mixed, cache=lane.back, logits_to_keep=1)[:, -1]
    return logits
