"""One decoding cache at the server that outlives what the server forgets: it is built again from the very same bytes.

The bytes that were released for a text stay in memory while the text is generated. When the server dropped the cache
(SS-4017), or the connection was lost, they are sent once more, in their order, and generation goes on where it was. The
server has seen each of them before, so nothing is drawn, charged or told anew; the cache is the same bit for bit, and so
are the tokens. When the server has no room (SS-4040) this waits, and asks again with the same bytes.

What this does not hide: that a text is still being generated. A server that restarted with other weights in B goes on with
those; it is the same server to this client if job, model and policy are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from securesplit.client.link import Link
from securesplit.errors import ConnectionFailed, RemoteProtocolError
from securesplit.privacy.released import Released

__all__ = ["PATIENCE", "Patience", "ServerCache"]

_ATTEMPTS = 20
"""Lost connections, and dropped caches, of one text before it is given up."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to try.

    Attributes:
        room_seconds: for room at the server.
        reconnect_seconds: for a new connection in the place of a lost one.
        clock, sleep: seconds; passed in for tests.
    """

    room_seconds: float = 120.0
    reconnect_seconds: float = 30.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


PATIENCE = Patience()

Parts = tuple[Released, ...]


class ServerCache:
    """A decoding cache behind a link.

    Args:
        link: an open session.
        patience: how long to try.

    Attributes:
        replays: how often it was built again.
    """

    def __init__(self, link: Link, patience: Patience = PATIENCE) -> None:
        self._link = link
        self._patience = patience
        self._kept: list[Parts] = []
        self._number = 0
        self._session = 0
        self._built = 0  # How many of the kept messages the server's cache holds.
        self._lost = 0
        self.replays = 0

    def extend(self, parts: Parts) -> tuple[Tensor, ...]:
        """Send released rows that go on the text, get B's output; see :meth:`Link.decode`.

        Raises:
            RemoteProtocolError: SS-4040 when there was no room for as long as the patience lasts, SS-4041 when there never is,
                SS-4017 when the cache was dropped again and again; others, and ConnectionFailed, as :meth:`Link.next`.
        """
        self._kept.append(parts)
        deadline, pause = self._patience.clock() + self._patience.room_seconds, 0.1
        while True:
            try:
                return self._bring_up()
            except ConnectionFailed as lost:
                self._lost += 1
                if self._lost > _ATTEMPTS:
                    raise
                self._link.reconnect(lost, within=self._patience.reconnect_seconds)
            except RemoteProtocolError as declined:
                if declined.code == "SS-4017" and self._lost < _ATTEMPTS:
                    self._lost += 1
                    self.drop()
                elif declined.code == "SS-4040" and self._patience.clock() + pause <= deadline:
                    self._patience.sleep(pause)
                    pause = min(2 * pause, 2.0)
                else:
                    raise

    def drop(self) -> None:
        """Let the server forget the cache, if it holds one. The bytes stay here."""
        if self._number and self._session == self._link.sessions:
            self._link.drop_cache(self._number)
        self._number = self._built = 0

    def _bring_up(self) -> tuple[Tensor, ...]:
        """Send all that the server's cache lacks; the last message's answer counts."""
        if not self._number or self._session != self._link.sessions:
            self.replays += len(self._kept) > 1
            self._number, self._session, self._built = self._link.open_cache(), self._link.sessions, 0
        mixed: tuple[Tensor, ...] = ()
        while self._built < len(self._kept):
            # The prompts as they were, then the fed-back tokens, as many to a message as it takes.
            count = 1 if self._built == 0 else min(self._fitting(), len(self._kept) - self._built)
            mixed = self._link.decode(self._kept[self._built : self._built + count], cache=self._number)
            self._built += count
        return tuple(rows[:, -part.shape[1] :] for rows, part in zip(mixed, self._kept[-1], strict=True))

    def _fitting(self) -> int:
        """How many fed-back steps fit into one message: no longer than a bucket, no larger than a message."""
        limits = self._link.policy.limits
        size = sum(len(part.payload) for part in self._kept[1])
        return max(1, min(limits.buckets[-1], (limits.max_message_bytes // 2) // size))
