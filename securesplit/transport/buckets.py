"""Token buckets: how many of something may happen, by key, with bounded memory. No clock of its own."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from securesplit.transport.limits import Limits

__all__ = ["Buckets", "Rates"]


@dataclass(slots=True)
class _Bucket:
    level: float
    at: float


class Buckets:
    """One bucket per key; what was not asked for longest is forgotten first, as if it were full again.

    Args:
        rate: tokens per second.
        burst: tokens in a full bucket.
        keys: how many buckets are kept.
    """

    def __init__(self, rate: float, burst: float, *, keys: int = 4096) -> None:
        self._rate, self._burst, self._keys = rate, burst, keys
        self._found: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, key: str, now: float) -> bool:
        """Take one token, if there is one."""
        bucket = self._filled(key, now)
        if bucket.level < 1:
            return False
        bucket.level -= 1
        return True

    def owe(self, key: str, amount: float, now: float) -> float:
        """Take any amount, below zero too: seconds until the bucket is level again, 0 when it is."""
        bucket = self._filled(key, now)
        bucket.level -= amount
        return max(0.0, -bucket.level / self._rate)

    def _filled(self, key: str, now: float) -> _Bucket:
        bucket = self._found.setdefault(key, _Bucket(self._burst, now))
        bucket.level = min(self._burst, bucket.level + (now - bucket.at) * self._rate)
        bucket.at = now
        self._found.move_to_end(key)
        while len(self._found) > self._keys:
            self._found.popitem(last=False)
        return bucket


class Rates:
    """How fast each client may send; who is faster is read later, and nothing of it is lost.

    Args:
        limits: of all clients. A second's worth may come at once.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._known: dict[str, tuple[Buckets | None, Buckets | None]] = {}

    def wait(self, name: str, size: int, now: float) -> float:
        """A message of ``size`` bytes has come: seconds to wait before this client's next one is read."""
        if name not in self._known:
            asked = self._limits.of(name)
            self._known[name] = (_bucket(asked.messages_per_second), _bucket(asked.bytes_per_second))
        messages, data = self._known[name]
        return max(
            0.0 if messages is None else messages.owe(name, 1, now), 0.0 if data is None else data.owe(name, size, now)
        )


def _bucket(rate: float | None) -> Buckets | None:
    return None if rate is None else Buckets(rate, rate)
