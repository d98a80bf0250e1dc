"""What a gate lets out, told to whoever keeps an audit log: sizes, costs and digests, never contents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Let", "Sent", "Tally", "Way", "Witness", "nobody", "told"]

Way = Literal["cut", "gradient", "decode", "labels", "update", "common"]


@dataclass(frozen=True, slots=True)
class Let:
    """One release, before it is handed over.

    Attributes:
        channel: where it leaves.
        sequences: how many are handed over, remembered ones included.
        charged: how many charges the ledger took for it now; for a sum, of records.
        units: mu^2 of these in units of 2^-40, added up.
        noised: False for what leaves as it is.
        payload: SHA-256 of all the bytes, hex.
        size: how many bytes these are; of a sum, of its numbers before they become words of a ring.
    """

    channel: Way
    sequences: int
    charged: int
    units: int
    noised: bool
    payload: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """What left through one channel: sequences, and bytes of their rows. The same bytes count once, however often they leave."""

    channel: Way
    releases: int
    size: int


class Tally:
    """Adds up what a gate lets out, by channel."""

    def __init__(self) -> None:
        self._sent: dict[Way, Sent] = {}
        self._seen: set[bytes] = set()

    def add(self, let: Let) -> None:
        """One more release; it adds nothing where it is one of before."""
        name = bytes.fromhex(let.payload)
        if name in self._seen:
            return
        self._seen.add(name)
        known = self._sent.get(let.channel, Sent(let.channel, 0, 0))
        self._sent[let.channel] = Sent(let.channel, known.releases + let.sequences, known.size + let.size)

    def channels(self) -> tuple[Sent, ...]:
        """By name of the channel."""
        return tuple(self._sent[name] for name in sorted(self._sent))


Witness = Callable[[Let], None]
"""Told of every release before it is handed over; what it raises stops the release."""


def nobody(_let: Let) -> None:
    """For a gate whose client keeps no log."""


def told(
    channel: Way, payloads: Iterable[bytes], sequences: int, units: Iterable[int] = (), *, noised: bool = True
) -> Let:
    """Describe a release.

    Args:
        channel: where it leaves.
        payloads: the bytes, in the order in which they leave.
        sequences: how many.
        units: of each charge that was taken for it now.
        noised: whether a mechanism protects it.
    """
    digest, costs, size = hashlib.sha256(), tuple(units), 0
    for payload in payloads:
        digest.update(payload)
        size += len(payload)
    return Let(channel, sequences, len(costs), sum(costs), noised, digest.hexdigest(), size)
